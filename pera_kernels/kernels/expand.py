"""φ in memory (Eq. 2, 3): a factor's rows and their products, times the coefficients."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..terms import lane_count
from . import tiles
from .launch import Factor, addressable, blocks, launch
from .pair_tiles import load_coefficients, load_phi, pair_lanes
from .reduce import Sum, sum_arguments, sum_tiles
from .tile_math import round_to

__all__ = ["expand"]


@triton.jit
def _expand_tile(
    block,
    f_ptr,
    h_ptrs,
    phi_ptr,
    first_lane,
    N,
    stride_f_r,
    stride_f_n,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of c ∘ φ of one factor, if it has so many: what is left of ``block`` behind them."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    count = tl.cdiv(LANES, BLOCK_K) * tiles_n
    if (block >= 0) & (block < count):
        offs_k = block // tiles_n * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_n = block % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        i, j, is_pair, live = pair_lanes(offs_k, R, K, FIRST)
        mask_n = offs_n < N
        phi = load_phi(
            f_ptr,
            i[:, None],
            j[:, None],
            is_pair[:, None],
            offs_n[None, :],
            stride_f_r,
            stride_f_n,
            live[:, None] & mask_n[None, :],
            K > R,
        ).to(tl.float32)
        if len(h_ptrs) == 1:
            phi *= load_coefficients(h_ptrs[0], i, j, is_pair, R, K, FIRST)[:, None]
        tl.store(
            phi_ptr + ((first_lane + offs_k).to(tl.int64)[:, None] * N + offs_n[None, :]),
            round_to(phi, phi_ptr.dtype.element_ty),
            mask=(offs_k < LANES)[:, None] & mask_n[None, :],
        )
    return block - count


@triton.jit
def expand_kernel(
    factors,
    sums,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_BLOCKS: tl.constexpr,
):
    """c ∘ φ(f) (or φ(f) alone without h) of several factors of one rank, and beside them sums of
    partial results.

    f (R, N) -> φ (LANES, N), in circular order, zero in unused lanes; products are float32 and
    rounded once. The jobs have nothing to do with each other: they share a launch.
    """
    block = tl.program_id(0)
    for number in tl.static_range(len(factors)):
        block = _expand_tile(block, *factors[number], R, K, LANES, FIRST, BLOCK_K, BLOCK_N)
    sum_tiles(block, sums, SUM_BLOCKS)


def expand(
    factors: Sequence[Factor], pending: Sum | None = None, *, dtype: torch.dtype
) -> list[torch.Tensor]:
    """c ∘ φ of factors of one rank in memory, in ``dtype``, and a pending sum, in one launch."""
    first = factors[0]
    tile = tiles.tile_for("expand", first.rows.device, dtype, first.rows.dtype)
    count, sums = sum_arguments([] if pending is None else [pending])
    lanes, phis, jobs = lane_count(first.r, first.terms), [], []
    for factor in factors:
        h_ptrs = () if factor.h is None else (factor.h,)
        N = factor.rows.shape[1]
        phi = factor.rows.new_empty((factor.lanes, N), dtype=dtype)
        for number, rows in enumerate(map(addressable, factor.members)):
            jobs.append((rows, h_ptrs, phi, number * lanes, N, *rows.stride()))
            count += blocks(lanes, tile.block_k) * blocks(N, tile.block_n)
        phis.append(phi)
    launch(
        expand_kernel,
        (count,),
        factors=tuple(jobs),
        BLOCK_K=tile.block_k,
        BLOCK_N=tile.block_n,
        **sums,
        **first.constants(),
        **tile.options(),
    )
    return phis
