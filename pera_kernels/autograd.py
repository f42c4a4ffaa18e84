"""The autograd boundary: save what a requested gradient needs, and ask the backend for the
formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backends import implementation
from .operands import Base, Factors, Saved

__all__ = ["DeltaWeight", "PeraFunction"]


def _in_dtype_of(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """The weight in the dtype of x: under autocast only the original is kept for the backward."""
    return weight if weight is None or weight.dtype == x.dtype else weight.to(x.dtype)


def in_dtype_of(x: torch.Tensor, base: Base) -> Base:
    """The base with its weight and bias in the dtype of x."""
    return Base(_in_dtype_of(x, base.weight), _in_dtype_of(x, base.bias), base.out)


def _wanted(gradients: Any, needs: tuple[bool, ...]) -> list[torch.Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class PeraFunction(torch.autograd.Function):
    """y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ on a frozen dense weight (Eq. 9), or, where
    ``weight`` is None, out + s · (…), where ``out`` came from a base layer that differentiates
    itself.

    x ``(T, N)``, y and out ``(T, M)``, A ``(R, N)``, B ``(M, R)``, h ``(L,)`` or None.
    ``computed`` is (y, u) where the forward was computed already, together with other layers on the
    same x; each layer has a node of its own, so that gradients flow as they do for layers apart.
    Keeps x only for dA (and where u has to be made again), u ``(T, K)`` only for dB and dh, and the
    parameters.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, out, A, B, h, seed, options, computed=None):
        if computed is None:
            base = in_dtype_of(x, Base(weight, bias, out))
            backend = implementation(options.backend)
            (y,), (u,) = backend.forward(x, [base], [Factors(A, B, h)], seed, options)
        else:
            y, u = computed
        need_A, need_B, need_h = ctx.needs_input_grad[4:7]
        need_u, composed = need_B or need_h, options.plan == "composed"
        keep_x = need_A or (need_u and composed)
        keep_u = need_u and not composed
        ctx.options = options
        ctx.save_for_backward(x if keep_x else None, u if keep_u else None, weight, A, B, h, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u, weight, A, B, h, seed = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:7])
        gradients: Any = (None,) * 4
        if any(needs):
            saved = Saved(x, u, _in_dtype_of(dy, weight), Factors(A, B, h), seed)
            backend = implementation(ctx.options.backend)
            gradients = backend.backward(dy, saved, ctx.options, needs)
        dx, dA, dB, dh = _wanted(gradients, needs)
        dout = dy if ctx.needs_input_grad[3] else None
        return dx, None, None, dout, dA, dB, dh, None, None, None


class DeltaWeight(torch.autograd.Function):
    """ΔW = s φ(B) diag(1, h) φ(A) ``(M, N)`` (Eq. 4, 9), in the dtype of A."""

    @staticmethod
    def forward(ctx, A, B, h, options):
        ctx.options = options
        ctx.save_for_backward(A, B, h)
        return implementation(options.backend).delta_forward(Factors(A, B, h), options)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        needs = ctx.needs_input_grad[:3]
        backend = implementation(ctx.options.backend)
        gradients = backend.delta_backward(G, Factors(*ctx.saved_tensors), ctx.options, needs)
        return (*_wanted(gradients, needs), None)
