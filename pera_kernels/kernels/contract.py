import triton
import triton.language as tl

from .common import (
    coefficient_index,
    dot,
    keep_tile,
    load_coefficients,
    load_phi,
    pair_lanes,
    round_to,
    row_keys,
    select_rows,
)


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
    K,
    L,
    t_per_split,
    k_per_split,
    splits_k,
    stride_left_t,
    stride_left_r,
    stride_x_t,
    stride_x_n,
    stride_f_r,
    stride_f_n,
    stride_df_split,
    stride_df_r,
    stride_df_n,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    LEFT_IS_FACTOR: tl.constexpr,
    HAS_DF: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dφ = s leftᵀ x̂, contracted at once to df and dh:

        df_i  = dφ_i + Σ_j c_ij (dφ_ij ∘ f_j)        a square counts twice
        dh_ij = Σ_n (dφ_ij ∘ f_i ∘ f_j)

    left (T, K) in circular order, or φ(left) of a factor (R, T) generated on chip; x (T, N); f (R,
    N). Each (T, K) split writes partial sums: df[split] (R, N), dh[split_t, block_n] (L,), both
    float32. dφ stays on chip; its float32 rows are sent to the rows i and j of df by a product with
    the 0/1 incidence matrix of the pairs.
    """
    block_n = tl.program_id(0)
    split = tl.program_id(1)
    split_t = split // splits_k
    split_k = split % splits_k

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_columns = offs_n.to(tl.int64)[None, :] * stride_x_n
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    start_t = split_t * t_per_split
    stop_t = tl.minimum(start_t + t_per_split, T)

    df = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start_k in range(
        split_k * k_per_split, tl.minimum((split_k + 1) * k_per_split, K), BLOCK_K
    ):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        i, j, is_pair = pair_lanes(offs_k, R, TERMS)

        acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for start in range(start_t, stop_t, BLOCK_T):
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
                keep = keep_tile(key_0[:, None], key_1[:, None], offs_n[None, :], drop_threshold)
                x = tl.where(keep, x, 0.0)
            mask_kt = mask_k[:, None] & mask_t[None, :]
            if LEFT_IS_FACTOR:
                phi = load_phi(
                    left_ptr,
                    i[:, None],
                    j[:, None],
                    is_pair[:, None],
                    offs_t[None, :],
                    stride_left_r,
                    stride_left_t,
                    mask_kt,
                    TERMS,
                )
                left = round_to(phi, x.dtype)
            else:
                left = tl.load(
                    left_ptr + offs_k[:, None] + rows[None, :] * stride_left_t,
                    mask=mask_kt,
                    other=0.0,
                )
            acc = dot(left, x, acc, PRECISION)
        acc *= scale

        mask_kn = mask_k[:, None] & mask_n[None, :]
        at_n = offs_n[None, :] * stride_f_n
        f_i = tl.load(f_ptr + i[:, None] * stride_f_r + at_n, mask=mask_kn, other=0.0)
        f_j = tl.load(
            f_ptr + j[:, None] * stride_f_r + at_n, mask=mask_kn & is_pair[:, None], other=1.0
        )
        f_i = f_i.to(tl.float32)
        f_j = f_j.to(tl.float32)
        if HAS_DH:
            dh = tl.sum(acc * f_i * f_j, axis=1)
            row = split_t * tl.num_programs(0) + block_n
            tl.store(
                dh_ptr + row.to(tl.int64) * L + coefficient_index(i, j, R, TERMS),
                dh,
                mask=mask_k & is_pair,
            )
        if HAS_DF:
            acc *= load_coefficients(h_ptr, i, j, is_pair, mask_k, R, TERMS)[:, None]
            df = select_rows(offs_r, i, mask_k, acc * f_j, df)
            if TERMS != "linear":
                df = select_rows(offs_r, j, is_pair, acc * f_i, df)

    if HAS_DF:
        tl.store(
            df_ptr
            + split * stride_df_split
            + offs_r[:, None] * stride_df_r
            + offs_n[None, :] * stride_df_n,
            round_to(df, df_ptr.dtype.element_ty),
            mask=(offs_r < R)[:, None] & mask_n[None, :],
        )
