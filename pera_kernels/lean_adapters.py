"""The adapters' part of the ``torch`` backend, for one layer or several that share an input.

The coefficients and the scale meet the small ``(T, K)`` side of a product, so that φ(A) and φ(B)
are bare. float16 is the exception: there the products round and overflow where those of the
reference do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from . import lean_few
from .dropout import keep_mask
from .lean_cache import Expansions, lookup, readable
from .lean_factors import (
    coefficient_gradient,
    coefficient_gradient_of,
    coefficients,
    contract,
    expand,
    product,
    summed_lane_by_lane,
    work_dtype,
)
from .terms import Terms

__all__ = ["Adapters", "add_gradients", "add_update"]

Expand = Callable[[], torch.Tensor]

# Up to so many tokens, and no more than R, the pairs' gradients come from Gram matrices.
FEW_TOKENS = 16
# A CPU's products in bfloat16 have a fixed cost: up to so many tokens float32 is faster.
SINGLE_TOKENS = 4
# For so few tokens expansions of at least this rank, even kept ones, take longer to read than Gram
# matrices to compute.
GRAM_RANK = 24


class Adapters(NamedTuple):
    """G adapters of one rank on one input: A ``(R, N)``, B ``(M_g, R)``, h ``(L,)`` or None."""

    As: Sequence[torch.Tensor]
    Bs: Sequence[torch.Tensor]
    hs: Sequence[torch.Tensor | None]
    seed: torch.Tensor | None
    scale: float
    terms: Terms
    dropout_p: float

    # Methods, not properties: torch 2.8 cannot trace a property of a named tuple.
    def R(self) -> int:
        return self.As[0].shape[0]

    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x with the dropped elements zero; the factor 1/(1-p) is left to the small side."""
        if self.dropout_p == 0.0 or self.seed is None:
            return x
        return x.masked_fill(~keep_mask(self.seed, x.shape[0], x.shape[1], self.dropout_p), 0.0)

    def expansions(self, g: int, dtype: torch.dtype, folded: bool) -> Expansions:
        """Of member g; ``folded`` and float16 have the coefficients in φ(B), the former times s."""
        A, B, h = self.As[g], self.Bs[g], self.hs[g]
        half = dtype == torch.float16
        c = coefficients(h, self.R(), 1.0 if half else self.scale, self.terms)
        phi_A = expand(A, self.terms, dtype)
        if c is not None and (folded or half):
            return Expansions(phi_A, expand(B.t(), self.terms, dtype, c), None)
        return Expansions(phi_A, expand(B.t(), self.terms, dtype), c)

    def kept_expansions(self, g: int, dtype: torch.dtype, folded: bool) -> Expansions:
        """:meth:`expansions`, from those that are kept if they are."""
        A, B, h = self.As[g], self.Bs[g], self.hs[g]
        make = partial(self.expansions, g, dtype, folded)
        if h is None:
            return make()
        return lookup(A, B, h, self.scale, self.terms, dtype, folded, make) or make()

    def bare_expansions(
        self, g: int, dtype: torch.dtype
    ) -> tuple[Expand, Expand, torch.Tensor | None]:
        """φ(A) and φ(B) of member g without coefficients, made when they are asked for unless they
        are kept; and the coefficients times s, without it for float16.
        """
        A, B, h = self.As[g], self.Bs[g], self.hs[g]
        half = dtype == torch.float16
        if h is not None and not half:
            kept = lookup(A, B, h, self.scale, self.terms, dtype, False, None)
            if kept is not None:
                return lambda: kept.phi_A, lambda: kept.phi_B, kept.c
        return (
            partial(expand, A, self.terms, dtype),
            partial(expand, B.t(), self.terms, dtype),
            coefficients(h, self.R(), 1.0 if half else self.scale, self.terms),
        )

    def weights(self, scale: float) -> list[torch.Tensor | None]:
        """s (1, h) ``(K,)`` of each, in circular order."""
        return [coefficients(h, self.R(), scale, self.terms) for h in self.hs]

    def linear(self) -> Adapters:
        """These adapters without their pairs."""
        return self._replace(hs=[None] * len(self.hs), terms="linear")


def _all_zero(hs: Sequence[torch.Tensor | None]) -> bool:
    """Whether all coefficients are seen to be zero."""
    if torch.compiler.is_compiling():
        return False
    return all(h is not None and readable(h) and not h.any() for h in hs)


