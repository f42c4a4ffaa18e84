"""PERA in plain PyTorch, for any dtype and device: the specification everything else is checked
against.

It follows the paper line by line and is differentiated by autograd. In a working dtype below
float32 it states where values are rounded: products of factors and coefficients are formed in
float32 and rounded once to the dtype of ``x``; everything else is PyTorch's own arithmetic in that
dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dropout import keep_mask, keep_scale
from .terms import Terms, check_terms, pairs

__all__ = ["coefficients", "delta_weight", "expand", "pera_linear"]


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(factor: torch.Tensor, terms: Terms = "full", *, dim: int = 0) -> torch.Tensor:
    """φ (Eq. 2, 3): the rank-one directions along ``dim`` and their products, in the order of
    ``h``.

    ``expand(A, dim=0)`` is ``(K, N)``, ``expand(B, dim=1)`` is ``(M, K)``; float32, or float64 if
    ``factor`` is.
    """
    check_terms(terms)
    linear = _at_least_float32(factor)
    if not (kept := pairs(factor.shape[dim], terms)):
        return linear
    i, j = torch.tensor(kept, device=factor.device).unbind(1)
    return torch.cat([linear, linear.index_select(dim, i) * linear.index_select(dim, j)], dim)


def coefficients(h: torch.Tensor | None, r: int) -> torch.Tensor | None:
    """c ``(K,)``: a one for each linear direction, then ``h``; None where there are no pairs."""
    if h is None:
        return None
    h = _at_least_float32(h)
    return torch.cat([h.new_ones(r), h])


def expanded_factors(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(A) and φ(B)·diag(1, h): the diagonal meets φ(B) before either is rounded."""
    phi_A, phi_B, c = expand(A, terms, dim=0), expand(B, terms, dim=1), coefficients(h, A.shape[0])
    return phi_A, phi_B if c is None else phi_B * c


def delta_weight(
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
) -> torch.Tensor:
    """ΔW = s φ(B) diag(1, h) φ(A) ``(M, N)`` (Eq. 4, 9) in the dtype of ``A``."""
    phi_A, phi_B = expanded_factors(A, B, h, terms)
    return scale * (phi_B.to(A.dtype) @ phi_A.to(A.dtype))


def pera_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ) (φ(B) diag(1, h))ᵀ, with x̂ = dropout(x); ``(..., M)``.

    ``seed`` (int64, ``(1,)``) chooses the dropout mask (see ``pera_kernels.dropout``).
    """
    return F.linear(x, weight, bias) + update(
        x, A, B, h, scale=scale, terms=terms, dropout_p=dropout_p, seed=seed
    )


def update(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The adapter's part of :func:`pera_linear`, s · (x̂ φ(A)ᵀ) (φ(B) diag(1, h))ᵀ; ``(..., M)``."""
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError(
                "seed must be an int64 tensor of shape (1,) when dropout_p > 0; got None"
            )
        N = x.shape[-1]
        keep = keep_mask(seed, x.numel() // N if N else 0, N, dropout_p).view(x.shape)
        x = x.masked_fill(~keep, 0.0) * keep_scale(dropout_p)
    phi_A, phi_B = expanded_factors(A, B, h, terms)
    u = F.linear(x, phi_A.to(x.dtype))
    return scale * F.linear(u, phi_B.to(x.dtype))
