"""Backend names, what each can run, and why one is unavailable."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from . import torch_backend
from .checks import check_backend
from .kernels import interpreting

__all__ = ["BACKEND_DTYPES", "implementation", "resolve", "unavailable"]

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
BACKEND_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "triton": _HALF_AND_SINGLE,
    "torch": (*_HALF_AND_SINGLE, torch.float64),
    "reference": (*_HALF_AND_SINGLE, torch.float64),
}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # Its import was blocked: sys.modules holds None for it.
        return False


# Looked up once: torch.compile of torch 2.11 cannot trace the search for a package.
HAS_TRITON = _installed("triton")


def unavailable(
    backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
) -> str | None:
    """Why ``backend`` cannot run on ``device`` with operands of ``dtypes``; None if it can."""
    for dtype in dtypes:
        if dtype not in BACKEND_DTYPES[backend]:
            known = ", ".join(str(d).removeprefix("torch.") for d in BACKEND_DTYPES[backend])
            return f"it computes in {known}, not in {str(dtype).removeprefix('torch.')}"
    if backend != "triton":
        return None
    if not HAS_TRITON:
        return "the triton package is not installed"
    if device.type == "cpu" and not interpreting():
        return "tensors on cpu need Triton's interpreter: set TRITON_INTERPRET=1 before the import"
    if device.type not in ("cpu", "cuda"):
        return f"it runs on cuda (NVIDIA or ROCm) devices, not on {device.type}"
    return None


def resolve(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The backend to use: "auto" is Triton for GPU tensors it can compute with, else PyTorch.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run, with the reason.
    """
    check_backend(backend)
    if device.type == "meta" and backend == "triton":
        # There are shapes and no values to compute.
        return "torch"
    if backend == "auto":
        on_gpu = device.type == "cuda"
        return "triton" if on_gpu and unavailable("triton", device, dtypes) is None else "torch"
    reason = unavailable(backend, device, dtypes)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {reason}")
    return backend


def implementation(backend: str) -> ModuleType:
    """The module with the forward and backward functions of a resolved backend."""
    if backend == "triton":
        from .kernels import ops

        return ops
    return torch_backend
