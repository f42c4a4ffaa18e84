"""Which monomials PERA keeps, how many there are, and in which order they stand.

Letters used everywhere: ``T`` tokens, ``N`` in features, ``M`` out features, ``R`` rank, ``K``
    expanded
rank, ``L`` coefficients. ``A`` is ``(R, N)``, ``B`` is ``(M, R)``, ``h`` is ``(L,)``.

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
        raise TypeError(f"{name} must be an int >= 1; got {r!r} of type {type(r).__name__}")
    if r < 1:
        raise ValueError(f"{name} must be an int >= 1; got {r}")


def coefficient_count(r: int, terms: Terms = "full") -> int:
    """Length ``L`` of ``h``: the number of pairs that ``terms`` keeps at rank ``r``."""
    check_rank(r)
    check_terms(terms)
    return {"full": r * (r + 1) // 2, "square": r, "cross": r * (r - 1) // 2, "linear": 0}[terms]


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


def pairs(r: int, terms: Terms = "full") -> list[tuple[int, int]]:
    """The pairs ``(i, j)``, ``i <= j``, in the public order of ``h``."""
    check_rank(r)
    check_terms(terms)
    if terms == "linear":
        return []
    if terms == "square":
        return [(i, i) for i in range(r)]
    first = 0 if terms == "full" else 1
    return [(i, j) for i in range(r) for j in range(i + first, r)]


def first_offset(terms: Terms) -> int:
    """The first circular offset: cross terms leave out offset 0, the squares."""
    return 1 if terms == "cross" else 0


def offset_count(r: int, terms: Terms) -> int:
    """How many circular offsets (blocks of at most ``r`` pairs) ``terms`` keeps."""
    if terms == "linear":
        return 0
    if terms == "square":
        return 1
    return r // 2 + 1 - first_offset(terms)


@lru_cache(maxsize=256)
def circular_order(r: int, terms: Terms) -> tuple[int, ...]:
    """For each circular pair lane, the position of its coefficient in the public order of ``h``."""
    position = {pair: index for index, pair in enumerate(pairs(r, terms))}
    first = first_offset(terms)
    order = []
    for d in range(first, first + offset_count(r, terms)):
        lanes = r // 2 if d > 0 and 2 * d == r else r
        for lane in range(lanes):
            partner = (lane + d) % r
            order.append(position[min(lane, partner), max(lane, partner)])
    return tuple(order)


_index_cache: dict[tuple[int, str, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


def circular_index(r: int, terms: Terms, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index tensors ``(L,)`` public -> circular and circular -> public, made once per device.

    ``h[to_circular]`` is in circular order; ``dh_circular[to_public]`` is in public order.
    """
    key = (r, terms, device)
    found = None if torch.compiler.is_compiling() else _index_cache.get(key)
    if found is None:
        order = circular_order(r, terms)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        found = (
            torch.tensor(order, dtype=torch.int64, device=device),
            torch.tensor(inverse, dtype=torch.int64, device=device),
        )
        if not torch.compiler.is_compiling():
            _index_cache[key] = found
    return found
