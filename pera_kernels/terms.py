"""Which monomials PERA keeps, how many there are, and in which order they stand.

``terms`` says which products join the linear directions: ``"full"`` all with i <= j (Eq. 9),
``"square"`` those with i = j (Eq. 10), ``"cross"`` those with i < j (Eq. 11), ``"linear"`` none,
which is LoRA (Eq. 8).

Letters used everywhere: ``T`` tokens, ``N`` in features, ``M`` out features, ``R`` rank, ``K``
expanded rank, ``L`` coefficients. ``A`` is ``(R, N)``, ``B`` is ``(M, R)``, ``h`` is ``(L,)``.

Two orders of the pairs exist:

* the *public* order of ``h``: row-major upper triangular, as in ``torch.triu_indices(R, R)``;
* the *circular* order of the kernels: after the ``R`` linear lanes come blocks of ``R`` lanes, one
  per circular offset ``d``; lane ``l`` of a block is the pair ``(l, (l + d) mod R)``. Offset 0
  holds the squares. For even ``R`` the last block (``d = R/2``) stops at lane ``R/2``, so that
  every unordered pair stands exactly once and the order is dense: its length is ``K``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch

__all__ = ["TERMS", "Terms", "coefficient_count", "expanded_rank", "pairs"]

LANE_GROUP = 16

Terms = Literal["full", "square", "cross", "linear"]
TERMS: tuple[str, ...] = get_args(Terms)


def check_terms(terms: str) -> None:
    if terms not in TERMS:
        raise ValueError(f"terms must be one of {', '.join(map(repr, TERMS))}; got {terms!r}")


def check_rank(r: int, name: str = "r") -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        if torch.jit.is_tracing():
            # Every size is a tensor there, and with it the rank.
            raise NotImplementedError(
                "torch.jit.trace cannot trace PERA; use torch.export.export, or merge the adapters"
            )
        raise TypeError(f"{name} must be an int >= 1; got {r!r} of type {type(r).__name__}")
    if r < 1:
        raise ValueError(f"{name} must be an int >= 1; got {r}")


def coefficient_count(r: int, terms: Terms = "full") -> int:
    """Length ``L`` of ``h``: the number of pairs that ``terms`` keeps at rank ``r``."""
    # An offset of half the rank meets every pair from both sides.
    return sum(r // 2 if d > 0 and 2 * d == r else r for d in offsets(r, terms))


def expanded_rank(r: int, terms: Terms = "full") -> int:
    """Expanded rank ``K`` of a rank-``r`` adapter: the ``r`` linear columns and one per pair.

    For ``terms="full"`` this is ``2 r + r (r - 1) / 2``, the paper's bound on the rank of ΔW.

    Raises:
        TypeError: ``r`` is not an int.
        ValueError: ``r < 1`` or an unknown ``terms``.
    """
    return r + coefficient_count(r, terms)


@lru_cache(maxsize=256)
def lane_count(r: int, terms: Terms = "full") -> int:
    """Lanes that a kernel gives an adapter: :func:`padded` ``K``."""
    return padded(expanded_rank(r, terms))


def padded(K: int) -> int:
    """``K`` rounded up to whole groups of 16 lanes, so that rows of a (T, lanes) tensor are read
    and written in full vectors; the last lanes are unused and zero.
    """
    return (K + LANE_GROUP - 1) // LANE_GROUP * LANE_GROUP


def offsets(r: int, terms: Terms) -> range:
    """The circular offsets that ``terms`` keeps: the rest of a kind of terms follows from it."""
    check_rank(r)
    check_terms(terms)
    return {
        "full": range(r // 2 + 1),
        "square": range(1),
        "cross": range(1, r // 2 + 1),
        "linear": range(0),
    }[terms]


def pairs(r: int, terms: Terms = "full") -> list[tuple[int, int]]:
    """The pairs ``(i, j)``, ``i <= j``, in the public order of ``h``."""
    kept = offsets(r, terms)
    return [(i, j) for i in range(r) for j in range(i, r) if min(j - i, r - j + i) in kept]


def pair_rows(
    r: int, terms: Terms, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """i and j of :func:`pairs`, ``(L,)`` each. Made at every call, as :func:`circular_order` is."""
    kept = offsets(r, terms)
    if kept.stop <= 1:
        lane = torch.arange(coefficient_count(r, terms), device=device)
        return lane, lane
    i, j = torch.triu_indices(r, r, kept.start, device=device)
    return i, j


def circular_order(r: int, terms: Terms, device: torch.device | str | None = None) -> torch.Tensor:
    """For each circular pair lane ``(L,)``, the position of its coefficient in the public order.

    ``h[order]`` is in circular order, and ``dh[order] = dh_circular`` takes gradients back. Made by
    arithmetic at every call: an index that is kept would outlive the mode it was made under.
    """
    kept, lane = offsets(r, terms), torch.arange(coefficient_count(r, terms), device=device)
    if kept.stop <= 1:
        return lane
    i, j = lane % r, (lane + lane // r + kept.start) % r
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    # Row ``low`` of the triangle starts after the rows above it.
    return low * (2 * r - 1 - 2 * kept.start - low) // 2 + high - kept.start
