"""Expansions kept while the parameters stay as they are: in eval, and for later micro-batches.

Only for leaf parameters on CPU, outside compilation and tracing, from the third call with the same
versions on: a step of plain training or of checkpointing never gets there. A write through
``.data`` leaves the version alone, so every use compares the parameters' bits with a kept copy.
Entries go when a parameter changes or dies; in all they hold at most ``LIMIT_BYTES``, and where
that is used up nothing more is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from .terms import Terms

__all__ = ["Expansions", "lookup", "readable"]

LIMIT_BYTES = 2**28
CALLS_BEFORE = 2


class Expansions(NamedTuple):
    """φ(A) ``(K, N)``, φ(B) ``(K, M)`` and the coefficients ``(K,)`` times s, None where φ(B) has
    them.
    """

    phi_A: torch.Tensor
    phi_B: torch.Tensor
    c: torch.Tensor | None


class _Entry(NamedTuple):
    """What was computed how, for B and h, at which versions; ``made`` is None until it is kept."""

    key: tuple[object, ...]
    others: tuple[weakref.ref[torch.Tensor], ...]
    calls: int
    copies: tuple[torch.Tensor, ...] = ()
    made: Expansions | None = None

    def nbytes(self) -> int:
        tensors = (*self.copies, *(t for t in self.made or () if t is not None))
        return sum(t.untyped_storage().nbytes() for t in tensors)


_entries = WeakIdKeyDictionary()
_lock = threading.Lock()


def readable(tensor: torch.Tensor) -> bool:
    """Whether a look at the values is possible and costs no synchronisation."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not is_in_torch_dispatch_mode()
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as int64 where that is possible: several times faster to compare."""
    size = tensor.element_size()
    if (
        tensor.numel()
        and tensor.is_contiguous()
        and tensor.numel() * size % 8 == 0
        and tensor.storage_offset() * size % 8 == 0
    ):
        return tensor.detach().view(-1).view(torch.int64)
    return tensor.detach()


def lookup(
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor,
    scale: float,
    terms: Terms,
    dtype: torch.dtype,
    folded: bool,
    make: Callable[[], Expansions] | None,
) -> Expansions | None:
    """The kept expansions of these parameters, by ``make`` once they are worth keeping; or None.

    Without ``make`` the call does not count, and nothing is kept that was not before.
    """
    if torch.compiler.is_compiling():
        return None
    parameters = (A, B, h)
    if not all(readable(p) and p.is_leaf and not p.is_inference() for p in parameters):
        # It may have been there before it moved to another device.
        _entries.pop(A, None)
        return None
    key = (scale, terms, dtype, folded, A._version, B._version, h._version)
    with _lock:
        entry = _entries.get(A)
    same = (
        entry is not None
        and entry.key == key
        and all(other() is p for other, p in zip(entry.others, (B, h), strict=True))
    )
    if entry is not None and same and entry.made is not None:
        pairs = zip(parameters, entry.copies, strict=True)
        if all(torch.equal(_bits(p), copy) for p, copy in pairs):
            return entry.made
        same = False
    if make is None:
        return None
    calls = entry.calls if entry is not None and same else 0
    entry = _Entry(key, (weakref.ref(B), weakref.ref(h)), calls + 1)
    if entry.calls > CALLS_BEFORE:
        entry = _keep(entry, parameters, make)
    with _lock:
        _entries[A] = entry
    return entry.made


def _keep(
    entry: _Entry, parameters: tuple[torch.Tensor, ...], make: Callable[[], Expansions]
) -> _Entry:
    # The copies come first: a write in between makes them differ, never agree with what is stale.
    copies = tuple(_bits(p).clone() for p in parameters)
    full = entry._replace(copies=copies, made=make())
    with _lock:
        held = sum(other.nbytes() for other in list(_entries.values()))
    # Without room it is tried again later, when others may have gone.
    return full if held + full.nbytes() <= LIMIT_BYTES else entry._replace(calls=0)
