"""The Triton backend: ``torch.library`` ops over the launchers, with fakes.

Coarse ops, one forward and one backward each: the linear layer, a group of linear layers that
share their input, and the weight-space ΔW. Outputs nobody asked for are empty tensors. Triton is
imported at the first launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Optional, cast

import torch
import torch.nn.functional as F

from .terms import Terms, lane_count, padded

__all__ = [
    "delta_backward",
    "delta_forward",
    "group_backward",
    "group_forward",
    "linear_backward",
    "linear_forward",
]


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


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    """The same ``(T, M)`` values with a unit last stride: the accumulate kernel assumes it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(h: torch.Tensor | None) -> torch.Tensor | None:
    return None if h is None else h.contiguous()


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stack_h(hs: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [h for h in hs if h is not None]
    return _dense(_stack(present)) if present else None


def _base_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    base_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, y): the base layer's output, and a contiguous tensor for y that may be the same."""
    if weight is not None:
        y = F.linear(x, weight, bias).contiguous()
        return y, y
    assert base_out is not None
    return base_out, torch.empty_like(base_out, memory_format=torch.contiguous_format)


def _forward(
    x: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor]],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dropout_p: float,
) -> torch.Tensor:
    """y = base + update for layers that share x; returns u ``(T, lanes)`` of all of them."""
    launch, R, rows = _launch(), As[0].shape[0], tokens(x)
    if rows.numel() == 0 or any(y.numel() == 0 for _, y in bases):
        for base, y in bases:
            y.copy_(base)
        return x.new_zeros(rows.shape[0], len(As) * lane_count(R, terms))
    stack = launch.Factor(_stack(As), None, R, terms, len(As))
    sinks = [
        launch.Sink(launch.Factor(B.t(), _dense(h), R, terms), _rows_dense(tokens(base)), tokens(y))
        for (base, y), B, h in zip(bases, Bs, hs, strict=True)
    ]
    source = launch.Source(rows, stack)
    return launch.update([source], sinks, scale=scale, drop_x=launch.Dropout(dropout_p, seed))


def _backward(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    dx: torch.Tensor | None,
    base_dx: torch.Tensor | None,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dropout_p: float,
    needs: Sequence[bool],
) -> None:
    """dx = base_dx + update; dA, dB, dh of every layer into ``gradients``, those of ``needs``."""
    launch, R = _launch(), As[0].shape[0]
    width, dropout = lane_count(R, terms), launch.Dropout(dropout_p, seed)
    rows = [tokens(dy) for dy in dys]
    stack = launch.Factor(_stack(As), _stack_h(hs), R, terms, len(As))
    factors = [launch.Factor(B.t(), _dense(h), R, terms) for B, h in zip(Bs, hs, strict=True)]
    need_A = any(needs[0::3])
    v = None
    if dx is not None or need_A:
        sources = [launch.Source(row, factor) for row, factor in zip(rows, factors, strict=True)]
        sinks = [] if dx is None else [launch.Sink(stack, base_dx, tokens(dx))]
        # s v is rounded, as autograd does to the reference: a small v underflows in float16.
        v = launch.update(sources, sinks, scale_u=scale, drop_out=dropout)
    sums = []
    for g, (row, factor, h) in enumerate(zip(rows, factors, hs, strict=True)):
        # dh comes with the contraction to dB, from u and dy: it never asks for x.
        need_B, need_h = needs[3 * g + 1], needs[3 * g + 2] and h is not None and h.numel() > 0
        if not (need_B or need_h):
            continue
        if u is None:
            assert x is not None
            bare = launch.Factor(stack.rows, None, R, terms, len(As))
            u = launch.update([launch.Source(tokens(x), bare)], [], drop_x=dropout)
        sums += launch.contract(
            u[:, g * width : (g + 1) * width],
            row,
            factor,
            df=gradients[3 * g + 1].t() if need_B else None,
            dh=gradients[3 * g + 2] if need_h else None,
            scale=scale,
        )
    stacked = None
    if need_A:
        assert x is not None and v is not None
        if len(As) == 1:
            targets = [(stack, gradients[0], 0)]
        elif stack.rows.shape[0] <= launch.CONTRACTED_ROWS:
            stacked = torch.empty_like(stack.rows)
            targets = [(stack, stacked, 0)]
        else:
            targets = [
                (launch.Factor(A, _dense(h), R, terms), gradients[3 * g], g * width)
                for g, (A, h) in enumerate(zip(As, hs, strict=True))
                if needs[3 * g]
            ]
        for factor, dA, column in targets:
            own = v[:, column : column + factor.lanes]
            sums += launch.contract(
                own, tokens(x), factor, df=dA, dh=None, scale=1.0, dropout=dropout
            )
    for start in range(0, len(sums), 3):
        launch.sum_partials(sums[start : start + 3])
    if stacked is not None:
        for part, gradient, need in zip(
            stacked.split(R), gradients[0::3], needs[0::3], strict=True
        ):
            if need:
                gradient.copy_(part)


