"""Launches that survive Triton's cache on disk when it is damaged or cannot be written."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from typing import Any

import triton

__all__ = ["run"]

_own: str | None = None


def _is_fault(error: Exception) -> bool:
    """Whether the cache on disk is to blame: a launch reads no other files."""
    if isinstance(error, KeyError):
        # A file of the group is gone.
        return "Unknown key" in str(error)
    if isinstance(error, RuntimeError):
        return "kernel image is invalid" in str(error)
    return isinstance(error, (OSError, json.JSONDecodeError))


def _renew(kernel: Any, error: Exception) -> None:
    """From now on compile into a folder of this process, and forget what ``kernel`` loaded."""
    global _own
    if _own is None:
        _own = tempfile.mkdtemp(prefix="pera_kernels-triton-")
        atexit.register(shutil.rmtree, _own, ignore_errors=True)
        warnings.warn(
            f"Triton's cache {triton.knobs.cache.dir} is damaged or cannot be written "
            f"({type(error).__name__}: {error}); this process compiles into {_own}. Remove the "
            "cache, or set TRITON_CACHE_DIR to a folder that can be written",
            stacklevel=4,
        )
        triton.knobs.cache.dir = _own
    loaded = getattr(kernel, "device_caches", None)
    if loaded is not None:
        loaded.clear()


def run(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """``kernel[grid](**arguments)``; if the cache on disk fails it, once more without it."""
    try:
        kernel[grid](**arguments)
    except (OSError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        if not _is_fault(error):
            raise
        _renew(kernel, error)
        kernel[grid](**arguments)
