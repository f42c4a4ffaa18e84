"""What is launched for a forward, a backward, and ΔW with its gradients, on flat lists of tensors.

Plans (``plan.py``) record these: they depend on shapes, strides, dtypes and options alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F

from ..operands import Base, Factors, Options
from ..terms import lane_count
from ..torch_backend import scaled_product
from . import tiles
from .accumulate import accumulate
from .compose import compose
from .contract import Contraction, contract
from .expand import expand
from .launch import NO_DROPOUT, Dropout, Factor, in_memory, on_device
from .plan import Tensors
from .project import project
from .reduce import Sum, sum_partials

__all__ = ["backward", "delta_backward", "delta_forward", "forward", "gradients"]


def forward(tensors: Tensors, options: Options) -> list[torch.Tensor]:
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
        T, lanes = x.shape[0], lane_count(r, terms)
        if x.numel() == 0 or any(B.shape[0] == 0 for _, B, _ in adapters):
            u = x.new_zeros(T, count * lanes)
            return [*(_base(x, base) for base in bases), *u.split(lanes, 1)]
        starts = [_start(x, base) for base in bases]
        first, *others = (A for A, _, _ in adapters)
        stack = Factor(first, None, r, terms, tuple(others))
        backs = [Factor(B.t(), _dense(h), r, terms) for _, B, h in adapters]
        phis: list[torch.Tensor] = []
        whole = tiles.phi_in_memory(x, stack.lanes)
        if whole:
            *phis, phi_stack = expand([*backs, stack], dtype=x.dtype)
            stack = in_memory(phi_stack)
        dropout = Dropout(options.dropout_p, seed)
        choices = tiles.choices(x.device)
        library = whole and _by_library(choices.library_projection, x, dropout)
        u, pending = _projected(x, stack, dropout=dropout, whole=whole, library=library)
        if not whole:
            phis = expand(backs, pending, dtype=x.dtype)
        library = _by_library(choices.library_update, x, dropout)
        us, ys = u.split(lanes, 1), []
        for (weight, _, _), start, own, phi in zip(bases, starts, us, phis, strict=True):
            last = _comes_last(weight, x)
            onto = start if weight is not None and not last else None
            y = _updated(start, own, phi, onto=onto, scale=options.scale, library=library)
            ys.append(y.addmm_(x, weight.t()) if last else y)
    return [*ys, *us]


def backward(tensors: Tensors, options: Options, needs: Sequence[bool]) -> list[torch.Tensor]:
    """dx, dA, dB, dh from dy and what was saved, flat."""
    dy, x, u, weight, *factors, seed, onto = tensors
    assert dy is not None
    adapter = Factors(*factors)
    (A, B, h), r, terms = adapter, adapter.A.shape[0], options.terms
    need_x, need_A, need_B, need_h = needs
    dA, dB, dh = gradients(dy, adapter, needs[1:])
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
        dx = onto
        if need_x and weight is not None and not last:
            own = weight if adds else _compose(weight, adapter, options, dy.dtype)
            dx = onto = dy @ own if onto is None else onto.addmm_(dy, own)
        if adds or need_A:
            whole = tiles.phi_in_memory(dy, lanes)
            choices = tiles.choices(dy.device)
            library = whole and _by_library(choices.library_projection, dy, dropout)
            if whole:
                phi_b, *phi_as = expand([bare_b, a] if adds else [bare_b], dtype=dy.dtype)
                bare_b = in_memory(phi_b)
            # s v is rounded, as autograd does to the reference: a small v underflows in float16.
            v, pending = _projected(dy, bare_b, scale=options.scale, whole=whole, library=library)
            if not adds:
                _finish(pending)
            elif not whole:
                phi_as = expand([a], pending, dtype=dy.dtype)
            if adds:
                (phi_a,) = phi_as
                library = _by_library(choices.library_update, dy, dropout)
                dx = _updated(onto, v, phi_a, onto=onto, dropout=dropout, library=library)
                if last:
                    dx.addmm_(dy, weight)
        if dx is None:
            dx = dy.new_empty(0)
        jobs = []
        if need_B or need_h:
            if u is None:
                assert x is not None
                u = _projected_again(x, Factor(A, None, r, terms), dropout)
            # dh comes with the contraction to dB, from u and dy: it never asks for x.
            df, dh_out = dB.t() if need_B else None, dh if need_h else None
            jobs.append(Contraction(u, dy, b, df, dh_out, options.scale))
        if need_A:
            assert x is not None
            jobs.append(Contraction(v, x, a, dA, None, 1.0, dropout))
        sum_partials(contract(jobs))
    return [dx, dA, dB, dh]


def delta_forward(tensors: Tensors, options: Options) -> list[torch.Tensor]:
    A, B, _ = adapter = Factors(*tensors)
    if A.shape[1] == 0 or B.shape[0] == 0:
        return [A.new_empty(B.shape[0], A.shape[1])]
    with on_device(A.device):
        return [_compose(None, adapter, options, A.dtype)]


def delta_backward(tensors: Tensors, options: Options, needs: Sequence[bool]) -> list[torch.Tensor]:
    G, *factors = tensors
    assert G is not None
    adapter = Factors(*factors)
    (A, B, h), r, terms, scale = adapter, adapter.A.shape[0], options.terms, options.scale
    need_A, need_B, need_h = needs
    dA, dB, dh = gradients(G, adapter, needs)
    if G.numel() == 0:
        return [dA.zero_(), dB.zero_(), dh.zero_()]
    need_h = need_h and dh.numel() > 0
    a, b = Factor(A, _dense(h), r, terms), Factor(B.t(), _dense(h), r, terms)
    with on_device(G.device):
        bare = [Factor(B.t(), None, r, terms), Factor(A, None, r, terms)]
        phi_b, phi_a = expand(bare, dtype=G.dtype)
        jobs = []
        if need_A or need_h:
            df, dh_out = dA if need_A else None, dh if need_h else None
            jobs.append(Contraction(phi_b.t(), G, a, df, dh_out, scale))
        if need_B:
            jobs.append(Contraction(phi_a.t(), G.t(), b, dB.t(), None, scale))
        # Together they would spill registers at rank 64.
        sum_partials([pending for job in jobs for pending in contract([job])])
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
    allowed = weight is not None and x.dtype == torch.bfloat16
    return allowed and tiles.reached(tiles.choices(x.device).base_last, x)


def _by_library(tokens: int | None, x: torch.Tensor, dropout: Dropout) -> bool:
    """Whether a product is PyTorch's, from so many tokens on. In float16 it would not overflow
    where the reference does.
    """
    return x.dtype == torch.bfloat16 and dropout.p == 0.0 and tiles.reached(tokens, x)


def _base(x: torch.Tensor, base: Base) -> torch.Tensor:
    """The base layer's output, in memory of its own."""
    if base.out is not None:
        return base.out.clone(memory_format=torch.contiguous_format)
    assert base.weight is not None
    return F.linear(x, base.weight, base.bias).contiguous()


