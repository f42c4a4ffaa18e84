"""Launchers: shapes to grids, splits and workspaces. One function per kernel, two-dimensional
tensors in.

A ``factor`` argument is ``(R, N)`` with any strides: ``A`` itself, or ``B.t()``. Importing this
file imports Triton.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton

from . import configs
from .dropout import drop_threshold
from .kernels.accumulate import accumulate_kernel
from .kernels.compose import compose_kernel
from .kernels.contract import contract_kernel
from .kernels.project import project_kernel
from .kernels.reduce import sum_partials_kernel
from .terms import Terms, coefficient_count, expanded_rank

__all__ = ["Dropout", "accumulate", "compose", "contract", "project"]

SUM_BLOCK_P = 16
SUM_BLOCK = 128


@dataclass(frozen=True)
class Dropout:
    """A probability and the seed tensor that chooses the mask."""

    p: float
    seed: torch.Tensor | None

    def arguments(self) -> dict[str, object]:
        return {
            "seed_ptr": self.seed,
            "drop_threshold": drop_threshold(self.p),
            "HAS_DROPOUT": self.active,
        }

    @property
    def active(self) -> bool:
        return self.p > 0.0

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


NO_DROPOUT = Dropout(0.0, None)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current while its kernels launch; nothing to do for the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless PyTorch's own setting allows tf32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def addressable(factor: torch.Tensor) -> torch.Tensor:
    """The factor, copied if its strides reach past the 32-bit offsets the kernels use for it."""
    reach = sum((n - 1) * s for n, s in zip(factor.shape, factor.stride(), strict=True))
    return factor if reach < 2**31 else factor.contiguous()


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out = partial.sum(0) in a fixed order; ``out`` is dense and laid out like ``partial[0]``."""
    numel = out.numel()
    sum_partials_kernel[(triton.cdiv(numel, SUM_BLOCK),)](
        partial_ptr=partial,
        out_ptr=out,
        parts=partial.shape[0],
        numel=numel,
        BLOCK_P=SUM_BLOCK_P,
        BLOCK=SUM_BLOCK,
    )


def project(
    x: torch.Tensor, factor: torch.Tensor, *, terms: Terms, dropout: Dropout = NO_DROPOUT
) -> torch.Tensor:
    """u = dropout(x) φ(factor)ᵀ: x ``(T, N)``, factor ``(R, N)`` -> ``(T, K)``, circular order."""
    factor = addressable(factor)
    (T, N), R = x.shape, factor.shape[0]
    K = expanded_rank(R, terms)
    tile = configs.tile_for("project", x.dtype, factor.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, K)
    tiles = triton.cdiv(T, block_t) * triton.cdiv(K, block_k)
    # Drawing the dropout seed is a launch of its own: then no second one for a sum over splits.
    wanted = 1 if dropout.active else configs.processor_count(x.device) // tiles
    splits, n_per_split = configs.split(N, wanted, 2 * tile.block_n)
    u = torch.empty(T, K, dtype=x.dtype, device=x.device)
    out = u if splits == 1 else u.new_empty((splits, T, K), dtype=torch.float32)
    project_kernel[(tiles, splits)](
        x_ptr=x,
        f_ptr=factor,
        u_ptr=out,
        keep_scale=dropout.keep_scale,
        T=T,
        N=N,
        K=K,
        n_per_split=n_per_split,
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=factor.stride(0),
        stride_f_n=factor.stride(1),
        stride_u_split=T * K,
        stride_u_t=K,
        R=R,
        TERMS=terms,
        PRECISION=dot_precision(x.dtype),
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        **tile.options(),
        **dropout.arguments(),
    )
    if splits > 1:
        sum_partials(out, u)
    return u


