import triton
import triton.language as tl

from .common import dot, load_coefficients, load_phi, overflow_as, pair_lanes, round_to


@triton.jit
def compose_kernel(
    base_ptr,
    a_ptr,
    b_ptr,
    h_ptr,
    w_ptr,
    scale,
    M,
    N,
    K,
    stride_base_m,
    stride_base_n,
    stride_a_r,
    stride_a_n,
    stride_b_m,
    stride_b_r,
    stride_w_m,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w = base + s · φ(b) diag(c) φ(a), tiles of both expansions generated on chip.

    a (R, N), b (M, R), base and w (M, N). Accumulates in float32; φ(b) diag(c) and φ(a) are formed
    in float32 and rounded once to the dtype of w; w is rounded once.
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
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        i, j, is_pair = pair_lanes(offs_k, R, TERMS)
        phi_b = load_phi(
            b_ptr,
            i[None, :],
            j[None, :],
            is_pair[None, :],
            offs_m[:, None],
            stride_b_r,
            stride_b_m,
            mask_m[:, None] & mask_k[None, :],
            TERMS,
        )
        phi_b *= load_coefficients(h_ptr, i, j, is_pair, mask_k, R, TERMS)[None, :]
        phi_a = load_phi(
            a_ptr,
            i[:, None],
            j[:, None],
            is_pair[:, None],
            offs_n[None, :],
            stride_a_r,
            stride_a_n,
            mask_k[:, None] & mask_n[None, :],
            TERMS,
        )
        acc = dot(round_to(phi_b, dtype), round_to(phi_a, dtype), acc, PRECISION)

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
