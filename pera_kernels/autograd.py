"""The autograd boundary: save what a requested gradient needs, and ask the backend for the
formulas.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backends import implementation
from .operands import Base, Factors, Saved, tokens

__all__ = [
    "DeltaWeight",
    "Onto",
    "PeraFunction",
    "SharedInput",
    "autocast_dtype",
    "without_autocast",
]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on such devices; None where it is off ("meta" has none)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Inside, operations keep the dtypes they are given."""
    # Entering torch.autocast costs several microseconds: not where there is nothing to turn off.
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable`` for every second derivative. By itself it lets through one whose
    incoming gradient is constant, and what depends on A, B and h would be left out.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def marked(ctx: Any, gradient: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, gradient)
        if not gradient.requires_grad:
            gradient = gradient.detach().requires_grad_()
        return refusing(ctx, gradient)

    return marked


def _cast(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight in ``dtype``: under autocast only the original is kept for the backward."""
    return weight if weight is None or weight.dtype == dtype else weight.to(dtype)


def rows_of(base: Base, dtype: torch.dtype) -> Base:
    """The base with its weight and bias in ``dtype`` and its output as ``(T, M)``."""
    out = None if base.out is None else tokens(base.out)
    return Base(_cast(base.weight, dtype), _cast(base.bias, dtype), out)


def _wanted(gradients: Any, needs: tuple[bool, ...]) -> list[torch.Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs)]  # noqa: B905


class Onto:
    """The gradient of an x that several layers share: in a backward pass each adds its part to what
    the ones before it returned, in place.
    """

    def __init__(self) -> None:
        # By backward pass: the sum, and how many layers it is of.
        self._sums: dict[int, tuple[torch.Tensor, int]] = {}

    def sum(self) -> torch.Tensor | None:
        """``(T, N)``; None where this pass has come to none of the layers."""
        dx, _ = self._sums.get(torch._C._current_graph_task_id(), (None, 0))
        return dx

    def add(self, dx: torch.Tensor) -> None:
        """One more layer has its part in ``dx``."""
        now = torch._C._current_graph_task_id()
        _, count = self._sums.get(now, (None, 0))
        self._sums[now] = dx, count + 1
        if count == 0:
            # A pass that does not ask for dx never finishes the sum.
            end = functools.partial(self._end, now)
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end(self, ended: int) -> None:
        self._sums.pop(ended, None)

    def finish(self, parts: list[torch.Tensor]) -> bool:
        """Whether these, which this pass has brought to x, are all of the sum and nothing else.

        The sum is let go: autograd copies a gradient that somebody else holds.
        """
        dx, count = self._sums.pop(torch._C._current_graph_task_id())
        return len(parts) == count and all(part.data_ptr() == dx.data_ptr() for part in parts)


class SharedInput(torch.autograd.Function):
    """x once for each of several layers, whose parts of its gradient are added up in ``onto``."""

    @staticmethod
    def forward(ctx, x, count, onto):
        ctx.onto = onto
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for _ in range(count))

    @staticmethod
    def backward(ctx, *gradients):
        parts = [part for part in gradients if part is not None]
        if not ctx.onto.finish(parts):
            raise RuntimeError(
                "a hook on the grad_fn of an adapted layer's output replaced the gradient of an "
                "input that it shares with other layers; pera_kernels.shared_inputs(model, ()) "
                "makes layers compute apart"
            )
        return parts[0], None, None


class PeraFunction(torch.autograd.Function):
    """y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ on a frozen dense weight (Eq. 9), or, where
    ``weight`` is None, out + s · (…), where ``out`` came from a base layer that differentiates
    itself.

    x ``(..., N)``, out ``(..., M)``, A ``(R, N)``, B ``(M, R)``, h ``(L,)`` or None -> ``(T, M)``.
    ``computed`` is (y, u, onto) where the forward was computed already, together with other layers
    on the same x; each layer has a node of its own, so that gradients flow as they do for layers
    apart, but dx is added to ``onto`` if there is one.
    Keeps x only for dA, u ``(T, K)`` only for dB and dh (with ``keep="x"`` and in a composed plan x
    in its place), and the parameters.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, out, A, B, h, seed, options, computed=None):
        if computed is None:
            base = rows_of(Base(weight, bias, out), x.dtype)
            backend = implementation(options.backend)
            (y,), (u,) = backend.forward(tokens(x), [base], [Factors(A, B, h)], seed, options)
            ctx.onto = None
        else:
            y, u, ctx.onto = computed
        need_A, need_B, need_h = ctx.needs_input_grad[4:7]
        need_u = need_B or need_h
        from_x = options.keep == "x" or options.plan == "composed"
        keep_x = need_A or (need_u and from_x)
        keep_u = need_u and not from_x
        ctx.options, ctx.shape = options, x.shape
        ctx.save_for_backward(x if keep_x else None, u if keep_u else None, weight, A, B, h, seed)
        return y

    @staticmethod
    @_once
    def backward(ctx, dy):
        x, u, weight, A, B, h, seed = ctx.saved_tensors
        need_x, _, _, need_out, *rest = ctx.needs_input_grad[:7]
        needs = (need_x, *rest)
        gradients: Any = (None,) * 4
        if any(needs):
            rows = None if x is None else tokens(x)
            saved = Saved(rows, u, _cast(weight, dy.dtype), Factors(A, B, h), seed)
            backend = implementation(ctx.options.backend)
            with without_autocast(dy.device.type):
                if ctx.onto is not None and needs[0]:
                    gradients = backend.backward(dy, saved, ctx.options, needs, ctx.onto.sum())
                    ctx.onto.add(gradients[0])
                else:
                    gradients = backend.backward(dy, saved, ctx.options, needs)
        dx, dA, dB, dh = _wanted(gradients, needs)
        if dx is not None and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        dout = dy.view(*ctx.shape[:-1], dy.shape[1]) if need_out else None
        return dx, None, None, dout, dA, dB, dh, None, None, None


class DeltaWeight(torch.autograd.Function):
    """ΔW = s φ(B) diag(1, h) φ(A) ``(M, N)`` (Eq. 4, 9), in the dtype of A."""

    @staticmethod
    def forward(ctx, A, B, h, options):
        ctx.options = options
        ctx.save_for_backward(A, B, h)
        return implementation(options.backend).delta_forward(Factors(A, B, h), options)

    @staticmethod
    @_once
    def backward(ctx, G):
        backend, adapter = implementation(ctx.options.backend), Factors(*ctx.saved_tensors)
        needs = ctx.needs_input_grad[:3]
        with without_autocast(G.device.type):
            gradients = backend.delta_backward(G, adapter, ctx.options, needs)
        return (*_wanted(gradients, needs), None)
