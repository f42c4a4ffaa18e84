"""The gradients of a factor and its coefficients: dφ = xᵀ left, contracted while on chip."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dropout import drop_threshold
from ..terms import coefficient_count
from . import tiles
from .launch import NO_DROPOUT, Dropout, Factor, addressable, blocks, dot_precision, launch
from .pair_tiles import coefficient_index, load_coefficients, pair_lanes
from .reduce import Sum
from .tile_math import (
    dot,
    keep_tile,
    pick_columns,
    repeat_columns,
    round_to,
    row_keys,
    sum_periods,
    sum_to_columns,
    zero_tiles,
)
from .tiles import Tile

__all__ = ["Contraction", "contract"]


@triton.jit
def _contract_tile(
    program,
    left_ptr,
    x_ptr,
    f_ptr,
    h_ptrs,
    df_ptrs,
    dh_ptrs,
    seed_ptrs,
    scale,
    drop_threshold,
    T,
    N,
    t_per_split,
    stride_left_t,
    stride_left_k,
    stride_x_t,
    stride_x_n,
    stride_f_r,
    stride_f_n,
    stride_df_split,
    stride_df_r,
    stride_df_n,
    stride_dh,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What a program does for one factor, if it has so many: what is left of ``program`` behind
    them. There is h, df, dh, or dropout where a tuple is not empty.
    """
    HAS_DF: tl.constexpr = len(df_ptrs) == 1
    HAS_DH: tl.constexpr = len(dh_ptrs) == 1
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(LANES, PIECES * BLOCK_K)
    count = blocks_n * blocks_k * tl.cdiv(T, t_per_split)
    if (program >= 0) & (program < count):
        block_n = program % blocks_n
        split = program // blocks_n
        split_t = split // blocks_k
        first_lane = split % blocks_k * (PIECES * BLOCK_K)

        offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_columns = offs_n.to(tl.int64)[None, :] * stride_x_n
        mask_n = offs_n < N
        start_t = split_t * t_per_split

        accs = zero_tiles(PIECES, BLOCK_N, BLOCK_K)
        for start in range(start_t, tl.minimum(start_t + t_per_split, T), BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            rows = offs_t.to(tl.int64)
            mask_t = offs_t < T
            x = tl.load(
                x_ptr + rows[:, None] * stride_x_t + x_columns,
                mask=mask_t[:, None] & mask_n[None, :],
                other=0.0,
            )
            x = tl.trans(x)
            if len(seed_ptrs) == 1:
                key_0, key_1 = row_keys(seed_ptrs[0], rows)
                keep = keep_tile(key_0, key_1, block_n * BLOCK_N, drop_threshold, BLOCK_N)
                x = tl.where(tl.trans(keep), x, 0.0)
            sums = ()
            for piece in tl.static_range(PIECES):
                offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
                left_lanes = offs_k.to(tl.int64)[None, :] * stride_left_k
                left = tl.load(
                    left_ptr + rows[:, None] * stride_left_t + left_lanes,
                    mask=mask_t[:, None] & (offs_k < LANES)[None, :],
                    other=0.0,
                )
                sums = sums + (dot(x, left, accs[piece], PRECISION),)
            accs = sums

        offs_r = tl.arange(0, BLOCK_R)
        df = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        if K > R:
            f = tl.load(
                f_ptr + (offs_n[:, None] * stride_f_n + (offs_r % R)[None, :] * stride_f_r),
                mask=mask_n[:, None],
                other=0.0,
            )
        for piece in tl.static_range(PIECES):
            offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
            i, j, is_pair, live = pair_lanes(offs_k, R, K, FIRST)
            live = live & (offs_k < LANES)
            is_pair = is_pair & live
            scales = tl.where(live, scale, 0.0)
            of_i = accs[piece]
            if K > R:
                f_j = pick_columns(f, j)
                if piece * BLOCK_K < R:
                    f_j = tl.where(is_pair[None, :], f_j, 1.0)
                f_i = repeat_columns(f, BLOCK_K) if ALIGNED else pick_columns(f, i)
                of_i *= f_j
                if HAS_DH:
                    dh = tl.sum(of_i * f_i, axis=0) * scale
                    row = split_t * blocks_n + block_n
                    index = coefficient_index(i, j, R, K, FIRST)
                    tl.store(dh_ptrs[0] + row.to(tl.int64) * stride_dh + index, dh, mask=is_pair)
                if len(h_ptrs) == 1:
                    scales *= load_coefficients(h_ptrs[0], i, j, is_pair, R, K, FIRST)
            if HAS_DF:
                # Before the product below, whose tiles take the registers of this one.
                of_i *= scales[None, :]
                df = sum_periods(of_i, df) if ALIGNED else sum_to_columns(of_i, i, live, df)
                if K > R:
                    of_j = accs[piece] * f_i * scales[None, :]
                    df = sum_to_columns(of_j, j, is_pair, df)

        if HAS_DF:
            if ALIGNED and R < BLOCK_R:
                df = sum_periods(df, tl.zeros((BLOCK_N, R), tl.float32))
                offs_r = tl.arange(0, R)
            tl.store(
                df_ptrs[0]
                + split.to(tl.int64) * stride_df_split
                + offs_r[None, :] * stride_df_r
                + offs_n[:, None] * stride_df_n,
                round_to(df, df_ptrs[0].dtype.element_ty),
                mask=mask_n[:, None] & (offs_r < R)[None, :],
            )
    return program - count


@triton.jit
def contract_kernel(
    jobs,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For each factor dφ = s x̂ᵀ left, contracted at once to df and dh:

        df_i  = dφ_i + Σ_j c_ij (dφ_ij ∘ f_j)        a square counts twice
        dh_ij = Σ_n (dφ_ij ∘ f_i ∘ f_j)

    left (T, LANES) in circular order; x (T, N); f (R, N). A program holds PIECES
    accumulators of BLOCK_K lanes, so that x is read once for all of them. Each split over T and
    lanes writes partial sums: df[split] (R, N), dh[split_t, block_n] (K - R,), both
    float32. dφ stays on chip, a row for each feature: the columns f_j come to their lanes, and
    the products return to the columns j of df, through products with 0/1 matrices that are exact.
    Lane k belongs to the column i = k mod R: where R divides BLOCK_K (ALIGNED), a repetition and a
    sum serve for i.
    """
    program = tl.program_id(0)
    for number in tl.static_range(len(jobs)):
        program = _contract_tile(
            program,
            *jobs[number],
            R,
            K,
            LANES,
            FIRST,
            PRECISION,
            PIECES,
            ALIGNED,
            BLOCK_R,
            BLOCK_T,
            BLOCK_N,
            BLOCK_K,
        )


@dataclass(frozen=True)
class Contraction:
    """dφ = s dropout(x)ᵀ left, to be contracted into df ``(R, N)`` (dense, any layout) and dh.

    left is ``(T, lanes)`` in circular order, of any strides; x is ``(T, N)``.
    """

    left: torch.Tensor
    x: torch.Tensor
    factor: Factor
    df: torch.Tensor | None
    dh: torch.Tensor | None
    scale: float
    dropout: Dropout = NO_DROPOUT


class Division(NamedTuple):
    """What a program takes: blocks of tokens, features and lanes, and how many of the last; and
    into how many parts tokens are split.
    """

    block_t: int
    block_n: int
    block_k: int
    pieces: int
    splits: int


@lru_cache(maxsize=1024)
def divide(
    sizes: tuple[tuple[int, int], ...], lanes: int, r: int, tile: Tile, processors: int
) -> Division:
    """The division that takes the least time by a model, not measured on a GPU, for x of these
    sizes (T, N).

    A token costs what it brings from the L2: its features and its lanes. The end of a program costs
    as much as 640 tokens of its lanes, its start as much as 32,000 of one feature. Programs run in
    waves, one to a processor, and a wave that is not full takes as long as a full one.
    """
    tokens = max(T for T, _ in sizes)
    block_t, block_k = tiles.shrink(tile.block_t, tokens), tiles.shrink(tile.block_k, lanes)
    # High ranks take the registers of accumulators, then of features.
    block_n = max(tiles.MIN_BLOCK, tile.block_n * 64 // max(64, tiles.shrink(1 << 30, r)))
    most = tile.pieces if r <= 16 else 2 if r <= 32 else 1
    blocks_n, blocks_k = sum(blocks(N, block_n) for _, N in sizes), blocks(lanes, block_k)

    def time(pieces: int, wanted: int) -> int:
        splits, part = tiles.split(tokens, wanted, 4 * block_t)
        waves = blocks(blocks_n * blocks(blocks_k, pieces) * splits, processors)
        return waves * (block_n * part + pieces * block_k * (part + 640) + 32_000)

    ways = itertools.product(
        range(1, min(most, blocks_k) + 1), range(1, max(8, processors // blocks_n) + 1)
    )
    pieces, splits = min(ways, key=lambda way: (time(*way), way))
    return Division(block_t, block_n, block_k, pieces, splits)


def contract(jobs: Sequence[Contraction]) -> list[Sum]:
    """Contractions to factors of one rank and dtype, in one launch. Gradients that were split are
    incomplete until the returned sums have run.
    """
    if not jobs:
        return []
    x, factor = jobs[0].x, jobs[0].factor
    lanes, coefficients = factor.lanes, coefficient_count(factor.r, factor.terms)
    tile = tiles.tile_for("contract", x.device, x.dtype, factor.rows.dtype)
    sizes = tuple((own.x.shape[0], own.x.shape[1]) for own in jobs)
    processors = tile.programs * tiles.processor_count(x.device)
    by = divide(sizes, lanes, factor.r, tile, processors)
    programs, described, sums = 0, [], []
    for own, (T, N) in zip(jobs, sizes, strict=True):
        rows, df, dh, drop = addressable(own.factor.rows), own.df, own.dh, own.dropout
        splits, part = tiles.split(T, by.splits, 4 * by.block_t)
        blocks_n, parts = blocks(N, by.block_n), splits * blocks(lanes, by.pieces * by.block_k)
        programs += blocks_n * parts
        df_out = df
        if df is not None and parts > 1:
            df_out = df.new_empty((parts, df.numel()), dtype=torch.float32)
            sums.append(Sum(df_out, df, df.numel(), 0))
        dh_out = None
        if dh is not None:
            dh_out = dh.new_empty((splits * blocks_n, coefficients), dtype=torch.float32)
            sums.append(Sum(dh_out, dh, coefficients, 0))
        optional = (own.factor.h, df_out, dh_out, drop.seed if drop.p > 0.0 else None)
        described.append(
            (
                *(own.left, own.x, rows),
                *(() if given is None else (given,) for given in optional),
                *(own.scale * drop.keep_scale, drop_threshold(drop.p), T, N, part),
                *(*own.left.stride(), *own.x.stride(), *rows.stride()),
                *((0, 0, 0) if df is None else (df.numel(), *df.stride())),
                coefficients,
            )
        )
    launch(
        contract_kernel,
        (programs,),
        jobs=tuple(described),
        PRECISION=dot_precision(x.dtype),
        PIECES=by.pieces,
        ALIGNED=by.block_k % factor.r == 0,
        BLOCK_R=tiles.shrink(1 << 30, factor.r),
        BLOCK_T=by.block_t,
        BLOCK_N=by.block_n,
        BLOCK_K=by.block_k,
        **factor.constants(),
        **tile.options(),
    )
    return sums
