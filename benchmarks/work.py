"""How much a contender's own formula has to do: the numerators of TFLOP/s, GB/s and the roofline.

With T tokens, N in, M out features, and a low-rank path of rank K (r for LoRA, the expanded rank
for PERA) whose L = K - r pairs have a coefficient each, in floating-point operations:

    plan        forward                       backward
    dense       2 T N M                       2 T N M
    factored    2 T N M + 2 T K (N + M)       2 T N M + 4 T K (N + M)
                + L (N + M + T)               + L (4 N + 4 M + 3 T)
    composed    2 T N M + 2 K N M             2 T N M + 4 T K (N + M)
                + L (N + 2 M) + N M           + L (4 N + 4 M + 3 T)

The forward's last terms are the products that expand the factors and the coefficients; the
backward's are the contraction to dA and dB (a product and a sum, for both factors of a pair), dh
and the coefficients on v. The backward's four skinny products are v, its part of dx (or u again
where W0 + ΔW serves dx), dφ(A) and dφ(B).

Compulsory bytes are those of every operand read once and of every result written once: x, W0,
bias, A, B, h in and y out; dy, W0 and (for the adapter's gradients) x, A, B, h in, and dx, dA, dB,
dh out. What a forward keeps for its backward is its own choice and is not counted, nor are dropout
masks. ``both`` is the sum of the two; ``eval`` is a forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from pera_kernels.terms import coefficient_count, expanded_rank
from pera_kernels.verify.numerics import Case

__all__ = ["Work", "of"]


@dataclass(frozen=True)
class Work:
    """Floating-point operations and compulsory bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def roofline_seconds(self, tflops: float, gbps: float) -> float:
        """The least time on a device of these two ceilings, in 1e12 FLOP/s and 1e9 bytes/s."""
        return max(self.flops / (tflops * 1e12), self.bytes / (gbps * 1e9))


def of(plan: str, case: Case, phase: str) -> Work:
    """The work of one call; ``plan`` is "dense", "factored" or "composed", and "auto" counts as
    "factored". ``case`` is what the contender computes itself: LoRA's has ``terms="linear"``.
    """
    if phase == "both":
        return of(plan, case, "forward") + of(plan, case, "backward")
    if phase == "backward":
        return Work(_backward_flops(plan, case), _backward_bytes(plan, case))
    return Work(_forward_flops(plan, case), _forward_bytes(plan, case))


def _forward_flops(plan: str, case: Case) -> int:
    T, N, M = case.T, case.N, case.M
    K, L = expanded_rank(case.r, case.terms), coefficient_count(case.r, case.terms)
    base = 2 * T * N * M
    if plan == "dense":
        return base
    if plan == "composed":
        return base + 2 * K * N * M + L * (N + 2 * M) + N * M
    return base + 2 * T * K * (N + M) + L * (N + M + T)


def _backward_flops(plan: str, case: Case) -> int:
    T, N, M = case.T, case.N, case.M
    K, L = expanded_rank(case.r, case.terms), coefficient_count(case.r, case.terms)
    base = 2 * T * N * M
    if plan == "dense":
        return base
    return base + 4 * T * K * (N + M) + L * (4 * N + 4 * M + 3 * T)


def _adapter_bytes(case: Case) -> int:
    values = case.r * (case.N + case.M) + coefficient_count(case.r, case.terms)
    return values * case.factor_dtype.itemsize


def _forward_bytes(plan: str, case: Case) -> int:
    T, N, M = case.T, case.N, case.M
    dense = (T * N + N * M + M + T * M) * case.dtype.itemsize
    return dense if plan == "dense" else dense + _adapter_bytes(case)


def _backward_bytes(plan: str, case: Case) -> int:
    T, N, M = case.T, case.N, case.M
    dense = (T * M + N * M + T * N) * case.dtype.itemsize
    if plan == "dense":
        return dense
    return dense + T * N * case.dtype.itemsize + 2 * _adapter_bytes(case)
