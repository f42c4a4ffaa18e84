"""What the lean backend does to factors: expansion, its transpose, and the coefficients.

A factor is a matrix ``(R, C)`` of ``R`` rows: A, or the transpose of B. Everything is in circular
order (see ``terms``), where the block of offset ``d`` is ``f ∘ roll(f, d)``: a strided view of the
factor with its first rows repeated gives all partners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .terms import (
    Terms,
    circular_order,
    expanded_rank,
    first_offset,
    offset_count,
    pairs,
)

__all__ = [
    "coefficient_gradient",
    "coefficient_gradient_of",
    "coefficients",
    "contract",
    "expand",
    "lanes",
    "product",
    "summed_lane_by_lane",
    "work_dtype",
]

# Up to so many numbers are gathered in one tensor for the contraction; one that is larger costs
# more in fresh memory than the operations it saves.
GATHER_ELEMENTS = 2**16
# A library sums a product of so few rows or columns lane by lane, one that is larger in blocks.
FEW_ROWS = 24
# So it is given so many lanes at a time.
BLOCK_LANES = 80


class Lanes(NamedTuple):
    """Index tensors of one rank in circular order, on one device."""

    # The two rows of each pair lane ``(L,)``.
    i: torch.Tensor
    j: torch.Tensor
    # For each row of φ ``(K,)`` its place among the R projections and the R² entries of the Gram.
    gram: torch.Tensor
    # For each (i, j) ``(R R,)`` the row of its pair in φ; 0 for a pair that is left out.
    square: torch.Tensor
    # For each row of φ ``(K,)`` the position of its coefficient in (1, h).
    coefficient: torch.Tensor
    # For each coefficient of h ``(L,)`` its row in φ.
    pair: torch.Tensor
    one: torch.Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def summed_lane_by_lane(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the rounding errors of such a product grow with every lane. Those of half precision
    are far below its own rounding.
    """
    return min(shape) <= FEW_ROWS and dtype == work_dtype(dtype)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b ``(T, C)``, summed over K lanes in blocks however few T or C are."""
    (T, K), C = a.shape, b.shape[1]
    blocks = K // BLOCK_LANES
    if blocks < 2 or not summed_lane_by_lane((T, C), a.dtype):
        return a @ b
    split = blocks * BLOCK_LANES
    parts = torch.bmm(
        a[:, :split].unflatten(1, (blocks, BLOCK_LANES)).transpose(0, 1),
        b[:split].unflatten(0, (blocks, BLOCK_LANES)),
    )
    out = parts.sum(0)
    return out if split == K else out + a[:, split:] @ b[split:]


_lane_cache: dict[tuple[int, str, torch.device], Lanes] = {}


def lanes(R: int, terms: Terms, device: torch.device) -> Lanes:
    """The index tensors, made once per device."""
    key = (R, terms, device)
    found = None if torch.compiler.is_compiling() else _lane_cache.get(key)
    if found is None:
        order, kept = circular_order(R, terms), pairs(R, terms)
        row = {kept[position]: R + lane for lane, position in enumerate(order)}
        gram = [R + kept[position][0] * R + kept[position][1] for position in order]
        values = (
            [kept[position][0] for position in order],
            [kept[position][1] for position in order],
            [*range(R), *gram],
            [row.get((min(i, j), max(i, j)), 0) for i in range(R) for j in range(R)],
            [0] * R + [1 + position for position in order],
            [row[pair] for pair in kept],
        )
        index = [torch.tensor(own, dtype=torch.int64, device=device) for own in values]
        found = Lanes(*index, torch.ones(1, device=device))  # type: ignore[call-arg]
        if not torch.compiler.is_compiling():
            _lane_cache[key] = found
    return found


def coefficients(h: torch.Tensor | None, R: int, scale: float, terms: Terms) -> torch.Tensor | None:
    """s (1, h) ``(K,)`` in circular order and at least float32; None where there is no h."""
    if h is None:
        return None
    own = lanes(R, terms, h.device)
    c = torch.cat([own.one, h]).index_select(0, own.coefficient)
    return c if scale == 1.0 else c.mul_(scale)


def coefficient_gradient(
    u: torch.Tensor, v: torch.Tensor, h: torch.Tensor, R: int, scale: float, terms: Terms
) -> torch.Tensor:
    """dh_ij = s Σ_t u_ij v_ij in the public order, from u and v ``(T, K)``."""
    products = (u.to(work_dtype(u.dtype)) * v).sum(0)
    dh = products.index_select(0, lanes(R, terms, h.device).pair)
    return (dh if scale == 1.0 else dh.mul_(scale)).to(h.dtype)


def coefficient_gradient_of(
    dphi: torch.Tensor, factor: torch.Tensor, h: torch.Tensor, terms: Terms
) -> torch.Tensor:
    """dh from dφ ``(K, C)`` of a factor ``(R, C)``, whose products are not rounded: in float16
    those of small entries would vanish.
    """
    R = factor.shape[0]
    work = work_dtype(dphi.dtype)
    products = (expand(factor.to(work), terms, work) * dphi).sum(1)
    return products.index_select(0, lanes(R, terms, h.device).pair).to(h.dtype)


def expand(
    factor: torch.Tensor, terms: Terms, dtype: torch.dtype, c: torch.Tensor | None = None
) -> torch.Tensor:
    """φ(factor) ``(K, C)``, times ``c (K,)`` if given; rounded once to ``dtype``."""
    if offset_count(factor.shape[0], terms) == 0 and c is None:
        return factor.to(dtype)
    # A single product of equal dtypes is rounded once by PyTorch itself.
    if c is not None or factor.dtype != dtype:
        factor = factor.to(work_dtype(factor.dtype))
    phi = _expand(factor, terms)
    return (phi if c is None else phi * c.unsqueeze(1)).to(dtype)


def _expand(factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    R, C = factor.shape
    if torch.compiler.is_compiling():
        own = lanes(R, terms, factor.device)
        return torch.cat([factor, factor.index_select(0, own.i) * factor.index_select(0, own.j)])
    K, first, count = expanded_rank(R, terms), first_offset(terms), offset_count(R, terms)
    phi = factor.new_empty(R * (1 + count), C)
    # Read from the copy: the factor may be strided, as the transpose of B is.
    rows = phi.narrow(0, 0, R).copy_(factor)
    extra = first + count - 1
    partners = torch.cat([rows, rows.narrow(0, 0, extra)]) if extra else rows
    partners = partners.as_strided((count, R, C), (C, C, 1), first * C)
    torch.mul(rows, partners, out=phi.narrow(0, R, count * R).view(count, R, C))
    # The last offset of an even rank has half as many pairs.
    return phi.narrow(0, 0, K)


def contract(
    dphi: torch.Tensor, factor: torch.Tensor, terms: Terms, c: torch.Tensor | None = None
) -> torch.Tensor:
    """df ``(R, C)`` from dφ ``(K, C)``, times ``c (K,)`` if given.

    df_i = dφ_i + Σ_j dφ_ij ∘ f_j, where a square counts twice; at least float32 inside.
    """
    R, C = factor.shape
    work = work_dtype(dphi.dtype)
    if c is not None:
        dphi = dphi * c.unsqueeze(1)
    if offset_count(R, terms) == 0:
        return dphi.to(factor.dtype)
    # The transpose of B is strided: what follows reads it many times.
    rows = factor.contiguous().to(work)
    if terms == "square":
        df = torch.addcmul(dphi[:R].to(work), dphi[R:], rows, value=2.0)
    elif torch.compiler.is_compiling() or R * R * C <= GATHER_ELEMENTS:
        df = _contract_gathered(dphi, rows, terms)
    else:
        df = _contract_by_offset(dphi.to(work), rows, terms)
    return df.to(factor.dtype)


def _contract_gathered(dphi: torch.Tensor, rows: torch.Tensor, terms: Terms) -> torch.Tensor:
    """All R² products (i, j) in one tensor: few operations."""
    R, C = rows.shape
    gathered = dphi.index_select(0, lanes(R, terms, rows.device).square).view(R, R, C)
    diagonal = gathered.diagonal(0, 0, 1)
    diagonal.zero_() if terms == "cross" else diagonal.mul_(2.0)
    return (gathered * rows).sum(1).add_(dphi[:R])


def _contract_by_offset(dphi: torch.Tensor, rows: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Two operations per offset, on R rows at a time: little memory."""
    R, first = rows.shape[0], first_offset(terms)
    extra = first + offset_count(R, terms) - 1
    rows = torch.cat([rows, rows[:extra]])
    # Lane l of offset d adds to the rows l and l + d, which wraps around.
    df = torch.zeros_like(rows)
    df[:R] = dphi[:R]
    if first == 0:
        df[:R].addcmul_(dphi[R : 2 * R], rows[:R], value=2.0)
    for d in range(1, extra + 1):
        block = dphi[R + (d - first) * R :][:R]
        n = block.shape[0]
        df[:n].addcmul_(block, rows[d : d + n])
        df[d : d + n].addcmul_(block, rows[:n])
    df[:extra] += df[R:]
    return df[:R]