def _without_expansions(x: torch.Tensor, adapters: Adapters) -> bool:
    """Whether y of so few tokens comes from Gram matrices."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and 0 < x.shape[0] <= SINGLE_TOKENS
        and adapters.R() >= GRAM_RANK
        and adapters.terms in ("full", "cross")
        and x.dtype != torch.float16
    )


def _update_few(x: torch.Tensor, adapters: Adapters, g: int) -> torch.Tensor:
    """What member g adds to y, in at least float32."""
    A, B, terms = adapters.As[g], adapters.Bs[g], adapters.terms
    work = work_dtype(A.dtype)
    c = coefficients(adapters.hs[g], adapters.R(), adapters.scale, terms)
    assert c is not None
    weighted = lean_few.project(x.to(work), A.to(work), terms).mul_(c)
    if adapters.dropout_p > 0.0:
        weighted.mul_(adapters.keep_scale())
    rows = B.t().to(work).contiguous()
    return lean_few.update(lean_few.spread(weighted, rows, terms), weighted, rows)


def _in_single(x: torch.Tensor) -> bool:
    """Whether the adapters' part of so few tokens is computed in float32."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.shape[0] <= SINGLE_TOKENS
    )


def _side_by_side(us: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(T, K)`` of each -> ``(T, G K)``."""
    return us[0] if len(us) == 1 else torch.cat(list(us), 1)


def _weighted(u: torch.Tensor, c: torch.Tensor | None, scale: float) -> torch.Tensor:
    """s (u ∘ c) rounded once to the dtype of u, which float16 leaves to what follows.

    ``c`` holds s already.
    """
    if u.dtype == torch.float16:
        return u
    if c is not None:
        return (u * c).to(u.dtype)
    return u if scale == 1.0 else u * scale


def _add_product(
    out: torch.Tensor, weighted: torch.Tensor, phi: torch.Tensor, scale: float
) -> torch.Tensor:
    """out + weighted φ, in place. float16 rounds the product, then s times it, as the reference."""
    if out.dtype == torch.float16:
        return out.add_((weighted @ phi).mul_(scale))
    # Not onto what may be far larger: every lane would be rounded at its size.
    if summed_lane_by_lane(out.shape, out.dtype):
        return out.add_(product(weighted, phi))
    return out.addmm_(weighted, phi)


def add_update(
    ys: Sequence[torch.Tensor], x: torch.Tensor, adapters: Adapters, keep_u: bool
) -> torch.Tensor:
    """Adds s (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ to each y ``(T, M_g)``; returns u ``(T, G K)`` of all, or an empty
    tensor.

    K is R where all h are frozen at zero: their pairs are never formed. Without ``keep_u`` s and
    the coefficients are part of φ(B): two passes over ``(T, K)`` fewer, and for a few tokens in
    bfloat16 the expansions are float32.
    """
    frozen = not any(h is not None and h.requires_grad for h in adapters.hs)
    if frozen and x.dtype != torch.float16 and _all_zero(adapters.hs):
        adapters = adapters.linear()
    x, us, folded = adapters.dropped(x), [], not keep_u
    if folded and _without_expansions(x, adapters):
        for g, y in enumerate(ys):
            y.add_(_update_few(x, adapters, g))
        return x.new_empty(0)
    if folded and _in_single(x):
        x = x.float()
    for g, y in enumerate(ys):
        own = adapters.kept_expansions(g, x.dtype, folded)
        u = x @ own.phi_A.t()
        if adapters.dropout_p > 0.0:
            u.mul_(adapters.keep_scale())
        if x.dtype != y.dtype:
            y.add_(u @ own.phi_B, alpha=1.0 if adapters.hs[g] is not None else adapters.scale)
        elif folded and adapters.hs[g] is not None and x.dtype != torch.float16:
            _add_product(y, u, own.phi_B, 1.0)
        else:
            _add_product(y, _weighted(u, own.c, adapters.scale), own.phi_B, adapters.scale)
        us.append(u)
    return _side_by_side(us) if keep_u else x.new_empty(0)


def add_gradients(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    dx: torch.Tensor | None,
    adapters: Adapters,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(dx, [dA, dB, dh of each]); the adapters' dx is added to the given one in place."""
    dtype, G = dys[0].dtype, len(dys)
    in_phi = dtype == torch.float16
    need_A = any(needs[0::3])
    # As the forward decided: its u shows it.
    if not any(needs[2::3]) and (
        u.shape[1] == G * adapters.R() if u is not None else not in_phi and _all_zero(adapters.hs)
    ):
        adapters = adapters.linear()
    terms, R, scale, keep_scale = (
        adapters.terms,
        adapters.R(),
        adapters.scale,
        adapters.keep_scale(),
    )
    x = None if x is None else adapters.dropped(x)
    if (
        not torch.compiler.is_compiling()
        and 0 < dys[0].shape[0] <= min(FEW_TOKENS, R)
        and terms in ("full", "cross")
        and not in_phi
    ):
        return _add_gradients_few(dys, x, u, dx, adapters, need_x, needs)
    if in_phi:
        # As autograd does to the reference: what is small is scaled before it is rounded again.
        dys, scale = [dy * scale for dy in dys], 1.0
    gradients: list[torch.Tensor | None] = [None] * (3 * G)
    us = [None] * G if u is None else u.tensor_split(G, 1)
    # The coefficients that φ(A)ᵀ and the contraction take: those of float16.
    phi_cs: list[torch.Tensor | None] = [None] * G
    vs = []
    for g, (dy, u, A, B, h) in enumerate(
        zip(dys, us, adapters.As, adapters.Bs, adapters.hs, strict=True)
    ):
        _, need_B, need_h = needs[3 * g : 3 * g + 3]
        phi_A, phi_B, c = adapters.bare_expansions(g, dtype)
        if in_phi:
            phi_cs[g] = c
        if u is None and (need_B or need_h):
            assert x is not None
            u = (x @ phi_A().t()).mul_(keep_scale)
        if need_B or (need_h and in_phi):
            assert u is not None
            dphi = _weighted(u, c, scale).t() @ dy
        if need_B:
            gradients[3 * g + 1] = contract(dphi, B.t(), terms, phi_cs[g]).t().contiguous()
        if need_h and in_phi:
            assert h is not None
            gradients[3 * g + 2] = coefficient_gradient_of(dphi, B.t(), h, terms)
        if need_x or need_A or (need_h and not in_phi):
            v = dy @ phi_B().t()
        if need_h and not in_phi:
            assert u is not None and h is not None
            gradients[3 * g + 2] = coefficient_gradient(u, v, h, R, scale, terms)
        if need_x or need_A:
            vs.append(_weighted(v, c, scale))
            if adapters.dropout_p > 0.0:
                vs[-1] = vs[-1] * keep_scale
        if need_x:
            weighted_phi_A = expand(A, terms, dtype, phi_cs[g]) if in_phi else phi_A()
            if dx is not None and adapters.dropout_p == 0.0:
                _add_product(dx, vs[-1], weighted_phi_A, scale)
            else:
                part = adapters.dropped(product(vs[-1], weighted_phi_A))
                dx = part if dx is None else dx.add_(part)
    if need_A:
        assert x is not None
        dphi = _side_by_side(vs).t() @ x
        for g, (own, A) in enumerate(zip(dphi.tensor_split(G), adapters.As, strict=True)):
            gradients[3 * g] = contract(own, A, terms, phi_cs[g])
    return dx, gradients


def _add_gradients_few(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    dx: torch.Tensor | None,
    adapters: Adapters,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    work, terms, G = work_dtype(adapters.As[0].dtype), adapters.terms, len(dys)
    z = None if x is None else x.to(work).contiguous()
    if z is not None and adapters.dropout_p > 0.0:
        z = z * adapters.keep_scale()
    us = [None] * G if u is None else u.tensor_split(G, 1)
    gradients: list[torch.Tensor | None] = [None] * (3 * G)
    for g, c in enumerate(adapters.weights(adapters.scale)):
        need_A, need_B, need_h = needs[3 * g : 3 * g + 3]
        assert c is not None
        A, B, h, own = adapters.As[g], adapters.Bs[g], adapters.hs[g], us[g]
        A_rows, B_rows = A.to(work), B.t().to(work).contiguous()
        dz = dys[g].to(work).contiguous()
        if (need_B or need_h) and own is None:
            assert z is not None
            own = lean_few.project(z, A_rows, terms)
        if need_x or need_A or need_h:
            v = lean_few.project(dz, B_rows, terms)
        if need_h:
            assert own is not None and h is not None
            gradients[3 * g + 2] = coefficient_gradient(
                own, v, h, adapters.R(), adapters.scale, terms
            )
        if need_x or need_A:
            weighted = v * c
            spread = lean_few.spread(weighted, A_rows, terms)
        if need_x:
            part = lean_few.update(spread, weighted, A_rows)
            if adapters.dropout_p > 0.0:
                part = adapters.dropped(part.mul_(adapters.keep_scale()))
            dx = part.to(dys[g].dtype) if dx is None else dx.add_(part)
        if need_A:
            assert z is not None
            gradients[3 * g] = lean_few.gradient(spread, z).to(A.dtype)
        if need_B:
            assert own is not None
            spread = lean_few.spread(own * c, B_rows, terms)
            gradients[3 * g + 1] = lean_few.gradient(spread, dz).t().to(B.dtype).contiguous()
    return dx, gradients
