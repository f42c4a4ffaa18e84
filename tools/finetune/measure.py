"""What is measured on a model and recorded about the computer."""

import math
import platform
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pera_kernels as pk
from pera_kernels.cli import describe
from pera_kernels.sharded import whole
from tools.finetune.adapters import Adapters

EVALUATION_BATCH = 32


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Mean next-byte cross-entropy in bits over `windows` (W, context + 1)."""
    total = 0.0
    for chunk in windows.split(EVALUATION_BATCH):
        logits, targets = model(chunk[:, :-1]), chunk[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel() / math.log(2)


@torch.no_grad()
def merge_check(
    model: nn.Module, windows: Tensor, adapters: Adapters | None = None
) -> dict[str, float]:
    """Compares `model` with its adapters merged and not, on `windows` (W, context + 1).

    The difference of the logits is the largest, relative to the largest logit. Raises if
    `unmerge` does not give every weight back bit for bit.
    """
    adapters = adapters or Adapters()
    inputs = windows[:EVALUATION_BATCH, :-1]
    logits = model(inputs)
    weights = {name: weight.clone() for name, weight in adapters.weights(model).items()}
    adapters.merge(model)
    difference = (model(inputs) - logits).abs().max() / logits.abs().max()
    merged_bits = bits_per_byte(model, windows)
    adapters.unmerge(model)
    for name, weight in adapters.weights(model).items():
        if not bool(whole((weight == weights[name]).all())):
            raise RuntimeError(f"unmerge() did not restore the weight of {name} bit for bit")
    return {
        "merged_logit_difference": difference.item(),
        "merged_held_out_bits_per_byte": merged_bits,
    }


def now(device: torch.device) -> float:
    """Seconds, after the work that `device` was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most allocated on CUDA since the last reset, else the process's peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, for whoever reads the results later."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": describe.version("triton"),
        "pera_kernels": pk.__version__,
        "commit": describe.commit(),
    }
