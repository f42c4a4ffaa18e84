import triton
import triton.language as tl

from .common import dot, keep_tile, load_phi, pair_lanes, round_to, row_keys


@triton.jit
def project_kernel(
    x_ptr,
    f_ptr,
    seed_ptr,
    u_ptr,
    drop_threshold,
    keep_scale,
    T,
    N,
    K,
    n_per_split,
    stride_x_t,
    stride_x_n,
    stride_f_r,
    stride_f_n,
    stride_u_split,
    stride_u_t,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = x̂ φ(f)ᵀ, without the coefficients; x̂ = dropout(x).

    x (T, N), f (R, N) -> u (T, K) in circular order. With a grid of several splits along N each
    writes its partial sum to u[split] in float32. Accumulates in float32; φ is rounded once to the
    dtype of x.
    """
    # The k tiles of a token block are neighbours in launch order: they share x through the L2.
    tiles_k = tl.cdiv(K, BLOCK_K)
    block_t = tl.program_id(0) // tiles_k
    block_k = tl.program_id(0) % tiles_k
    split = tl.program_id(1)

    offs_t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_t = offs_t < T
    mask_k = offs_k < K
    i, j, is_pair = pair_lanes(offs_k, R, TERMS)
    if HAS_DROPOUT:
        key_0, key_1 = row_keys(seed_ptr, offs_t)

    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(split * n_per_split, tl.minimum((split + 1) * n_per_split, N), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.load(
            x_ptr + offs_t[:, None] * stride_x_t + offs_n.to(tl.int64)[None, :] * stride_x_n,
            mask=mask_t[:, None] & mask_n[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = keep_tile(key_0[:, None], key_1[:, None], offs_n[None, :], drop_threshold)
            x = tl.where(keep, x, 0.0)
        phi = load_phi(
            f_ptr,
            i[None, :],
            j[None, :],
            is_pair[None, :],
            offs_n[:, None],
            stride_f_r,
            stride_f_n,
            mask_n[:, None] & mask_k[None, :],
            TERMS,
        )
        acc = dot(x, round_to(phi, x.dtype), acc, PRECISION)
    if HAS_DROPOUT:
        acc *= keep_scale
    tl.store(
        u_ptr + split * stride_u_split + offs_t[:, None] * stride_u_t + offs_k[None, :],
        round_to(acc, u_ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_k[None, :],
    )
