import triton
import triton.language as tl

from .common import dot, overflow_as, round_to


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
