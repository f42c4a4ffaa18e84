"""Add the low-rank product to an output: y = base + s · u φ."""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import NO_DROPOUT, Dropout, blocks, dot_precision, launch
from .tile_math import dot, keep_tile, overflow_as, round_to, row_keys

__all__ = ["accumulate"]


@triton.jit
def accumulate_kernel(
    base_ptr,
    u_ptr,
    phi_ptr,
    seed_ptr,
    y_ptr,
    scale,
    drop_threshold,
    keep_scale,
    T,
    M,
    lanes,
    stride_base_t,
    stride_u_t,
    stride_y_t,
    HAS_BASE: tl.constexpr,
    EARLY_BASE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = base + s · u φ; with dropout the update is masked and rescaled (the backward's dx).

    u (T, lanes), φ (lanes, M) with the coefficients in it, base and y (T, M), which may be the same
    memory. Accumulates in float32; y is rounded once. With EARLY_BASE the base is on its way while
    the products are formed, for more registers.
    """
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    block_t = tl.program_id(0) // tiles_m
    block_m = tl.program_id(0) % tiles_m

    offs_t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    mask_m = offs_m < M
    mask = mask_t[:, None] & mask_m[None, :]

    if HAS_BASE:
        bases = base_ptr + offs_t[:, None] * stride_base_t + offs_m[None, :]
        if EARLY_BASE:
            base = tl.load(bases, mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for start in range(0, lanes, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < lanes
        u = tl.load(
            u_ptr + offs_t[:, None] * stride_u_t + offs_k[None, :],
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )
        phi = tl.load(
            phi_ptr + offs_k.to(tl.int64)[:, None] * M + offs_m[None, :],
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = dot(u, phi, acc, PRECISION)

    # In float16 the specification rounds the product before it is scaled: keep its infinities.
    acc = overflow_as(overflow_as(acc, dtype) * scale, dtype)
    if HAS_DROPOUT:
        key_0, key_1 = row_keys(seed_ptr, offs_t)
        keep = keep_tile(key_0, key_1, block_m * BLOCK_M, drop_threshold, BLOCK_M)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    if HAS_BASE:
        if not EARLY_BASE:
            base = tl.load(bases, mask=mask, other=0.0)
        acc += base.to(tl.float32)
    tl.store(
        y_ptr + offs_t[:, None] * stride_y_t + offs_m[None, :],
        round_to(acc, y_ptr.dtype.element_ty),
        mask=mask,
    )


def accumulate(
    base: torch.Tensor | None,
    u: torch.Tensor,
    phi: torch.Tensor,
    *,
    out: torch.Tensor,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out = base + s u φ: u ``(T, lanes)``, base and out ``(T, M)``, unit last stride, maybe the
    same.
    """
    lanes, M = phi.shape
    T = u.shape[0]
    tile = tiles.tile_for("accumulate", u.device, u.dtype, u.dtype)
    block_t, block_k = tiles.shrink(tile.block_t, T), tiles.shrink(tile.block_k, lanes)
    blocks_t = blocks(T, block_t)
    processors = tiles.processor_count(u.device)
    block_m = tiles.narrow(tile.block_n, M, processors // blocks_t)
    programs = blocks_t * blocks(M, block_m)
    launch(
        accumulate_kernel,
        (programs,),
        base_ptr=base,
        u_ptr=u,
        phi_ptr=phi,
        y_ptr=out,
        scale=scale,
        keep_scale=dropout.keep_scale,
        T=T,
        M=M,
        lanes=lanes,
        stride_base_t=0 if base is None else base.stride(0),
        stride_u_t=u.stride(0),
        stride_y_t=out.stride(0),
        HAS_BASE=base is not None,
        # One program to a multiprocessor: nothing else there hides the wait, nothing needs its
        # registers.
        EARLY_BASE=base is not None and programs <= processors,
        PRECISION=dot_precision(u.dtype),
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **tile.options(),
        **dropout.arguments(),
    )
