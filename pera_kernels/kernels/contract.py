"""The gradients of a factor and its coefficients: dφ = leftᵀ x, contracted while on chip."""

import torch
import triton
import triton.language as tl

from ..terms import coefficient_count
from . import tiles
from .launch import NO_DROPOUT, Dropout, Factor, addressable, blocks, dot_precision, launch
from .pair_tiles import coefficient_index, load_coefficients, pair_lanes
from .reduce import Sum
from .tile_math import dot, keep_tile, round_to, row_keys, select_rows, zero_tiles

__all__ = ["contract"]


@triton.jit
def contract_kernel(
    left_ptr,
    x_ptr,
    f_ptr,
    h_ptr,
    seed_ptr,
    df_ptr,
    dh_ptr,
    scale,
    drop_threshold,
    T,
    N,
    lanes,
    coefficients,
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
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_DF: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dφ = s leftᵀ x̂, contracted at once to df and dh:

        df_i  = dφ_i + Σ_j c_ij (dφ_ij ∘ f_j)        a square counts twice
        dh_ij = Σ_n (dφ_ij ∘ f_i ∘ f_j)

    left (T, lanes) in circular order; x (T, N); f (R, N). A program holds PIECES
    accumulators of BLOCK_K lanes, so that x is read once for all of them. Each split over T and
    lanes writes partial sums: df[split] (R, N), dh[split_t, block_n] (coefficients,),
    both float32. dφ stays on chip; its float32 rows are sent to the rows i and j of df by a product
    with the 0/1 incidence matrix of the pairs.
    """
    block_n = tl.program_id(0)
    split = tl.program_id(1)
    blocks_k = tl.cdiv(lanes, PIECES * BLOCK_K)
    split_t = split // blocks_k
    first_lane = split % blocks_k * (PIECES * BLOCK_K)

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_columns = offs_n.to(tl.int64)[None, :] * stride_x_n
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    start_t = split_t * t_per_split

    accs = zero_tiles(PIECES, BLOCK_K, BLOCK_N)
    for start in range(start_t, tl.minimum(start_t + t_per_split, T), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        rows = offs_t.to(tl.int64)
        mask_t = offs_t < T
        x = tl.load(
            x_ptr + rows[:, None] * stride_x_t + x_columns,
            mask=mask_t[:, None] & mask_n[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            key_0, key_1 = row_keys(seed_ptr, rows)
            keep = keep_tile(key_0, key_1, block_n * BLOCK_N, drop_threshold, BLOCK_N)
            x = tl.where(keep, x, 0.0)
        sums = ()
        for piece in tl.static_range(PIECES):
            offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
            left_lanes = offs_k.to(tl.int64)[None, :] * stride_left_k
            left = tl.load(
                left_ptr + rows[:, None] * stride_left_t + left_lanes,
                mask=mask_t[:, None] & (offs_k < lanes)[None, :],
                other=0.0,
            )
            sums = sums + (dot(tl.trans(left), x, accs[piece], PRECISION),)
        accs = sums

    df = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    at_n = offs_n[None, :] * stride_f_n
    for piece in tl.static_range(PIECES):
        offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
        i, j, is_pair, live = pair_lanes(offs_k, R, K, FIRST)
        live = live & (offs_k < lanes)
        is_pair = is_pair & live
        acc = accs[piece] * scale
        if K == R:
            df = select_rows(offs_r, i, live, acc, df)
        else:
            mask_kn = live[:, None] & mask_n[None, :]
            f_i = tl.load(f_ptr + (i[:, None] * stride_f_r + at_n), mask=mask_kn, other=0.0)
            f_j = tl.load(
                f_ptr + (j[:, None] * stride_f_r + at_n), mask=mask_kn & is_pair[:, None], other=1.0
            )
            f_i = f_i.to(tl.float32)
            f_j = f_j.to(tl.float32)
            if HAS_DH:
                dh = tl.sum(acc * f_i * f_j, axis=1)
                row = split_t * tl.num_programs(0) + block_n
                index = coefficient_index(i, j, R, K, FIRST)
                tl.store(dh_ptr + row.to(tl.int64) * coefficients + index, dh, mask=is_pair)
            if HAS_DF:
                if HAS_H:
                    acc *= load_coefficients(h_ptr, i, j, is_pair, R, K, FIRST)[:, None]
                df = select_rows(offs_r, i, live, acc * f_j, df)
                df = select_rows(offs_r, j, is_pair, acc * f_i, df)

    if HAS_DF:
        tl.store(
            df_ptr
            + split.to(tl.int64) * stride_df_split
            + offs_r[:, None] * stride_df_r
            + offs_n[None, :] * stride_df_n,
            round_to(df, df_ptr.dtype.element_ty),
            mask=(offs_r < R)[:, None] & mask_n[None, :],
        )


def contract(
    left: torch.Tensor,
    x: torch.Tensor,
    factor: Factor,
    *,
    df: torch.Tensor | None,
    dh: torch.Tensor | None,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> list[Sum]:
    """Contract dφ = s leftᵀ dropout(x) into df ``(R, N)`` (dense, any layout) and dh.

    left is ``(T, lanes)`` in circular order, of any strides; x is ``(T, N)``. Gradients that
    were split are incomplete until the returned sums have run.
    """
    rows, lanes = addressable(factor.rows), factor.lanes
    T, N = x.shape
    coefficients = coefficient_count(factor.r, factor.terms)
    tile = tiles.tile_for("contract", x.device, x.dtype, rows.dtype)
    block_t, block_k = tiles.shrink(tile.block_t, T), tiles.shrink(tile.block_k, lanes)
    blocks_n = blocks(N, tile.block_n)
    processors = tiles.processor_count(x.device)
    splits_t, t_per_split = tiles.split(T, 2 * processors // blocks_n, 4 * block_t)
    # Fewer lanes to a program where there would be too few programs: x is small then.
    crowd = max(1, processors // (blocks_n * splits_t))
    pieces = tiles.pieces(lanes, block_k, max(1, tile.pieces // crowd))
    parts = splits_t * blocks(lanes, pieces * block_k)
    df_out, dh_out, sums = df, dh, []
    if df is not None and parts > 1:
        df_out = df.new_empty((parts, df.numel()), dtype=torch.float32)
        sums.append(Sum(df_out, df, df.numel(), 0))
    if dh is not None:
        dh_out = dh.new_empty((splits_t * blocks_n, coefficients), dtype=torch.float32)
        sums.append(Sum(dh_out, dh, coefficients, 0))
    launch(
        contract_kernel,
        (blocks_n, parts),
        left_ptr=left,
        x_ptr=x,
        f_ptr=rows,
        h_ptr=factor.h,
        df_ptr=df_out,
        dh_ptr=dh_out,
        scale=scale * dropout.keep_scale,
        T=T,
        N=N,
        lanes=lanes,
        coefficients=coefficients,
        t_per_split=t_per_split,
        stride_left_t=left.stride(0),
        stride_left_k=left.stride(1),
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=rows.stride(0),
        stride_f_n=rows.stride(1),
        stride_df_split=rows.shape[0] * N,
        stride_df_r=0 if df is None else df.stride(0),
        stride_df_n=0 if df is None else df.stride(1),
        HAS_H=factor.h is not None,
        HAS_DF=df is not None,
        HAS_DH=dh is not None,
        PRECISION=dot_precision(x.dtype),
        PIECES=pieces,
        BLOCK_R=tiles.shrink(1 << 30, rows.shape[0]),
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        **factor.constants(),
        **tile.options(),
        **dropout.arguments(),
    )
    return sums
