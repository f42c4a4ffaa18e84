"""The skinny product u = x φ(f)ᵀ, with φ formed on chip or read from memory."""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import NO_DROPOUT, Dropout, Factor, addressable, dot_precision, launch
from .pair_tiles import load_phi, pair_lanes
from .reduce import Sum
from .tile_math import dot, keep_tile, round_to, row_keys

__all__ = ["project"]


@triton.jit
def project_kernel(
    x_ptr,
    f_ptrs,
    seed_ptr,
    u_ptr,
    drop_threshold,
    scale,
    T,
    N,
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
    FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = scale · x̂ φ(f)ᵀ, without the coefficients; x̂ is x with the dropped elements zero.

    x (T, N), every f (R, N) -> u (T, LANES for each f) in circular order, zero in unused lanes. A
    program has an accumulator for each of PIECES, (first lane, lanes), together BLOCK_K lanes, so
    that x is read once for all of them. With several splits along N each writes its partial sum to
    u[split] in float32. Accumulates and scales in float32; φ is rounded once to the dtype of x.
    """
    # The lane blocks of a token block are neighbours in launch order: they share x through the L2.
    blocks_k = tl.cdiv(LANES, BLOCK_K)
    members: tl.constexpr = len(f_ptrs)
    block_k = tl.program_id(0) % (members * blocks_k)
    block_t = tl.program_id(0) // (members * blocks_k)
    first_lane = block_k % blocks_k * BLOCK_K
    split = tl.program_id(1)
    member = block_k // blocks_k
    f_ptr = f_ptrs[0]
    for other in tl.static_range(1, members):
        f_ptr = tl.where(member == other, f_ptrs[other], f_ptr)

    offs_t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    if HAS_DROPOUT:
        key_0, key_1 = row_keys(seed_ptr, offs_t)

    accs = ()
    for piece in tl.static_range(len(PIECES)):
        accs = accs + (tl.full((BLOCK_T, PIECES[piece][1]), 0.0, tl.float32),)
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
        for piece in tl.static_range(len(PIECES)):
            offs_k = first_lane + PIECES[piece][0] + tl.arange(0, PIECES[piece][1])
            i, j, is_pair, live = pair_lanes(offs_k, R, K, FIRST)
            phi = load_phi(
                f_ptr,
                i[None, :],
                j[None, :],
                is_pair[None, :],
                offs_n[:, None],
                stride_f_r,
                stride_f_n,
                mask_n[:, None] & live[None, :],
                K > R,
            )
            sums = sums + (dot(x, round_to(phi, x.dtype), accs[piece], PRECISION),)
        accs = sums

    for piece in tl.static_range(len(PIECES)):
        offs_k = first_lane + PIECES[piece][0] + tl.arange(0, PIECES[piece][1])
        at_k = (member * LANES + offs_k)[None, :]
        tl.store(
            u_ptr + split * stride_u_split + offs_t[:, None] * stride_u_t + at_k,
            round_to(accs[piece] * scale, u_ptr.dtype.element_ty),
            mask=mask_t[:, None] & (offs_k < LANES)[None, :],
        )


def project(
    x: torch.Tensor,
    factor: Factor,
    *,
    out: torch.Tensor,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    whole: bool = False,
) -> Sum | None:
    """out = s dropout(x) φ(factor)ᵀ: x ``(T, N)``, out ``(T, lanes)`` in circular order, of any row
    stride.

    Where x was split along N, ``out`` is incomplete until the returned sum has run; it is not if
    ``whole``.
    """
    members = tuple(map(addressable, factor.members))
    (T, N), rows, lanes = x.shape, members[0], factor.lanes
    if any(own.stride() != rows.stride() for own in members):
        members = tuple(own.contiguous() for own in members)
        rows = members[0]
    kernel = "project_expanded" if factor.terms == "linear" else "project"
    tile = tiles.tile_for(kernel, x.device, x.dtype, rows.dtype)
    own, processors = lanes // len(members), tiles.processor_count(x.device)
    sizes = (T, N, own, x.element_size(), len(members))
    cut = tiles.projection(tile, *sizes, processors, whole)
    partial = None
    if cut.splits > 1:
        partial = x.new_empty((cut.splits, T, lanes), dtype=torch.float32)
    target = out if partial is None else partial
    launch(
        project_kernel,
        (cut.programs, cut.splits),
        x_ptr=x,
        f_ptrs=members,
        u_ptr=target,
        scale=scale * dropout.keep_scale,
        T=T,
        N=N,
        n_per_split=cut.n_per_split,
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=rows.stride(0),
        stride_f_n=rows.stride(1),
        stride_u_split=T * lanes,
        stride_u_t=target.stride(-2),
        PRECISION=dot_precision(x.dtype),
        PIECES=cut.pieces,
        BLOCK_T=cut.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=cut.block_k,
        **factor.constants(),
        **tile.options(),
        **dropout.arguments(),
    )
    return None if partial is None else Sum(partial, out, lanes, out.stride(0))
