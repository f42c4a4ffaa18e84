import triton
import triton.language as tl

from .common import dot, keep_tile, load_phi, pair_lanes, round_to, row_keys, zero_tiles


@triton.jit
def project_kernel(
    x_ptr,
    f_ptr,
    seed_ptr,
    u_ptr,
    drop_threshold,
    scale,
    T,
    N,
    lanes,
    n_per_split,
    stride_x_t,
    stride_x_n,
    stride_f_r,
    stride_f_n,
    stride_u_split,
    stride_u_t,
    R: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = scale · x̂ φ(f)ᵀ, without the coefficients; x̂ is x with the dropped elements zero.

    x (T, N), f (MEMBERS · R, N) -> u (T, lanes) in circular order, zero in unused lanes. A program
    holds PIECES accumulators of BLOCK_K lanes, so that x is read once for all of them. With several
    splits along N each writes its partial sum to u[split] in float32. Accumulates and scales in
    float32; φ is rounded once to the dtype of x.
    """
    # The lane blocks of a token block are neighbours in launch order: they share x through the L2.
    blocks_k = tl.cdiv(lanes, PIECES * BLOCK_K)
    block_t = tl.program_id(0) // blocks_k
    first_lane = tl.program_id(0) % blocks_k * (PIECES * BLOCK_K)
    split = tl.program_id(1)

    offs_t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    if HAS_DROPOUT:
        key_0, key_1 = row_keys(seed_ptr, offs_t)

    accs = zero_tiles(PIECES, BLOCK_T, BLOCK_K)
    for start in range(split * n_per_split, tl.minimum((split + 1) * n_per_split, N), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.load(
            x_ptr + offs_t[:, None] * stride_x_t + offs_n.to(tl.int64)[None, :] * stride_x_n,
            mask=mask_t[:, None] & mask_n[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = keep_tile(key_0, key_1, start, drop_threshold, BLOCK_N)
            x = tl.where(keep, x, 0.0)
        sums = ()
        for piece in tl.static_range(PIECES):
            offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
            i, j, is_pair, live = pair_lanes(offs_k, R, K, LANES, MEMBERS, TERMS)
            live = live & (offs_k < lanes)
            phi = load_phi(
                f_ptr,
                i[None, :],
                j[None, :],
                is_pair[None, :],
                offs_n[:, None],
                stride_f_r,
                stride_f_n,
                mask_n[:, None] & live[None, :],
                TERMS,
            )
            sums = sums + (dot(x, round_to(phi, x.dtype), accs[piece], PRECISION),)
        accs = sums

    for piece in tl.static_range(PIECES):
        offs_k = first_lane + piece * BLOCK_K + tl.arange(0, BLOCK_K)
        tl.store(
            u_ptr + split * stride_u_split + offs_t[:, None] * stride_u_t + offs_k[None, :],
            round_to(accs[piece] * scale, u_ptr.dtype.element_ty),
            mask=mask_t[:, None] & (offs_k < lanes)[None, :],
        )