def accumulate(
    base: torch.Tensor | None,
    u: torch.Tensor,
    factor: torch.Tensor,
    h: torch.Tensor | None,
    *,
    out: torch.Tensor,
    scale: float,
    terms: Terms,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out = base + s u (c ∘ φ(factor)): base, out ``(T, M)``, unit last stride, maybe the same."""
    factor = addressable(factor)
    (T, K), (R, M) = u.shape, factor.shape
    tile = configs.tile_for("accumulate", u.dtype, factor.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, K)
    accumulate_kernel[(triton.cdiv(T, block_t) * triton.cdiv(M, tile.block_n),)](
        base_ptr=base,
        u_ptr=u,
        f_ptr=factor,
        h_ptr=None if h is None else h.contiguous(),
        y_ptr=out,
        scale=scale,
        keep_scale=dropout.keep_scale,
        T=T,
        M=M,
        K=K,
        stride_base_t=0 if base is None else base.stride(0),
        stride_u_t=u.stride(0),
        stride_f_r=factor.stride(0),
        stride_f_m=factor.stride(1),
        stride_y_t=out.stride(0),
        R=R,
        TERMS=terms,
        HAS_BASE=base is not None,
        PRECISION=dot_precision(u.dtype),
        BLOCK_T=block_t,
        BLOCK_M=tile.block_n,
        BLOCK_K=block_k,
        **tile.options(),
        **dropout.arguments(),
    )


def contract(
    left: torch.Tensor,
    x: torch.Tensor,
    factor: torch.Tensor,
    h: torch.Tensor | None,
    *,
    df: torch.Tensor | None,
    dh: torch.Tensor | None,
    scale: float,
    terms: Terms,
    left_is_factor: bool = False,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """Contract dφ = s leftᵀ dropout(x) into df ``(R, N)`` (dense, any layout) and dh ``(L,)``.

    left is ``(T, K)`` in circular order, or a factor ``(R, T)`` whose expansion is meant; x is
    ``(T, N)``.
    """
    factor = addressable(factor)
    left = addressable(left) if left_is_factor else left
    (T, N), R = x.shape, factor.shape[0]
    K, L = expanded_rank(R, terms), coefficient_count(R, terms)
    kernel = "contract_factor" if left_is_factor else "contract"
    tile = configs.tile_for(kernel, x.dtype, factor.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, K)
    blocks_n = triton.cdiv(N, tile.block_n)
    processors = configs.processor_count(x.device)
    splits_t, t_per_split = configs.split(T, 2 * processors // blocks_n, 4 * block_t)
    splits_k, k_per_split = configs.split(K, processors // (blocks_n * splits_t), block_k)
    parts = splits_t * splits_k
    df_out, dh_out = df, dh
    if df is not None and parts > 1:
        df_out = df.new_empty((parts, df.numel()), dtype=torch.float32)
    if dh is not None:
        dh_out = dh.new_empty((splits_t * blocks_n, L), dtype=torch.float32)
    contract_kernel[(blocks_n, parts)](
        left_ptr=left,
        x_ptr=x,
        f_ptr=factor,
        h_ptr=None if h is None else h.contiguous(),
        df_ptr=df_out,
        dh_ptr=dh_out,
        scale=scale * dropout.keep_scale,
        T=T,
        N=N,
        K=K,
        L=L,
        t_per_split=t_per_split,
        k_per_split=k_per_split,
        splits_k=splits_k,
        stride_left_t=left.stride(1) if left_is_factor else left.stride(0),
        stride_left_r=left.stride(0) if left_is_factor else 0,
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=factor.stride(0),
        stride_f_n=factor.stride(1),
        stride_df_split=R * N,
        stride_df_r=0 if df is None else df.stride(0),
        stride_df_n=0 if df is None else df.stride(1),
        R=R,
        TERMS=terms,
        LEFT_IS_FACTOR=left_is_factor,
        HAS_DF=df is not None,
        HAS_DH=dh is not None,
        PRECISION=dot_precision(x.dtype),
        BLOCK_R=configs.shrink(1 << 30, R),
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        **tile.options(),
        **dropout.arguments(),
    )
    if df is not None and df_out is not None and parts > 1:
        sum_partials(df_out, df)
    if dh is not None and dh_out is not None:
        sum_partials(dh_out, dh)


def compose(
    base: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    *,
    scale: float,
    terms: Terms,
    dtype: torch.dtype,
) -> torch.Tensor:
    """base + s φ(B) diag(c) φ(A): A ``(R, N)``, B ``(M, R)``, base ``(M, N)`` -> ``(M, N)``."""
    A, B = addressable(A), addressable(B)
    (R, N), M = A.shape, B.shape[0]
    w = torch.empty(M, N, dtype=dtype, device=A.device)
    tile = configs.tile_for("compose", dtype, A.dtype)
    K = expanded_rank(R, terms)
    compose_kernel[(triton.cdiv(M, tile.block_t) * triton.cdiv(N, tile.block_n),)](
        base_ptr=base,
        a_ptr=A,
        b_ptr=B,
        h_ptr=None if h is None else h.contiguous(),
        w_ptr=w,
        scale=scale,
        M=M,
        N=N,
        K=K,
        stride_base_m=0 if base is None else base.stride(0),
        stride_base_n=0 if base is None else base.stride(1),
        stride_a_r=A.stride(0),
        stride_a_n=A.stride(1),
        stride_b_m=B.stride(0),
        stride_b_r=B.stride(1),
        stride_w_m=w.stride(0),
        R=R,
        TERMS=terms,
        HAS_BASE=base is not None,
        PRECISION=dot_precision(dtype),
        BLOCK_M=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=configs.shrink(tile.block_k, K),
        **tile.options(),
    )
    return w
