"""What an update ΔW is made of: its singular values, and the rank-one terms that add up to it.

``lora_A`` ``(K, N)`` and ``lora_B`` ``(M, K)`` are the expanded factors of one module (those of
:func:`pera_kernels.expand_factors`), with the linear directions first; ΔW = ``lora_B @ lora_A`` is
never formed. Everything is computed in float64; what is not finite becomes NaN.
"""

from __future__ import annotations

import torch

from ..module import product_norm
from ..terms import Terms, pair_rows

__all__ = [
    "carried_by",
    "effective_rank",
    "error_of_rank",
    "interaction",
    "log_slope",
    "numerical_rank",
    "part_norms",
    "singular_values",
    "term_norms",
    "top_energy",
]


@torch.no_grad()
def singular_values(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """σ of ``lora_B @ lora_A`` ``(min(M, K, N),)``, the largest first.

    Those of the product of the two triangles of a QR decomposition, which is at most K x K.
    """
    A, B = lora_A.double(), lora_B.double()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return A.new_full((min(B.shape[0], *A.shape),), torch.nan)
    R_A, R_B = torch.linalg.qr(A.mT, mode="r").R, torch.linalg.qr(B, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.mT)


def effective_rank(sigma: torch.Tensor) -> float:
    """The participation ratio (Σσ²)² / Σσ⁴: k for k equal singular values, 1 for a single one; 0 if
    all are zero.
    """
    energy = sigma.double().square()
    total = energy.sum()
    return 0.0 if total == 0.0 else float((energy / total).square().sum().reciprocal())


def numerical_rank(sigma: torch.Tensor, rows: int, columns: int) -> int:
    """How many σ are above max(rows, columns) · ε · σ₁ with the ε of float64, as
    ``torch.linalg.matrix_rank`` counts them.
    """
    bound = sigma.max() * max(rows, columns) * torch.finfo(torch.float64).eps
    return int((sigma > bound).sum())


def error_of_rank(sigma: torch.Tensor, rank: int) -> float:
    """‖ΔW − X‖_F / ‖ΔW‖_F for the best X of this rank: what a truncated SVD leaves out
    (Eckart, Young).
    """
    total = sigma.double().norm()
    return 0.0 if total == 0.0 else float(sigma[rank:].double().norm() / total)


def top_energy(sigma: torch.Tensor, count: int) -> float:
    """The share of Σσ² in the ``count`` largest; NaN if all are zero."""
    energy = sigma.double().square()
    return float(energy[:count].sum() / energy.sum())


def log_slope(sigma: torch.Tensor) -> float:
    """The p of σ_k ≈ C kᵖ: the least-squares slope of log σ_k against log k.

    Over the first quarter of the singular values, at least eight of them: the last ones of any
    finite matrix fall faster than a power. NaN where fewer than two are above zero.
    """
    head = sigma[: max(8, -(-len(sigma) // 4))].double()
    y = head[head > 0.0].log()
    if len(y) < 2:
        return torch.nan
    x = torch.arange(1, len(y) + 1, dtype=torch.float64, device=y.device).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


@torch.no_grad()
def term_norms(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """‖·‖_F of every rank-one term ``(K,)``: s ‖b_i‖‖a_i‖ of the linear ones, then
    s |h_ij| ‖b_i∘b_j‖‖a_i∘a_j‖ of the pairs in the order of ``h``.
    """
    return lora_B.double().norm(dim=0) * lora_A.double().norm(dim=1)


@torch.no_grad()
def part_norms(
    lora_A: torch.Tensor, lora_B: torch.Tensor, r: int, terms: Terms
) -> dict[str, float | None]:
    """‖·‖_F of the linear, the square and the cross part of ΔW (the three sums of Eq. 9), and of
    square and cross together, the products; None for a part that ``terms`` leaves out.
    """
    A, B = lora_A.double(), lora_B.double()
    i, j = pair_rows(r, terms, A.device)
    order = torch.arange(len(A), device=A.device)
    parts = {
        "linear": order[:r],
        "square": r + (i == j).nonzero()[:, 0],
        "cross": r + (i != j).nonzero()[:, 0],
        "products": order[r:],
    }
    return {
        part: product_norm(B[:, own], A[own]) if len(own) else None for part, own in parts.items()
    }


def carried_by(norms: torch.Tensor, share: float) -> int:
    """How many of the largest norms have this share of their sum of squares."""
    energy = norms.double().square().sort(descending=True).values.cumsum(0)
    if len(energy) == 0 or not energy[-1] > 0.0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1


def interaction(norms: torch.Tensor, r: int, terms: Terms) -> torch.Tensor:
    """The norms of the pairs out of :func:`term_norms` as a symmetric matrix ``(r, r)``.

    The order of an adapter's directions means nothing; here the strongest b_i a_iᵀ comes first, so
    that matrices of several modules can be averaged.
    """
    i, j = pair_rows(r, terms, norms.device)
    matrix = norms.new_zeros(r, r)
    matrix[i, j] = matrix[j, i] = norms[r:]
    order = norms[:r].argsort(descending=True)
    return matrix[order][:, order]
