"""``info`` and ``inspect``: what there is, as dictionaries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..adapters.checkpoint import AdapterFile
from ..adapters.export import AdapterView, expanded, vllm_max_lora_rank
from ..checks import BACKENDS
from ..kernels import interpreting, tiles
from ..module import product_norm, quadratic_share
from ..terms import expanded_rank

__all__ = ["adapter", "commit", "installation", "version"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")


def version(package: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of a checkout, with "+" where the package differs from it; None elsewhere.

    A copy of the tree without .git is told by the environment variable PERA_COMMIT.
    """
    if given := os.environ.get("PERA_COMMIT"):
        return given
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "-s", "pera_kernels")
    return None if head is None else head + "+" * bool(changed)


def installation() -> dict[str, Any]:
    """Device, backends and why one is missing, versions, tile table."""
    # A broken driver makes torch warn and say no.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    names = [name for name in BACKENDS if name != "auto"]
    reasons = {name: backends.unavailable(name, device) for name in names}
    return {
        "pera_kernels": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "auto": backends.resolve("auto", device, (torch.float32,)),
        "backends": reasons,
        "tile_table": tiles.architecture(device),
        "interpreting": interpreting(),
    }


def adapter(read: AdapterFile) -> dict[str, Any]:
    """What an adapter folder holds."""
    modules = {}
    for name, own in read.tensors.items():
        options = read.options[name]
        A, B, h = own["pera_A"], own["pera_B"], own.get("pera_h")
        K = expanded_rank(options["r"], options["terms"])
        scale = options["alpha"] / options["r"]
        view = AdapterView(A, B, h, scale, options["terms"], merged=False)
        modules[name] = {
            **options,
            "scale": scale,
            "in_features": A.shape[1],
            "out_features": B.shape[0],
            "dtype": str(A.dtype).removeprefix("torch."),
            "parameters": sum(tensor.numel() for tensor in own.values()),
            "expanded_rank": K,
            "zero_coefficients": None if h is None else int((h == 0).sum()),
            "quadratic_share": quadratic_share(A, B, h, options["terms"]),
            "delta_norm": product_norm(*reversed(expanded(view, work=torch.float64))),
            "finite": all(bool(torch.isfinite(tensor).all()) for tensor in own.values()),
        }
    beside = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parameters": tensor.numel(),
            "finite": bool(torch.isfinite(tensor).all()),
        }
        for name, tensor in read.parameters.items()
        if name not in read.frozen
    }
    lora = max(own["expanded_rank"] for own in modules.values())
    padded = -(-lora // 16) * 16
    return {
        "path": str(read.path),
        "base_model": read.base_model,
        "parameters": sum(own["parameters"] for own in modules.values()),
        "lora_rank": padded,
        "vllm_max_lora_rank": vllm_max_lora_rank(padded),
        "modules": modules,
        "trained_beside": beside,
    }
