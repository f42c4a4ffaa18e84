"""The Triton backend: ``torch.library`` ops over the launchers, with fakes.

Four coarse ops: the linear layer forward and backward, and the weight-space ΔW forward and
    backward.
Outputs nobody asked for are empty tensors. Triton is imported at the first launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F

from .terms import Terms, expanded_rank

__all__ = ["delta_backward", "delta_forward", "linear_backward", "linear_forward"]


def _launch() -> ModuleType:
    """The launchers; importing them imports Triton, which not everybody has."""
    from . import launch

    return launch


def tokens(x: torch.Tensor) -> torch.Tensor:
    """All leading dimensions flattened: ``(..., N)`` -> ``(T, N)``; a view where the strides allow
    it.
    """
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _empty(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0)


def _gradients(
    like: torch.Tensor, parameters: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """Uninitialised contiguous gradients of those parameters that need one; empty tensors else."""
    return tuple(
        p.new_empty(p.shape) if need and p is not None else _empty(like)
        for p, need in zip(parameters, needs, strict=True)
    )


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    """The same ``(T, M)`` values with a unit last stride: the accumulate kernel assumes it."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("pera_kernels::linear_forward", mutates_args=())
def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    base_out: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    terms: str,
    dropout_p: float,
    composed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, u): y on a dense ``weight`` or a base layer's output; u ``(T, K)``, empty if composed."""
    launch, kind = _launch(), cast(Terms, terms)
    with launch.on_device(x):
        if composed:
            assert weight is not None
            merged = launch.compose(weight, A, B, h, scale=scale, terms=kind, dtype=weight.dtype)
            return F.linear(x, merged, bias), _empty(x)
        if weight is not None:
            y = F.linear(x, weight, bias)
            if not y.is_contiguous():
                y = y.contiguous()
            base = y
        else:
            assert base_out is not None
            y = torch.empty_like(base_out, memory_format=torch.contiguous_format)
            base = base_out
        if y.numel() == 0 or x.shape[-1] == 0:
            u = x.new_zeros(tokens(x).shape[0], expanded_rank(A.shape[0], kind))
            return (y if weight is not None else base.clone()), u
        u = launch.project(tokens(x), A, terms=kind, dropout=launch.Dropout(dropout_p, seed))
        launch.accumulate(
            _rows_dense(tokens(base)), u, B.t(), h, out=tokens(y), scale=scale, terms=kind
        )
    return y, u


@linear_forward.register_fake
def _(x, weight, bias, base_out, A, B, h, seed, scale, terms, dropout_p, composed):
    K = A.shape[0] + (0 if h is None else h.shape[0])
    u = x.new_empty(0) if composed else x.new_empty(x.shape[:-1].numel(), K)
    return x.new_empty((*x.shape[:-1], B.shape[0])), u


@torch.library.custom_op("pera_kernels::linear_backward", mutates_args=())
def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    terms: str,
    dropout_p: float,
    composed: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dA, dB, dh), those of ``needs``; dx is the adapter's part alone where ``weight`` is
    None.
    """
    launch, kind = _launch(), cast(Terms, terms)
    need_x, need_A, need_B, need_h = needs
    dA, dB, dh = _gradients(dy, (A, B, h), needs[1:])
    dropout = launch.Dropout(dropout_p, seed)
    N, rows = A.shape[1], tokens(dy)
    with launch.on_device(dy):
        dx = _empty(dy)
        if need_x:
            dx = _base_dx(dy, weight, A, B, h, scale, kind, composed)
        if dy.numel() == 0 or N == 0:
            return dx.zero_(), dA.zero_(), dB.zero_(), dh.zero_()

        v = None
        if (need_x and not composed) or need_A:
            v = launch.project(rows, B.t(), terms=kind)
        if need_x and not composed:
            launch.accumulate(
                tokens(dx) if weight is not None else None,
                v,
                A,
                h,
                out=tokens(dx),
                scale=scale,
                terms=kind,
                dropout=dropout,
            )
        # dh comes with the contraction to dB, from u and dy: it never asks for x.
        need_h = need_h and dh.numel() > 0
        if need_B or need_h:
            if u is None:
                assert x is not None
                u = launch.project(tokens(x), A, terms=kind, dropout=dropout)
            launch.contract(
                u,
                rows,
                B.t(),
                h,
                df=dB.t() if need_B else None,
                dh=dh if need_h else None,
                scale=scale,
                terms=kind,
            )
        if need_A:
            assert x is not None
            launch.contract(
                v,
                tokens(x),
                A,
                h,
                df=dA,
                dh=None,
                scale=scale,
                terms=kind,
                dropout=dropout,
            )
    return dx, dA, dB, dh


def _base_dx(dy, weight, A, B, h, scale, terms, composed) -> torch.Tensor:
    """dy W, of the base weight or of the composed one; uninitialised where there is no dense
    weight.
    """
    if weight is None:
        return dy.new_empty((*dy.shape[:-1], A.shape[1]))
    if composed:
        weight = _launch().compose(weight, A, B, h, scale=scale, terms=terms, dtype=weight.dtype)
    return torch.matmul(dy, weight)


@linear_backward.register_fake
def _(dy, x, u, weight, A, B, h, seed, scale, terms, dropout_p, composed, needs):
    dx = dy.new_empty((*dy.shape[:-1], A.shape[1])) if needs[0] else _empty(dy)
    return (dx, *_gradients(dy, (A, B, h), needs[1:]))


@torch.library.custom_op("pera_kernels::delta_forward", mutates_args=())
def delta_forward(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: str
) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    launch = _launch()
    if A.shape[1] == 0 or B.shape[0] == 0:
        return A.new_empty(B.shape[0], A.shape[1])
    with launch.on_device(A):
        return launch.compose(None, A, B, h, scale=scale, terms=cast(Terms, terms), dtype=A.dtype)


@delta_forward.register_fake
def _(A, B, h, scale, terms):
    return A.new_empty(B.shape[0], A.shape[1])


@torch.library.custom_op("pera_kernels::delta_backward", mutates_args=())
def delta_backward(
    G: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    launch, kind = _launch(), cast(Terms, terms)
    need_A, need_B, need_h = needs
    dA, dB, dh = _gradients(G, (A, B, h), needs)
    if G.numel() == 0:
        return dA.zero_(), dB.zero_(), dh.zero_()
    with launch.on_device(G):
        if need_A or need_h:
            launch.contract(
                B.t(),
                G,
                A,
                h,
                df=dA if need_A else None,
                dh=dh if need_h else None,
                scale=scale,
                terms=kind,
                left_is_factor=True,
            )
        if need_B:
            launch.contract(
                A,
                G.t(),
                B.t(),
                h,
                df=dB.t(),
                dh=None,
                scale=scale,
                terms=kind,
                left_is_factor=True,
            )
    return dA, dB, dh


@delta_backward.register_fake
def _(G, A, B, h, scale, terms, needs):
    return _gradients(G, (A, B, h), needs)
