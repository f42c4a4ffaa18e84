"""The ``torch`` backend: the formulas of the gradients in lean PyTorch, on any device and dtype.

Expansions are built in circular order, where the block of offset ``d`` is ``f ∘ roll(f, d)``: one
strided view of the factor with its first rows repeated gives all partners, so there is no index
table and no ``(d, r, r)`` temporary. Functions have the signatures of the Triton ops in
``pera_kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .dropout import keep_mask
from .ops import tokens
from .terms import Terms, circular_index, expanded_rank, first_offset, offset_count

__all__ = ["delta_backward", "delta_forward", "linear_backward", "linear_forward"]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _with_repeats(factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    """The factor ``(R, N)`` followed by as many of its own first rows as the largest offset
    reaches.
    """
    R = factor.shape[0]
    extra = first_offset(terms) + offset_count(R, terms) - 1
    return torch.cat([factor, factor[:extra]]) if extra > 0 else factor.contiguous()


def _expand(
    factor: torch.Tensor, h: torch.Tensor | None, terms: Terms, dtype: torch.dtype
) -> torch.Tensor:
    """φ(factor) ``(K, N)`` in circular order, times (1, h) if given; rounded once to ``dtype``."""
    R, N = factor.shape
    offsets, first = offset_count(R, terms), first_offset(terms)
    if offsets == 0:
        return factor.to(dtype)
    # A single product of equal dtypes is rounded once by PyTorch itself.
    if h is not None or factor.dtype != dtype:
        factor = factor.to(_at_least_float32(factor.dtype))
    rows = _with_repeats(factor, terms)
    partners = rows[first:].as_strided((offsets, R, N), (N, N, 1))
    phi = rows[:R].repeat(1 + offsets, 1)
    phi[R:].view(offsets, R, N).mul_(partners)
    phi = phi[: expanded_rank(R, terms)]
    if h is not None:
        to_circular, _ = circular_index(R, terms, factor.device)
        phi[R:] *= h[to_circular].to(phi.dtype).unsqueeze(1)
    return phi.to(dtype)


def _contract(
    dphi: torch.Tensor, factor: torch.Tensor, h: torch.Tensor | None, terms: Terms
) -> torch.Tensor:
    """df ``(R, N)`` from the bare dφ ``(K, N)``: df_i = dφ_i + Σ_j c_ij dφ_ij ∘ f_j."""
    R = factor.shape[0]
    offsets, first = offset_count(R, terms), first_offset(terms)
    if offsets == 0:
        return dphi.to(factor.dtype)
    work = _at_least_float32(dphi.dtype)
    rows = _with_repeats(factor.to(work), terms)
    dphi = dphi.to(work)
    if h is not None:
        to_circular, _ = circular_index(R, terms, factor.device)
        dphi[R:] *= h[to_circular].to(work).unsqueeze(1)
    drows = torch.zeros_like(rows)
    drows[:R] = dphi[:R]
    start = R
    for d in range(first, first + offsets):
        block = dphi[start : start + R]
        lanes = block.shape[0]
        drows[:lanes].addcmul_(block, rows[d : d + lanes])
        drows[d : d + lanes].addcmul_(block, rows[:lanes])
        start += lanes
    drows[: rows.shape[0] - R] += drows[R:]
    return drows[:R].to(factor.dtype)


def _coefficient_gradient(
    products: torch.Tensor, h: torch.Tensor, R: int, scale: float, terms: Terms
) -> torch.Tensor:
    """dh in the public order from the per-lane sums ``(L,)`` in circular order."""
    _, to_public = circular_index(R, terms, h.device)
    return (scale * products)[to_public].to(h.dtype)


def _dropped(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """x̂ ``(T, N)`` without the factor 1/(1-p), which the small side of the product takes."""
    if p == 0.0 or seed is None:
        return x
    return x.masked_fill(~keep_mask(seed, x.shape[0], x.shape[1], p), 0.0)


def _add_product(
    out: torch.Tensor, u: torch.Tensor, phi: torch.Tensor, scale: float
) -> torch.Tensor:
    """out + s u φ, in place. float16 rounds the product on its own: its overflow must show."""
    if out.dtype == torch.float16:
        return out.add_((u @ phi).mul_(scale))
    return out.addmm_(u, phi, alpha=scale)


def _project(
    x: torch.Tensor, A: torch.Tensor, seed: torch.Tensor | None, p: float, terms: Terms
) -> torch.Tensor:
    u = _dropped(x, seed, p) @ _expand(A, None, terms, x.dtype).t()
    return u.mul_(1.0 / (1.0 - p)) if p > 0.0 else u


def _composed_weight(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: Terms,
) -> torch.Tensor:
    phi_B = _expand(B.t(), h, terms, weight.dtype)
    phi_A = _expand(A, None, terms, weight.dtype)
    return torch.addmm(weight, phi_B.t(), phi_A, alpha=scale)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, u): y on a dense ``weight`` or a base layer's output; u ``(T, K)``, empty if composed."""
    if composed:
        assert weight is not None
        return F.linear(x, _composed_weight(weight, A, B, h, scale, terms), bias), x.new_empty(0)
    if weight is not None:
        y = F.linear(x, weight, bias).contiguous()
    else:
        assert base_out is not None
        y = base_out.clone(memory_format=torch.contiguous_format)
    u = _project(tokens(x), A, seed, dropout_p, terms)
    _add_product(tokens(y), u, _expand(B.t(), h, terms, x.dtype), scale)
    return y, u


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
    need_x, need_A, need_B, need_h = needs
    dx = dA = dB = dh = None
    rows, R = tokens(dy), A.shape[0]
    keep_scale = 1.0 / (1.0 - dropout_p)
    if (need_x and not composed) or need_A or need_h:
        v = rows @ _expand(B.t(), None, terms, dy.dtype).t()
    if need_x and composed:
        assert weight is not None
        dx = dy @ _composed_weight(weight, A, B, h, scale, terms)
    elif need_x:
        phi_A = _expand(A, h, terms, dy.dtype)
        shape = (*dy.shape[:-1], A.shape[1])
        if weight is not None and dropout_p == 0.0:
            dx = (dy @ weight).contiguous()
            _add_product(tokens(dx), v, phi_A, scale)
        else:
            update = _dropped((v @ phi_A).mul_(scale * keep_scale), seed, dropout_p).view(shape)
            dx = update if weight is None else update.add_(dy @ weight)
    if (need_B or need_h) and u is None:
        assert x is not None
        u = _project(tokens(x), A, seed, dropout_p, terms)
    if need_B:
        assert u is not None
        dB = _contract((u.t() @ rows).mul_(scale), B.t(), h, terms).t().contiguous()
    if need_h and h is not None:
        assert u is not None
        work = _at_least_float32(u.dtype)
        products = (u[:, R:].to(work) * v[:, R:]).sum(0)
        dh = _coefficient_gradient(products, h, R, scale, terms)
    if need_A:
        assert x is not None
        dphi_A = v.t() @ _dropped(tokens(x), seed, dropout_p)
        dA = _contract(dphi_A.mul_(scale * keep_scale), A, h, terms)
    return dx, dA, dB, dh


def delta_forward(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, scale: float, terms: Terms
) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    return (_expand(B.t(), h, terms, A.dtype).t() @ _expand(A, None, terms, A.dtype)).mul_(scale)


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
    R, phi_A = A.shape[0], _expand(A, None, terms, G.dtype)
    if need_A or need_h:
        dphi_A = _expand(B.t(), None, terms, G.dtype) @ G
        if need_h and h is not None:
            work = _at_least_float32(G.dtype)
            products = (dphi_A[R:].to(work) * phi_A[R:]).sum(1)
            dh = _coefficient_gradient(products, h, R, scale, terms)
        if need_A:
            dA = _contract(dphi_A.mul_(scale), A, h, terms)
    if need_B:
        dB = _contract((phi_A @ G.t()).mul_(scale), B.t(), h, terms).t().contiguous()
    return dA, dB, dh
