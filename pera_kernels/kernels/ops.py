"""The Triton backend: a forward, a backward, and ΔW with its gradients.

Where something traces (``torch.compile``, fake tensors, tensor subclasses) they run as
``torch.library`` ops with fakes; elsewhere they are called directly, which costs the host less.
Importing this file imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import cast

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..operands import Base, Factors, Options, Saved
from ..terms import Terms, padded
from . import steps
from .plan import run

__all__ = ["backward", "delta_backward", "delta_forward", "forward"]

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    x: torch.Tensor,
    bases: Sequence[Base],
    adapters: Sequence[Factors],
    seed: torch.Tensor | None,
    options: Options,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y ``(T, M)`` and u ``(T, lanes)`` of each of the layers that share x.

    They have one rank. Dropout and a composed plan, whose u is empty, are for one layer alone.
    """
    if len(bases) == 1 and _traced(x, *bases[0], *adapters[0]):
        (base,), (adapter,), o = bases, adapters, options
        composed = o.plan == "composed"
        y, u = forward_op(x, *base, *adapter, seed, o.scale, o.terms, o.dropout_p, composed)
        return [y], [u]
    found = run(steps.forward, [x, seed, *chain(*bases), *chain(*adapters)], options)
    return found[: len(bases)], found[len(bases) :]


def backward(
    dy: torch.Tensor,
    saved: Saved,
    options: Options,
    needs: Sequence[bool],
    onto: torch.Tensor | None = None,
) -> Gradients:
    """(dx, dA, dB, dh) of one layer, those of ``needs``, from dy ``(T, M)``; the others are empty.

    dx is the adapter's part alone where there is no dense weight. It is added in place to ``onto``
    ``(T, N)``, the gradient of other layers on the same x, if there is one.
    """
    (x, u, weight, adapter, seed), o = saved, options
    if _traced(dy, x, u, weight, *adapter):
        rest = (o.scale, o.terms, o.dropout_p, o.plan == "composed", list(needs))
        dx, *others = backward_op(dy, x, u, weight, *adapter, seed, *rest)
        return dx if onto is None else onto.add_(dx), *others
    tensors = [dy, x, u, weight, *adapter, seed, onto]
    dx, dA, dB, dh = run(steps.backward, tensors, options, tuple(needs))
    return dx, dA, dB, dh


def delta_forward(adapter: Factors, options: Options) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    if _traced(*adapter):
        return delta_forward_op(*adapter, options.scale, options.terms)
    (delta,) = run(steps.delta_forward, adapter, options)
    return delta


def delta_backward(
    G: torch.Tensor, adapter: Factors, options: Options, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    if _traced(G, *adapter):
        return delta_backward_op(G, *adapter, options.scale, options.terms, list(needs))
    dA, dB, dh = run(steps.delta_backward, [G, *adapter], options, tuple(needs))
    return dA, dB, dh


def _traced(*tensors: torch.Tensor | None) -> bool:
    """Whether a registered op has to stand for the launches."""
    plain = (torch.Tensor, torch.nn.Parameter, type(None))
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(t) not in plain for t in tensors)
    )


def _options(terms: str, scale: float, dropout_p: float = 0.0, composed: bool = False) -> Options:
    plan = "composed" if composed else "factored"
    return Options(cast(Terms, terms), scale, dropout_p, plan, "triton")


@torch.library.custom_op("pera_kernels::forward", mutates_args=())
def forward_op(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    terms: str,
    dropout_p: float,
    composed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = _options(terms, scale, dropout_p, composed)
    y, u = run(steps.forward, [x, seed, weight, bias, out, A, B, h], options)
    return y, u


@forward_op.register_fake
def _(x, weight, bias, out, A, B, h, seed, scale, terms, dropout_p, composed):
    lanes = padded(A.shape[0] + (0 if h is None else h.shape[0]))
    u = x.new_empty(0) if composed else x.new_empty(x.shape[0], lanes)
    return x.new_empty(x.shape[0], B.shape[0]), u


@torch.library.custom_op("pera_kernels::backward", mutates_args=())
def backward_op(
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
    options = _options(terms, scale, dropout_p, composed)
    tensors = [dy, x, u, weight, A, B, h, seed, None]
    dx, dA, dB, dh = run(steps.backward, tensors, options, tuple(needs))
    return dx, dA, dB, dh


@backward_op.register_fake
def _(dy, x, u, weight, A, B, h, seed, scale, terms, dropout_p, composed, needs):
    dx = dy.new_empty((dy.shape[0], A.shape[1]) if needs[0] else 0)
    return (dx, *steps.gradients(dy, (A, B, h), needs[1:]))


@torch.library.custom_op("pera_kernels::delta_forward", mutates_args=())
def delta_forward_op(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: str
) -> torch.Tensor:
    (delta,) = run(steps.delta_forward, [A, B, h], _options(terms, scale))
    return delta


@delta_forward_op.register_fake
def _(A, B, h, scale, terms):
    return A.new_empty(B.shape[0], A.shape[1])


@torch.library.custom_op("pera_kernels::delta_backward", mutates_args=())
def delta_backward_op(
    G: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dA, dB, dh = run(steps.delta_backward, [G, A, B, h], _options(terms, scale), tuple(needs))
    return dA, dB, dh


@delta_backward_op.register_fake
def _(G, A, B, h, scale, terms, needs):
    return tuple(steps.gradients(G, (A, B, h), needs))
