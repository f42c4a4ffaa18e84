"""What a call is about: the options of an adapter, its tensors, and the base it is added to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .terms import Terms

__all__ = ["Base", "Factors", "Options", "Saved", "tokens"]


class Options(NamedTuple):
    """What is not a tensor, hashable. Below the public functions ``plan`` and ``backend`` are what
    was chosen, never ``"auto"``.
    """

    terms: Terms
    scale: float
    dropout_p: float = 0.0
    plan: str = "factored"
    backend: str = "torch"
    keep: str = "u"


class Factors(NamedTuple):
    """The tensors of one adapter: A ``(R, N)``, B ``(M, R)``, h ``(L,)`` or None."""

    A: torch.Tensor
    B: torch.Tensor
    h: torch.Tensor | None


class Base(NamedTuple):
    """What the update is added to: a dense frozen weight ``(M, N)`` with its bias ``(M,)`` or None,
    or ``out``, the output of a base layer that was called.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    out: torch.Tensor | None = None


class Saved(NamedTuple):
    """What a forward keeps for its backward: x ``(T, N)`` for dA, u ``(T, K)`` for dB and dh (each
    None where nothing asks for it), the dense weight or None, the adapter, the dropout's seed.
    Where dB and dh are asked for and u is None, it is made again from x.
    """

    x: torch.Tensor | None
    u: torch.Tensor | None
    weight: torch.Tensor | None
    adapter: Factors
    seed: torch.Tensor | None


def tokens(x: torch.Tensor) -> torch.Tensor:
    """All leading dimensions flattened: ``(..., N)`` -> ``(T, N)``; a view where strides allow."""
    # Not Size.numel(): it makes a symbolic size, as of an export, a constant.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
