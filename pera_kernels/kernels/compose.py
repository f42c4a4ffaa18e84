"""The weight-space update W0 + ΔW, or ΔW alone (Eq. 4, 9)."""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import blocks, dot_precision, launch
from .tile_math import dot, overflow_as, round_to

__all__ = ["compose"]


@triton.jit
def compose_kernel(
    base_ptr,
    phi_b_ptr,
    phi_a_ptr,
    w_ptr,
    scale,
    M,
    N,
    lanes,
    stride_base_m,
    stride_base_n,
    stride_w_m,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w = base + s · φ(b)ᵀ φ(a), from φ(b) (lanes, M), the coefficients in it, and φ(a) (lanes, N).

    base and w (M, N). Accumulates in float32; w is rounded once.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    block_m = tl.program_id(0) // tiles_n
    block_n = tl.program_id(0) % tiles_n
    dtype: tl.constexpr = w_ptr.dtype.element_ty

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, lanes, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = (offs_k < lanes)[:, None]
        phi_b = tl.load(
            phi_b_ptr + (offs_k[:, None] * M + offs_m[None, :]),
            mask=mask_k & mask_m[None, :],
            other=0.0,
        )
        phi_a = tl.load(
            phi_a_ptr + (offs_k[:, None] * N + offs_n[None, :]),
            mask=mask_k & mask_n[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(phi_b), phi_a, acc, PRECISION)

    acc = overflow_as(acc, dtype) * scale
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    if HAS_BASE:
        base = tl.load(
            base_ptr + rows * stride_base_m + offs_n.to(tl.int64)[None, :] * stride_base_n,
            mask=mask,
            other=0.0,
        )
        acc += base.to(tl.float32)
    tl.store(w_ptr + rows * stride_w_m + offs_n[None, :], round_to(acc, dtype), mask=mask)


def compose(
    base: torch.Tensor | None, phi_b: torch.Tensor, phi_a: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """base + s φ(B) diag(c) φ(A) ``(M, N)``, from φ(b) ``(lanes, M)`` with the coefficients in it,
    φ(a) ``(lanes, N)`` and base ``(M, N)``.
    """
    (lanes, N), M = phi_a.shape, phi_b.shape[1]
    w = phi_a.new_empty(M, N)
    tile = tiles.tile_for("compose", w.device, w.dtype, w.dtype)
    launch(
        compose_kernel,
        (blocks(M, tile.block_t) * blocks(N, tile.block_n),),
        base_ptr=base,
        phi_b_ptr=phi_b,
        phi_a_ptr=phi_a,
        w_ptr=w,
        scale=scale,
        M=M,
        N=N,
        lanes=lanes,
        stride_base_m=0 if base is None else base.stride(0),
        stride_base_n=0 if base is None else base.stride(1),
        stride_w_m=w.stride(0),
        HAS_BASE=base is not None,
        PRECISION=dot_precision(w.dtype),
        BLOCK_M=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tiles.shrink(tile.block_k, lanes),
        **tile.options(),
    )
    return w
