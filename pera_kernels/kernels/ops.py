"""The Triton backend: the launches of a forward, of a backward, and of ΔW with its gradients.

Where something traces (``torch.compile``, fake tensors, tensor subclasses) they run as
``torch.library`` ops with fakes; elsewhere they are called directly, which costs the host less.
Importing this file imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..operands import Base, Factors, Options, Saved
from ..terms import Terms, lane_count, padded
from .accumulate import accumulate
from .compose import compose
from .contract import contract
from .expand import expand
from .launch import Dropout, Factor, in_memory, on_device
from .plan import Tensors, run
from .project import project
from .reduce import Sum, sum_partials

__all__ = ["backward", "delta_backward", "delta_forward", "forward"]

# From so many tokens on φ is put in memory before a projection; with fewer, each of its programs
# forms the φ it needs on chip. Model, from instruction counts of the compiled kernels: forming φ
# for a block of 128 tokens costs the whole GPU 0.25 µs at r=16, n=4096, and reading it from memory
# a share of a launch. From here on a projection also fills the GPU without a split along N.
EXPANDED_TOKENS = 8192
BASE_LAST_TOKENS = 2048

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
    found = run(_forward, [x, seed, *chain(*bases), *chain(*adapters)], options)
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
        return backward_op(dy, x, u, weight, *adapter, seed, *rest)
    tensors = [dy, x, u, weight, *adapter, seed, onto]
    dx, dA, dB, dh = run(_backward, tensors, options, tuple(needs))
    return dx, dA, dB, dh


def delta_forward(adapter: Factors, options: Options) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    if _traced(*adapter):
        return delta_forward_op(*adapter, options.scale, options.terms)
    (delta,) = run(_delta_forward, adapter, options)
    return delta


def delta_backward(
    G: torch.Tensor, adapter: Factors, options: Options, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    if _traced(G, *adapter):
        return delta_backward_op(G, *adapter, options.scale, options.terms, list(needs))
    dA, dB, dh = run(_delta_backward, [G, *adapter], options, tuple(needs))
    return dA, dB, dh


def _traced(*tensors: torch.Tensor | None) -> bool:
    """Whether a registered op has to stand for the launches."""
    plain = (torch.Tensor, torch.nn.Parameter, type(None))
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(t) not in plain for t in tensors)
    )


def _forward(tensors: Tensors, options: Options) -> list[torch.Tensor]:
    """The ys and then the us, from x, the seed, and three tensors of each base and adapter."""
    x, seed, *rest = tensors
    assert x is not None
    threes = [rest[start : start + 3] for start in range(0, len(rest), 3)]
    count = len(threes) // 2
    bases = [Base(*three) for three in threes[:count]]
    adapters = [Factors(*three) for three in threes[count:]]
    with on_device(x.device):
        if options.plan == "composed":
            (base,), (adapter,) = bases, adapters
            assert base.weight is not None
            weight = _compose(base.weight, adapter, options, base.weight.dtype)
            return [F.linear(x, weight, base.bias), x.new_empty(0)]
        r, terms = adapters[0].A.shape[0], options.terms
        starts = [_start(x, base) for base in bases]
        T, lanes = x.shape[0], lane_count(r, terms)
        u = x.new_empty(T, len(bases) * lanes)
        us = [u[:, g * lanes : (g + 1) * lanes] for g in range(len(bases))]
        ys = [y for _, y in starts]
        if x.numel() == 0 or any(y.numel() == 0 for y in ys):
            for base_out, y in starts:
                if base_out is not None:
                    y.copy_(base_out)
            u.zero_()
            return ys + us
        first, *others = (A for A, _, _ in adapters)
        stack = Factor(first, None, r, terms, tuple(others))
        backs = [Factor(B.t(), _dense(h), r, terms) for _, B, h in adapters]
        phis: list[torch.Tensor] = []
        if T >= EXPANDED_TOKENS:
            *phis, phi_stack = expand([*backs, stack], dtype=x.dtype)
            stack = in_memory(phi_stack)
        pending = project(x, stack, out=u, dropout=Dropout(options.dropout_p, seed))
        if phis:
            _finish(pending)
        else:
            phis = expand(backs, pending, dtype=x.dtype)
        for base, (base_out, y), own, phi in zip(bases, starts, us, phis, strict=True):
            accumulate(base_out, own, phi, out=y, scale=options.scale)
            if _comes_last(base.weight, x):
                y.addmm_(x, base.weight.t())
    return ys + us


def _backward(tensors: Tensors, options: Options, needs: Sequence[bool]) -> list[torch.Tensor]:
    """dx, dA, dB, dh from dy and what was saved, flat."""
    dy, x, u, weight, *factors, seed, onto = tensors
    assert dy is not None
    adapter = Factors(*factors)
    (A, B, h), r, terms = adapter, adapter.A.shape[0], options.terms
    need_x, need_A, need_B, need_h = needs
    dA, dB, dh = _gradients(dy, adapter, needs[1:])
    if dy.numel() == 0 or A.shape[1] == 0:
        if onto is None:
            onto = dy.new_zeros((dy.shape[0], A.shape[1]) if need_x else 0)
        return [onto, dA.zero_(), dB.zero_(), dh.zero_()]
    need_h = need_h and dh.numel() > 0
    lanes = lane_count(r, terms)
    dropout = Dropout(options.dropout_p, seed)
    a, b = Factor(A, _dense(h), r, terms), Factor(B.t(), _dense(h), r, terms)
    bare_b = Factor(B.t(), None, r, terms)
    with on_device(dy.device):
        adds = need_x and options.plan != "composed"
        last = adds and _comes_last(weight, dy)
        if need_x and weight is not None and not last:
            own = weight if adds else _compose(weight, adapter, options, dy.dtype)
            dx = onto = dy @ own if onto is None else onto.addmm_(dy, own)
        elif onto is not None:
            dx = onto
        else:
            dx = dy.new_empty((dy.shape[0], A.shape[1]) if need_x else 0)
        if adds or need_A:
            v, phi_a = dy.new_empty(dy.shape[0], lanes), None
            if dy.shape[0] >= EXPANDED_TOKENS:
                phi_b, phi_a = expand([bare_b, a], dtype=dy.dtype)
                bare_b = in_memory(phi_b)
            # s v is rounded, as autograd does to the reference: a small v underflows in float16.
            pending = project(dy, bare_b, out=v, scale=options.scale)
            if not adds or phi_a is not None:
                _finish(pending)
            if adds:
                if phi_a is None:
                    (phi_a,) = expand([a], pending, dtype=dy.dtype)
                accumulate(onto, v, phi_a, out=dx, scale=1.0, dropout=dropout)
                if last:
                    dx.addmm_(dy, weight)
        sums = []
        if need_B or need_h:
            if u is None:
                assert x is not None
                u = dy.new_empty(dy.shape[0], lanes)
                pending = project(x, Factor(A, None, r, terms), out=u, dropout=dropout)
                _finish(pending)
            # dh comes with the contraction to dB, from u and dy: it never asks for x.
            df, dh_out = dB.t() if need_B else None, dh if need_h else None
            sums += contract(u, dy, b, df=df, dh=dh_out, scale=options.scale)
        if need_A:
            assert x is not None
            sums += contract(v, x, a, df=dA, dh=None, scale=1.0, dropout=dropout)
        sum_partials(sums)
    return [dx, dA, dB, dh]


def _delta_forward(tensors: Tensors, options: Options) -> list[torch.Tensor]:
    A, B, _ = adapter = Factors(*tensors)
    if A.shape[1] == 0 or B.shape[0] == 0:
        return [A.new_empty(B.shape[0], A.shape[1])]
    with on_device(A.device):
        return [_compose(None, adapter, options, A.dtype)]


def _delta_backward(
    tensors: Tensors, options: Options, needs: Sequence[bool]
) -> list[torch.Tensor]:
    G, *factors = tensors
    assert G is not None
    adapter = Factors(*factors)
    (A, B, h), r, terms, scale = adapter, adapter.A.shape[0], options.terms, options.scale
    need_A, need_B, need_h = needs
    dA, dB, dh = _gradients(G, adapter, needs)
    if G.numel() == 0:
        return [dA.zero_(), dB.zero_(), dh.zero_()]
    need_h = need_h and dh.numel() > 0
    a, b = Factor(A, _dense(h), r, terms), Factor(B.t(), _dense(h), r, terms)
    with on_device(G.device):
        bare = [Factor(B.t(), None, r, terms), Factor(A, None, r, terms)]
        phi_b, phi_a = expand(bare, dtype=G.dtype)
        sums = []
        if need_A or need_h:
            df, dh_out = dA if need_A else None, dh if need_h else None
            sums += contract(phi_b.t(), G, a, df=df, dh=dh_out, scale=scale)
        if need_B:
            sums += contract(phi_a.t(), G.t(), b, df=dB.t(), dh=None, scale=scale)
        sum_partials(sums)
    return [dA, dB, dh]


def _compose(
    base: torch.Tensor | None, adapter: Factors, options: Options, dtype: torch.dtype
) -> torch.Tensor:
    """base + ΔW in ``dtype``."""
    (A, B, h), r, terms = adapter, adapter.A.shape[0], options.terms
    b, a = Factor(B.t(), _dense(h), r, terms), Factor(A, None, r, terms)
    phi_b, phi_a = expand([b, a], dtype=dtype)
    return compose(base, phi_b, phi_a, scale=options.scale)


def _finish(pending: Sum | None) -> None:
    """Run the sum that completes a projection, where there is one."""
    if pending is not None:
        sum_partials([pending])


def _comes_last(weight: torch.Tensor | None, x: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Whether the update is written first and the product with the base weight added to it by the
    library, which saves a pass over the output.

    Not in float16, where the reference rounds, and overflows, in the order of the other way, and
    not in float32, where an update that is far larger than the base would cost accuracy.
    """
    return (
        weight is not None
        and x.dtype == torch.bfloat16
        and x.shape[0] >= BASE_LAST_TOKENS
        and x.shape[1] > 0
    )