def _gradients(
    like: torch.Tensor, parameters: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Uninitialised contiguous gradients of those parameters that need one; empty tensors else."""
    return [
        p.new_empty(p.shape) if need and p is not None else _empty(like)
        for p, need in zip(parameters, needs, strict=True)
    ]


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
    """(y, u): y on a dense ``weight`` or a base layer's output; u ``(T, lanes)``, empty if
    composed.
    """
    kind = cast(Terms, terms)
    with _launch().on_device(x):
        if composed:
            assert weight is not None
            merged = _compose(weight, A, B, h, scale, kind, weight.dtype)
            return F.linear(x, merged, bias), _empty(x)
        base = _base_forward(x, weight, bias, base_out)
        u = _forward(x, [base], [A], [B], [h], seed, scale, kind, dropout_p)
    return base[1], u


@linear_forward.register_fake
def _(x, weight, bias, base_out, A, B, h, seed, scale, terms, dropout_p, composed):
    lanes = padded(A.shape[0] + (0 if h is None else h.shape[0]))
    u = x.new_empty(0) if composed else x.new_empty(x.shape[:-1].numel(), lanes)
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
    kind = cast(Terms, terms)
    gradients = _gradients(dy, (A, B, h), needs[1:])
    with _launch().on_device(dy):
        dx = _empty(dy)
        if needs[0] and weight is None:
            dx = dy.new_empty((*dy.shape[:-1], A.shape[1]))
        elif needs[0] and weight is not None:
            if composed:
                weight = _compose(weight, A, B, h, scale, kind, dy.dtype)
            dx = torch.matmul(dy, weight)
        if dy.numel() == 0 or A.shape[1] == 0:
            dA, dB, dh = (gradient.zero_() for gradient in gradients)
            return dx.zero_(), dA, dB, dh
        updated = dx if needs[0] and not composed else None
        base = None if weight is None or updated is None else tokens(dx)
        _backward(
            [dy],
            x,
            u,
            updated,
            base,
            [A],
            [B],
            [h],
            gradients,
            seed,
            scale,
            kind,
            dropout_p,
            needs[1:],
        )
    dA, dB, dh = gradients
    return dx, dA, dB, dh


@linear_backward.register_fake
def _(dy, x, u, weight, A, B, h, seed, scale, terms, dropout_p, composed, needs):
    dx = dy.new_empty((*dy.shape[:-1], A.shape[1])) if needs[0] else _empty(dy)
    return (dx, *_gradients(dy, (A, B, h), needs[1:]))


@torch.library.custom_op("pera_kernels::group_forward", mutates_args=())
def group_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: list[Optional[torch.Tensor]],  # noqa: UP045
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: list[Optional[torch.Tensor]],  # noqa: UP045
    seed: torch.Tensor | None,
    scale: float,
    terms: str,
    dropout_p: float,
) -> list[torch.Tensor]:
    """y of every layer of a group that shares x, and u ``(T, lanes)`` of all; one dropout mask."""
    with _launch().on_device(x):
        bases = [
            _base_forward(x, weight, bias, None)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        u = _forward(x, bases, As, Bs, hs, seed, scale, cast(Terms, terms), dropout_p)
    return [*(y for _, y in bases), u]


@group_forward.register_fake
def _(x, weights, biases, As, Bs, hs, seed, scale, terms, dropout_p):
    lanes = len(As) * padded(As[0].shape[0] + (0 if hs[0] is None else hs[0].shape[0]))
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return [*ys, x.new_empty(x.shape[:-1].numel(), lanes)]


@torch.library.custom_op("pera_kernels::group_backward", mutates_args=())
def group_backward(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: list[Optional[torch.Tensor]],  # noqa: UP045
    seed: torch.Tensor | None,
    scale: float,
    terms: str,
    dropout_p: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """dx, then dA, dB, dh of every layer, those of ``needs``."""
    parameters = [p for layer in zip(As, Bs, hs, strict=True) for p in layer]
    gradients = _gradients(dys[0], parameters, needs[1:])
    with _launch().on_device(dys[0]):
        dx = None
        if needs[0]:
            dx = torch.matmul(dys[0], weights[0])
            flat = tokens(dx)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                flat.addmm_(tokens(dy), weight)
        if dys[0].numel() == 0 or As[0].shape[1] == 0:
            return [
                _empty(dys[0]) if dx is None else dx.zero_(),
                *(gradient.zero_() for gradient in gradients),
            ]
        _backward(
            dys,
            x,
            u,
            dx,
            None if dx is None else tokens(dx),
            As,
            Bs,
            hs,
            gradients,
            seed,
            scale,
            cast(Terms, terms),
            dropout_p,
            needs[1:],
        )
    return [_empty(dys[0]) if dx is None else dx, *gradients]


@group_backward.register_fake
def _(dys, x, u, weights, As, Bs, hs, seed, scale, terms, dropout_p, needs):
    parameters = [p for layer in zip(As, Bs, hs, strict=True) for p in layer]
    dx = dys[0].new_empty((*dys[0].shape[:-1], As[0].shape[1])) if needs[0] else _empty(dys[0])
    return [dx, *_gradients(dys[0], parameters, needs[1:])]


def _compose(
    base: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dtype: torch.dtype,
) -> torch.Tensor:
    """base + ΔW in ``dtype``."""
    launch, R = _launch(), A.shape[0]
    a, b = launch.Factor(A, None, R, terms), launch.Factor(B.t(), _dense(h), R, terms)
    return launch.compose(base, a, b, scale=scale, dtype=dtype)


@torch.library.custom_op("pera_kernels::delta_forward", mutates_args=())
def delta_forward(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: str
) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    if A.shape[1] == 0 or B.shape[0] == 0:
        return A.new_empty(B.shape[0], A.shape[1])
    with _launch().on_device(A):
        return _compose(None, A, B, h, scale, cast(Terms, terms), A.dtype)


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
    launch, kind, R = _launch(), cast(Terms, terms), A.shape[0]
    need_A, need_B, need_h = needs
    dA, dB, dh = _gradients(G, (A, B, h), needs)
    if G.numel() == 0:
        return dA.zero_(), dB.zero_(), dh.zero_()
    need_h = need_h and dh.numel() > 0
    a, b = (launch.Factor(f, None, R, kind) for f in (A, B.t()))
    with launch.on_device(G):
        phi_b, phi_a = launch.expand([b, a], dtype=G.dtype)
        sums = []
        if need_A or need_h:
            sums += launch.contract(
                phi_b.rows.t(),
                G,
                launch.Factor(A, _dense(h), R, kind),
                df=dA if need_A else None,
                dh=dh if need_h else None,
                scale=scale,
            )
        if need_B:
            sums += launch.contract(
                phi_a.rows.t(),
                G.t(),
                launch.Factor(B.t(), _dense(h), R, kind),
                df=dB.t(),
                dh=None,
                scale=scale,
            )
        launch.sum_partials(sums)
    return dA, dB, dh


@delta_backward.register_fake
def _(G, A, B, h, scale, terms, needs):
    return tuple(_gradients(G, (A, B, h), needs))
