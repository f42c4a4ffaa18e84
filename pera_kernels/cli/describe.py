"""``info`` and ``inspect``: what there is, as dictionaries."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .. import __version__, backends, reference
from ..adapters.checkpoint import AdapterFile
from ..adapters.export import vllm_max_lora_rank
from ..checks import BACKENDS
from ..kernels import interpreting, tiles
from ..module import quadratic_share
from ..terms import expanded_rank

__all__ = ["adapter", "installation"]

PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installation() -> dict[str, Any]:
    """Device, backends and why one is missing, versions, tile table."""
    # A broken driver makes torch warn and say no.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    names = [name for name in BACKENDS if name != "auto"]
    reasons = {name: backends.unavailable(name, device) for name in names}
    return {
        "pera_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
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
        modules[name] = {
            **options,
            "scale": options["alpha"] / options["r"],
            "in_features": A.shape[1],
            "out_features": B.shape[0],
            "dtype": str(A.dtype).removeprefix("torch."),
            "parameters": sum(tensor.numel() for tensor in own.values()),
            "expanded_rank": K,
            "zero_coefficients": None if h is None else int((h == 0).sum()),
            "quadratic_share": quadratic_share(A, B, h, options["terms"]),
            "delta_norm": _norm(A, B, h, options),
            "finite": all(bool(torch.isfinite(tensor).all()) for tensor in own.values()),
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
    }


def _norm(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, options: dict[str, Any]
) -> float:
    """‖ΔW‖_F, without forming ΔW."""
    phi_A, phi_B = reference.expanded_factors(
        A.double(), B.double(), None if h is None else h.double(), options["terms"]
    )
    square = float(((phi_B.mT @ phi_B) * (phi_A @ phi_A.mT)).sum())
    return options["alpha"] / options["r"] * max(0.0, square) ** 0.5
