"""What the launchers share: the operands of kernels, and the one place where kernels start.

Each kernel stands in a file of its own beside its launcher, which takes two-dimensional tensors and
turns their shapes into a grid, splits and workspaces. Importing these files imports Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..dropout import drop_threshold, keep_scale
from ..terms import Terms, expanded_rank, lane_count, offsets

__all__ = [
    "Dropout",
    "Factor",
    "Launch",
    "in_memory",
    "launch",
    "launching",
    "on_device",
    "recorded",
    "start",
    "starting",
]


class Launch(NamedTuple):
    """A launch that was recorded: the kernel, its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def start(launch: Launch) -> Any:
    """``kernel[grid](**arguments)``, positional, which takes the binder less time; returns what was
    compiled.
    """
    kernel, grid, arguments = launch
    positional = [arguments.pop(name) for name in kernel.arg_names]
    return kernel[grid](*positional, **arguments)


_launcher: ContextVar[Callable[[Launch], Any]] = ContextVar("launcher", default=start)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Start a kernel, unless launches go elsewhere."""
    _launcher.get()(Launch(kernel, grid, arguments))


def starting() -> bool:
    """Whether kernels start where they are launched."""
    return _launcher.get() is start


@contextlib.contextmanager
def launching(by: Callable[[Launch], Any]) -> Iterator[None]:
    """Within this context ``by`` gets every launch and decides what becomes of it."""
    token = _launcher.set(by)
    try:
        yield
    finally:
        _launcher.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within this context no kernel starts: launches are collected, outputs stay uninitialised."""
    calls: list[Launch] = []
    with launching(calls.append):
        yield calls


@dataclass(frozen=True)
class Dropout:
    """A probability and the seed tensor that chooses the mask."""

    p: float
    seed: torch.Tensor | None

    def arguments(self) -> dict[str, object]:
        return {
            "seed_ptr": self.seed,
            "drop_threshold": drop_threshold(self.p),
            "HAS_DROPOUT": self.p > 0.0,
        }

    @property
    def keep_scale(self) -> float:
        return keep_scale(self.p)


NO_DROPOUT = Dropout(0.0, None)


@dataclass(frozen=True)
class Factor:
    """A factor ``(r, N)`` of any strides (``A``, or ``B.t()``) that a kernel expands, and its
    coefficients h ``(L,)`` or None. Without coefficients there may be ``others`` of its shape and
    dtype, whose lanes stand below its own.
    """

    rows: torch.Tensor
    h: torch.Tensor | None
    r: int
    terms: Terms
    others: tuple[torch.Tensor, ...] = ()

    @property
    def members(self) -> tuple[torch.Tensor, ...]:
        return self.rows, *self.others

    @property
    def lanes(self) -> int:
        """How many lanes the expansion has, with the unused ones that pad each member's."""
        return len(self.members) * lane_count(self.r, self.terms)

    def constants(self) -> dict[str, object]:
        return {
            "R": self.r,
            "K": expanded_rank(self.r, self.terms),
            "LANES": lane_count(self.r, self.terms),
            "FIRST": offsets(self.r, self.terms).start,
        }


def in_memory(phi: torch.Tensor) -> Factor:
    """An expansion φ ``(lanes, N)`` in memory as a factor: every lane is one of its rows."""
    return Factor(phi, None, phi.shape[0], "linear")


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU current while its kernels launch; nothing to do for the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def allows_tf32() -> bool:
    """Whether PyTorch's own setting allows tf32 in products of float32."""
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on; after it was set allow_tf32 may not be read.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def dot_precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def addressable(factor: torch.Tensor) -> torch.Tensor:
    """The factor, copied if its strides reach past the 32-bit offsets the kernels use for it."""
    reach = sum((n - 1) * s for n, s in zip(factor.shape, factor.stride(), strict=True))
    return factor if reach < 2**31 else factor.contiguous()


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``; triton.cdiv takes ten times as long on the host."""
    return -(-size // block)
