"""The ``torch`` backend: the formulas of the gradients in lean PyTorch, on any device and dtype.

Functions have the signatures of the Triton ops in ``pera_kernels.ops``. Here are the base layers'
products and what the outputs are made of; the adapters' part is in ``lean_adapters``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .lean_adapters import Adapters, add_gradients, add_update
from .lean_factors import (
    coefficient_gradient,
    coefficients,
    contract,
    expand,
    product,
    summed_lane_by_lane,
)
from .ops import tokens
from .terms import Terms

__all__ = [
    "delta_backward",
    "delta_forward",
    "group_backward",
    "group_forward",
    "linear_backward",
    "linear_forward",
]

# With so many tokens the CPU's float32 product x W0ᵀ is faster if its result is transposed.
TRANSPOSED_TOKENS = range(16, 49)


def _base(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W0ᵀ + bias ``(T, M)``, contiguous."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.shape[0] not in TRANSPOSED_TOKENS
    ):
        return F.linear(x, weight, bias).contiguous()
    if bias is None:
        return (weight @ x.t()).t().contiguous()
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t().contiguous()


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
    terms: Terms,
    dropout_p: float,
    composed: bool,
    keep_u: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, u): y on a dense ``weight`` or a base layer's output; u ``(T, K)``, empty if composed or
    not to be kept.

    K is R where h is frozen at zero: its pairs are never formed.
    """
    rows = tokens(x)
    if composed:
        assert weight is not None
        return F.linear(x, _composed_weight(weight, A, B, h, scale, terms), bias), x.new_empty(0)
    if weight is not None:
        y = _base(rows, weight, bias)
    else:
        assert base_out is not None
        y = tokens(base_out.clone(memory_format=torch.contiguous_format))
    adapter = Adapters([A], [B], [h], seed, scale, terms, dropout_p)
    u = add_update([y], rows, adapter, keep_u)
    return y.view(*x.shape[:-1], B.shape[0]), u


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
    terms: Terms,
    dropout_p: float,
    composed: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dA, dB, dh), those of ``needs``; dx is the adapter's part alone where ``weight`` is
    None.
    """
    need_x, *need_parameters = needs
    rows, dx = tokens(dy), None
    if need_x and composed:
        assert weight is not None
        dx = rows @ _composed_weight(weight, A, B, h, scale, terms)
    elif need_x and weight is not None:
        dx = (rows @ weight).contiguous()
    dx, gradients = add_gradients(
        [rows],
        None if x is None else tokens(x),
        u,
        dx,
        Adapters([A], [B], [h], seed, scale, terms, dropout_p),
        need_x and not composed,
        need_parameters,
    )
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], A.shape[1])
    return dx, *gradients


def group_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dropout_p: float,
    keep_u: bool = True,
) -> list[torch.Tensor]:
    """y of every layer of a group that shares x, and u ``(T, G K)`` of all, empty if not to be
    kept; one dropout mask.

    Ranks are equal, out features need not be.
    """
    rows = tokens(x)
    ys = [_base(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    u = add_update(ys, rows, Adapters(As, Bs, hs, seed, scale, terms, dropout_p), keep_u)
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in ys), u]


def group_backward(
    dys: Sequence[torch.Tensor | None],
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dropout_p: float,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """dx, then dA, dB, dh of every layer, those of ``needs``.

    An output that was not used may have None in ``dys``; its layer's gradients are None then.
    """
    used = [g for g, dy in enumerate(dys) if dy is not None]
    gradients: list[torch.Tensor | None] = [None] * len(needs)
    if not used:
        return gradients
    like, *_ = given = [dy for dy in dys if dy is not None]
    rows = [tokens(dy) for dy in given]
    if u is not None and len(used) < len(dys):
        parts = u.tensor_split(len(dys), 1)
        u = torch.cat([parts[g] for g in used], 1)
    dx = None
    if needs[0]:
        dx = (rows[0] @ weights[used[0]]).contiguous()
        for g, dy in zip(used[1:], rows[1:], strict=True):
            dx.addmm_(dy, weights[g])
    adapters = Adapters(
        [As[g] for g in used],
        [Bs[g] for g in used],
        [hs[g] for g in used],
        seed,
        scale,
        terms,
        dropout_p,
    )
    dx, found = add_gradients(
        rows,
        None if x is None else tokens(x),
        u,
        dx,
        adapters,
        needs[0],
        [needs[1 + 3 * g + k] for g in used for k in range(3)],
    )
    for position, g in enumerate(used):
        gradients[1 + 3 * g : 4 + 3 * g] = found[3 * position : 3 * position + 3]
    if dx is not None:
        gradients[0] = dx.view(*like.shape[:-1], dx.shape[1])
    return gradients


def _composed_weight(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: Terms,
) -> torch.Tensor:
    phi_A = expand(A, terms, weight.dtype)
    phi_B = expand(B.t(), terms, weight.dtype, coefficients(h, A.shape[0], 1.0, terms))
    if summed_lane_by_lane(weight.shape, weight.dtype):
        return weight + scale * product(phi_B.t(), phi_A)
    return torch.addmm(weight, phi_B.t(), phi_A, alpha=scale)


def delta_forward(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: Terms
) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    c = coefficients(h, A.shape[0], 1.0, terms)
    # Not in place: torch 2.8 refuses to trace that for what a Function returns.
    return product(expand(B.t(), terms, A.dtype, c).t(), expand(A, terms, A.dtype)) * scale


def delta_backward(
    G: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: Terms,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    need_A, need_B, need_h = needs
    dA = dB = dh = None
    R, phi_A = A.shape[0], expand(A, terms, G.dtype)
    c = coefficients(h, R, 1.0, terms)
    if need_A or need_h:
        dphi_A = expand(B.t(), terms, G.dtype) @ G
        if need_h and h is not None:
            dh = coefficient_gradient(dphi_A.t(), phi_A.t(), h, R, scale, terms)
        if need_A:
            dA = contract(dphi_A.mul_(scale), A, terms, c)
    if need_B:
        dB = contract((phi_A @ G.t()).mul_(scale), B.t(), terms, c).t().contiguous()
    return dA, dB, dh
