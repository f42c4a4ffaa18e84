"""What the products of PERA are worth for an update of known singular values, in ranks of LoRA.

A formula fitted to measurements, `docs/capacity.md`: how closely a fixed matrix can be fitted. What
training reaches is another question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..terms import Terms, coefficient_count

__all__ = ["FITTED", "numbers", "worth"]

# By terms, the weights of `numbers`: what python -m tools.capacity --report fits to its rows.
FITTED: dict[Terms, tuple[float, ...]] = {
    "full": (1.42, -0.20, -3.00, -2.77),
    "square": (0.42, -0.51, -3.41, -2.51),
    "cross": (1.30, -0.26, -3.11, -3.01),
}


def numbers(singular_values: torch.Tensor, r: int, size: float) -> tuple[float, ...]:
    """What the logarithm of the worth over r is a weighted sum of, for a matrix of √(M N) = size.

    Directions beyond rank r are compared with the weakest that LoRA keeps: all of them, in a mean
    that hardly counts much weaker ones, and the next r, in their energy.
    """
    left = singular_values[r:] / singular_values[r - 1]
    strong = math.log(float(left.pow(6).sum()) / size)
    near = math.log(float(left[:r].square().mean()))
    return 1.0, strong, math.log1p(math.exp(-2 - strong)), near


def worth(
    singular_values: torch.Tensor | Sequence[float],
    r: int,
    terms: Terms = "full",
    shape: tuple[int, int] | None = None,
) -> float:
    """How many more ranks LoRA would need to come as close to a matrix of these singular values as
    PERA of rank r can come. Where it was measured, for r from 4 to 32 and at most min(M, N) / 8,
    and matrices of up to 1024 rows, it is off by a factor of 1.3 to 1.5 as a rule, and by 3 at
    most; of the largest it says too little.

    Args:
        singular_values: all of them, min(M, N), in falling order.
        r: the rank of the adapter.
        terms: which products it has.
        shape: (M, N); a square matrix without it.

    Raises:
        TypeError, ValueError: r is no rank, terms are unknown, or the singular values are negative,
            not in falling order, or not as many as the shape has.
    """
    count = coefficient_count(r, terms)
    sigma = torch.as_tensor(singular_values, dtype=torch.float64)
    if sigma.ndim != 1 or not (sigma.diff() <= 0).all() or not (sigma >= 0).all():
        raise ValueError(
            f"singular_values must be numbers >= 0 in falling order; got {singular_values!r}"
        )
    M, N = shape or (len(sigma), len(sigma))
    if len(sigma) != min(M, N):
        raise ValueError(
            f"shape must be (M, N) with min(M, N) = {len(sigma)} singular values; got {shape!r}"
        )
    # What is so small has no sixth power.
    if count == 0 or r >= len(sigma) or sigma[r] <= 1e-9 * sigma[r - 1]:
        return 0.0
    weighted = zip(FITTED[terms], numbers(sigma, r, math.sqrt(M * N)), strict=True)
    return float(min(r * math.exp(sum(a * b for a, b in weighted)), count, len(sigma) - r))
