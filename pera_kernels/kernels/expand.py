"""φ in memory (Eq. 2, 3): a factor's rows and their products, times the coefficients."""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..terms import expanded_rank, lane_count, offsets
from . import tiles
from .launch import Factor, addressable, blocks, launch
from .pair_tiles import load_coefficients, load_phi, pair_lanes
from .reduce import SUM_BLOCKS, Sum, sum_arguments, sum_tile
from .tile_math import round_to

__all__ = ["expand"]


@triton.jit
def _expand_tile(
    block,
    f_ptr,
    h_ptr,
    phi_ptr,
    N,
    lanes,
    stride_f_r,
    stride_f_n,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_k = block // tiles_n * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = block % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j, is_pair, live = pair_lanes(offs_k, R, K, LANES, MEMBERS, FIRST)
    inside = offs_k < lanes
    live = live & inside
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
    if HAS_H:
        phi *= load_coefficients(h_ptr, i, j, is_pair & live, R, K, FIRST)[:, None]
    tl.store(
        phi_ptr + (offs_k.to(tl.int64)[:, None] * N + offs_n[None, :]),
        round_to(phi, phi_ptr.dtype.element_ty),
        mask=inside[:, None] & mask_n[None, :],
    )


@triton.jit
def expand_kernel(
    f_0_ptr,
    h_0_ptr,
    phi_0_ptr,
    N_0,
    lanes_0,
    stride_f_0_r,
    stride_f_0_n,
    f_1_ptr,
    h_1_ptr,
    phi_1_ptr,
    N_1,
    lanes_1,
    stride_f_1_r,
    stride_f_1_n,
    partial_ptr,
    out_ptr,
    parts,
    numel,
    width,
    stride_out,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS_0: tl.constexpr,
    MEMBERS_1: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_H_0: tl.constexpr,
    HAS_H_1: tl.constexpr,
    JOBS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """c ∘ φ(f) (or φ(f) alone without h) of one or two factors, and beside them a sum of partial
    results.

    f (MEMBERS · R, N) -> φ (lanes, N), in circular order, zero in unused lanes; products are
    float32 and rounded once. The jobs have nothing to do with each other: they share a launch.
    """
    block = tl.program_id(0)
    job = tl.program_id(1)
    if job == 0:
        if block < tl.cdiv(lanes_0, BLOCK_K) * tl.cdiv(N_0, BLOCK_N):
            _expand_tile(
                block,
                f_0_ptr,
                h_0_ptr,
                phi_0_ptr,
                N_0,
                lanes_0,
                stride_f_0_r,
                stride_f_0_n,
                R,
                K,
                LANES,
                MEMBERS_0,
                FIRST,
                HAS_H_0,
                BLOCK_K,
                BLOCK_N,
            )
    if JOBS > 1:
        if job == 1:
            if block < tl.cdiv(lanes_1, BLOCK_K) * tl.cdiv(N_1, BLOCK_N):
                _expand_tile(
                    block,
                    f_1_ptr,
                    h_1_ptr,
                    phi_1_ptr,
                    N_1,
                    lanes_1,
                    stride_f_1_r,
                    stride_f_1_n,
                    R,
                    K,
                    LANES,
                    MEMBERS_1,
                    FIRST,
                    HAS_H_1,
                    BLOCK_K,
                    BLOCK_N,
                )
    if HAS_SUM:
        if job == JOBS:
            if block < tl.cdiv(numel, BLOCK_S):
                sum_tile(
                    block, partial_ptr, out_ptr, parts, numel, width, stride_out, BLOCK_P, BLOCK_S
                )


@functools.cache
def _no_expansion(number: int) -> dict[str, object]:
    pointers = dict.fromkeys((f"{name}_{number}_ptr" for name in ("f", "h", "phi")), None)
    sizes = (f"N_{number}", f"lanes_{number}", f"stride_f_{number}_r", f"stride_f_{number}_n")
    return {
        **pointers,
        **dict.fromkeys(sizes, None),
        f"MEMBERS_{number}": 1,
        f"HAS_H_{number}": False,
    }


def expand(
    factors: Sequence[Factor], pending: Sum | None = None, *, dtype: torch.dtype
) -> list[torch.Tensor]:
    """c ∘ φ of one or two factors in memory, in ``dtype``, and a pending sum, in one launch."""
    first = factors[0]
    arguments: dict[str, object] = {}
    phis, grid = [], []
    tile = tiles.tile_for("expand", first.rows.device, dtype, first.rows.dtype)
    for number, factor in itertools.zip_longest(range(2), factors):
        if factor is None:
            arguments |= _no_expansion(number)
            continue
        rows = addressable(factor.rows)
        N = rows.shape[1]
        phi = rows.new_empty((factor.lanes, N), dtype=dtype)
        phis.append(phi)
        grid.append(blocks(factor.lanes, tile.block_k) * blocks(N, tile.block_n))
        arguments |= {
            f"f_{number}_ptr": rows,
            f"h_{number}_ptr": factor.h,
            f"phi_{number}_ptr": phi,
            f"N_{number}": N,
            f"lanes_{number}": factor.lanes,
            f"stride_f_{number}_r": rows.stride(0),
            f"stride_f_{number}_n": rows.stride(1),
            f"MEMBERS_{number}": factor.members,
            f"HAS_H_{number}": factor.h is not None,
        }
    if pending is not None:
        grid.append(blocks(pending.numel, SUM_BLOCKS["BLOCK_S"]))
    launch(
        expand_kernel,
        (max(grid), len(grid)),
        **arguments,
        **sum_arguments("", pending),
        R=first.r,
        K=expanded_rank(first.r, first.terms),
        LANES=lane_count(first.r, first.terms),
        FIRST=offsets(first.r, first.terms).start,
        JOBS=len(factors),
        HAS_SUM=pending is not None,
        BLOCK_K=tile.block_k,
        BLOCK_N=tile.block_n,
        **SUM_BLOCKS,
        **tile.options(),
    )
    return phis
