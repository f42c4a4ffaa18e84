"""Triton kernels, each beside its launcher, and the backend that is made of them (``ops``)."""

import os

__all__ = ["interpreting"]


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels, which lets them run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