def _start(x: torch.Tensor, base: Base) -> torch.Tensor | None:
    """What the update is added to: the base layer's output, or its bias where that comes last."""
    if base.out is None:
        return base.bias if _comes_last(base.weight, x) else _base(x, base)
    # The kernel assumes a unit last stride.
    return base.out if base.out.stride(-1) == 1 else base.out.contiguous()


def _projected(
    x: torch.Tensor,
    factor: Factor,
    *,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    whole: bool = False,
    library: bool = False,
) -> tuple[torch.Tensor, Sum | None]:
    """s dropout(x) φ(factor)ᵀ ``(T, lanes)``, and the sum that has to complete it, if it is not to
    be ``whole``.
    """
    if library:
        return scaled_product(x, factor.rows.t(), scale), None
    u = x.new_empty(x.shape[0], factor.lanes)
    return u, project(x, factor, out=u, scale=scale, dropout=dropout, whole=whole)


def _projected_again(x: torch.Tensor, factor: Factor, dropout: Dropout) -> torch.Tensor:
    """u ``(T, lanes)`` in a backward, as the forward of this layer alone makes it."""
    whole = tiles.phi_in_memory(x, factor.lanes)
    library = whole and _by_library(tiles.choices(x.device).library_projection, x, dropout)
    if whole:
        factor = in_memory(*expand([factor], dtype=x.dtype))
    u, pending = _projected(x, factor, dropout=dropout, whole=whole, library=library)
    _finish(pending)
    return u


def _updated(
    base: torch.Tensor | None,
    u: torch.Tensor,
    phi: torch.Tensor,
    *,
    onto: torch.Tensor | None,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    library: bool,
) -> torch.Tensor:
    """base + s u φ ``(T, M)``, written to ``onto`` if that is not None; base may be a bias."""
    if library:
        if base is None:
            return scaled_product(u, phi, scale)
        if base is onto:
            return base.addmm_(u, phi, alpha=scale)
        return torch.addmm(base, u, phi, alpha=scale)
    out = u.new_empty(u.shape[0], phi.shape[1]) if onto is None else onto
    if base is not None:
        base = base.contiguous().expand_as(out) if base.dim() == 1 else base
    accumulate(base, u, phi, out=out, scale=scale, dropout=dropout)
    return out


def _dense(h: torch.Tensor | None) -> torch.Tensor | None:
    return None if h is None else h.contiguous()


def gradients(
    like: torch.Tensor, parameters: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Uninitialised contiguous gradients of those parameters that need one; empty tensors else."""
    return [
        p.new_empty(p.shape) if need and p is not None else like.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    ]
