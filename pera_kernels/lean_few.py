"""A few tokens without any expansion: a token's projections on all pairs are a Gram matrix.

For a factor F ``(R, C)`` and a row z they are the entries of ``F diag(z) Fᵀ``. With W the symmetric
matrix of the weights w of the pairs (a square's counts twice), the sum over pairs of w_ij f_i ∘ f_j
is ½ Σ_i f_i ∘ (W F)_i, and the gradient of z · (that sum) with respect to F is z ∘ (W F). This is
T R C work per product where an expansion writes K C numbers first. At least float32 throughout.
"""

from __future__ import annotations

import torch

from .lean_factors import lanes
from .terms import Terms

__all__ = ["gradient", "project", "spread", "update"]


def project(z: torch.Tensor, factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    """z φ(F)ᵀ ``(T, K)`` in circular order, from z ``(T, C)`` and F ``(R, C)``."""
    (T, C), R = z.shape, factor.shape[0]
    scaled = (z.unsqueeze(1) * factor).reshape(T * R, C)
    gram = (scaled @ factor.t()).view(T, R * R)
    linear = z @ factor.t()
    return torch.cat([linear, gram], 1).index_select(1, lanes(R, terms, z.device).gram)


def spread(w: torch.Tensor, factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    """w_i + (W F)_i ``(T, R, C)`` from the weights w ``(T, K)`` in circular order."""
    T, (R, C) = w.shape[0], factor.shape
    W = w.index_select(1, lanes(R, terms, w.device).square).view(T, R, R)
    diagonal = W.diagonal(0, 1, 2)
    diagonal.zero_() if terms == "cross" else diagonal.mul_(2.0)
    linear = w[:, :R].reshape(T * R, 1)
    return torch.addmm(linear, W.view(T * R, R), factor).view(T, R, C)


def update(spread: torch.Tensor, w: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """w φ(F) ``(T, C)``."""
    twice = (spread * factor).sum(1)
    return twice.addmm_(w[:, : factor.shape[0]], factor).mul_(0.5)


def gradient(spread: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """dF ``(R, C)`` of Σ_t z_t · (w φ(F))_t; overwrites ``spread``."""
    return spread.mul_(z.unsqueeze(1)).sum(0)
