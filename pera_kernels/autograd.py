"""The autograd boundary: save what a requested gradient needs, and ask the backend for the
formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backends import implementation
from .terms import Terms

__all__ = ["DeltaWeight", "PeraGroupFunction", "PeraLinearFunction", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What is not a tensor: the scale s, the terms, the dropout probability and how to compute."""

    scale: float
    terms: Terms
    backend: str
    dropout_p: float = 0.0
    composed: bool = False


def in_dtype_of(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """The weight in the dtype of x: under autocast only the original is kept for the backward."""
    return weight if weight is None or weight.dtype == x.dtype else weight.to(x.dtype)


def _wanted(gradients: Any, needs: tuple[bool, ...]) -> list[torch.Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class PeraLinearFunction(torch.autograd.Function):
    """y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ on a frozen dense weight (Eq. 9), or, where
    ``weight`` is None, base_out + s · (…), where base_out came from a base layer that
    differentiates itself.

    x ``(..., N)``, A ``(R, N)``, B ``(M, R)``, h ``(L,)`` or None. Keeps x only for dA (and where u
    has to be made again), u ``(T, K)`` only for dB and dh, and the parameters.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, base_out, A, B, h, seed, settings):
        s = settings
        y, u = implementation(s.backend).linear_forward(
            x,
            in_dtype_of(x, weight),
            in_dtype_of(x, bias),
            base_out,
            A,
            B,
            h,
            seed,
            s.scale,
            s.terms,
            s.dropout_p,
            s.composed,
        )
        _, _, _, _, need_A, need_B, need_h, _, _ = ctx.needs_input_grad
        need_u = need_B or need_h
        keep_x = need_A or (need_u and s.composed)
        keep_u = need_u and not s.composed
        ctx.settings = settings
        ctx.save_for_backward(x if keep_x else None, u if keep_u else None, weight, A, B, h, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u, weight, A, B, h, seed = ctx.saved_tensors
        s = ctx.settings
        need_x, _, _, need_base, need_A, need_B, need_h, _, _ = ctx.needs_input_grad
        needs = (need_x, need_A, need_B, need_h)
        if not any(needs):
            return None, None, None, dy if need_base else None, None, None, None, None, None
        gradients = implementation(s.backend).linear_backward(
            dy,
            x,
            u,
            in_dtype_of(dy, weight),
            A,
            B,
            h,
            seed,
            s.scale,
            s.terms,
            s.dropout_p,
            s.composed,
            needs,
        )
        dx, dA, dB, dh = _wanted(gradients, needs)
        return dx, None, None, dy if need_base else None, dA, dB, dh, None, None


class PeraGroupFunction(torch.autograd.Function):
    """:class:`PeraLinearFunction` for G dense layers of one rank that share x: one read of x, one
    accumulated dx, one dropout mask.

    After x, the seed and the settings come weight, bias, A, B and h of every layer; the outputs are
    a tuple of y ``(..., M_g)``. Keeps x only for the dA, u ``(T, G K)`` only for dB and dh, and the
    parameters.
    """

    @staticmethod
    def forward(ctx, x, seed, settings, *layers):
        s = settings
        weights, biases, As, Bs, hs = (list(layers[k::5]) for k in range(5))
        *ys, u = implementation(s.backend).group_forward(
            x,
            [in_dtype_of(x, weight) for weight in weights],
            [in_dtype_of(x, bias) for bias in biases],
            As,
            Bs,
            hs,
            seed,
            s.scale,
            s.terms,
            s.dropout_p,
        )
        needs = [ctx.needs_input_grad[3 + k :: 5] for k in (2, 3, 4)]
        need_A, need_u = any(needs[0]), any(needs[1]) or any(needs[2])
        ctx.settings = settings
        ctx.save_for_backward(
            x if need_A else None, u if need_u else None, seed, *weights, *As, *Bs, *hs
        )
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, u, seed, *rest = ctx.saved_tensors
        G, s = len(dys), ctx.settings
        weights, As, Bs, hs = (rest[k * G : (k + 1) * G] for k in range(4))
        own = [
            need for g in range(G) for need in ctx.needs_input_grad[3 + 5 * g + 2 : 3 + 5 * g + 5]
        ]
        needs = (ctx.needs_input_grad[0], *own)
        if not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        dx, *gradients = _wanted(
            implementation(s.backend).group_backward(
                list(dys),
                x,
                u,
                [in_dtype_of(dys[0], weight) for weight in weights],
                As,
                Bs,
                hs,
                seed,
                s.scale,
                s.terms,
                s.dropout_p,
                needs,
            ),
            needs,
        )
        layers = (gradients[3 * g : 3 * g + 3] for g in range(G))
        return dx, None, None, *(d for layer in layers for d in (None, None, *layer))


class DeltaWeight(torch.autograd.Function):
    """ΔW = s φ(B) diag(1, h) φ(A) ``(M, N)`` (Eq. 4, 9), in the dtype of A."""

    @staticmethod
    def forward(ctx, A, B, h, settings):
        ctx.settings = settings
        ctx.save_for_backward(A, B, h)
        return implementation(settings.backend).delta_forward(
            A, B, h, settings.scale, settings.terms
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        A, B, h = ctx.saved_tensors
        s = ctx.settings
        needs = ctx.needs_input_grad[:3]
        gradients = implementation(s.backend).delta_backward(G, A, B, h, s.scale, s.terms, needs)
        return (*_wanted(gradients, needs), None)