def _start(x: torch.Tensor, base: Base) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the update is added to, and a contiguous tensor for y that may be the same."""
    weight, bias, out = base
    if weight is not None:
        if _comes_last(weight, x):
            y = x.new_empty(x.shape[0], weight.shape[0])
            return None if bias is None else bias.contiguous().expand_as(y), y
        y = F.linear(x, weight, bias).contiguous()
        return y, y
    assert out is not None
    y = torch.empty_like(out, memory_format=torch.contiguous_format)
    # The kernel assumes a unit last stride.
    return out if out.stride(-1) == 1 else out.contiguous(), y


def _dense(h: torch.Tensor | None) -> torch.Tensor | None:
    return None if h is None else h.contiguous()


def _gradients(
    like: torch.Tensor, parameters: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Uninitialised contiguous gradients of those parameters that need one; empty tensors else."""
    return [
        p.new_empty(p.shape) if need and p is not None else like.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    ]


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
    y, u = run(_forward, [x, seed, weight, bias, out, A, B, h], options)
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
    dx, dA, dB, dh = run(_backward, tensors, options, tuple(needs))
    return dx, dA, dB, dh


@backward_op.register_fake
def _(dy, x, u, weight, A, B, h, seed, scale, terms, dropout_p, composed, needs):
    dx = dy.new_empty((dy.shape[0], A.shape[1]) if needs[0] else 0)
    return (dx, *_gradients(dy, (A, B, h), needs[1:]))


@torch.library.custom_op("pera_kernels::delta_forward", mutates_args=())
def delta_forward_op(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: str
) -> torch.Tensor:
    (delta,) = run(_delta_forward, [A, B, h], _options(terms, scale))
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
    dA, dB, dh = run(_delta_backward, [G, A, B, h], _options(terms, scale), tuple(needs))
    return dA, dB, dh


@delta_backward_op.register_fake
def _(G, A, B, h, scale, terms, needs):
    return tuple(_gradients(G, (A, B, h), needs))
