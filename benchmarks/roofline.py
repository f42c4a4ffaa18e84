"""How much a formula has to do, and how fast the device at hand can do it.

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
and the coefficients on v.

Bytes are those of every operand read once and of every result written once: x, W0, bias, A, B, h
in and y out; dy, W0 and (for the adapter's gradients) x, A, B, h in, and dx, dA, dB, dh out. What a
forward keeps for its backward is its own choice and is not counted, nor are dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pera_kernels.terms import coefficient_count, expanded_rank
from pera_kernels.testing import Case

from .timing import time_calls

__all__ = ["Ceilings", "Work", "speed", "work"]

# Far larger than a cache, and a product large enough that its edges do not show.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def work(plan: str, case: Case, phase: str) -> Work:
    """The work of one call; ``plan`` is "dense", "factored" or "composed", and "auto" counts as
    "factored". ``case`` is what the contender computes itself: LoRA's has ``terms="linear"``.
    """
    if phase == "both":
        return work(plan, case, "forward") + work(plan, case, "backward")
    T, N, M = case.T, case.N, case.M
    K, L = expanded_rank(case.r, case.terms), coefficient_count(case.r, case.terms)
    size = case.dtype.itemsize
    adapter = (case.r * (N + M) + L) * case.factor_dtype.itemsize
    flops = 2 * T * N * M
    if phase == "backward":
        dense = (T * M + N * M + T * N) * size
        if plan == "dense":
            return Work(flops, dense)
        flops += 4 * T * K * (N + M) + L * (4 * N + 4 * M + 3 * T)
        return Work(flops, dense + T * N * size + 2 * adapter)
    dense = (T * N + N * M + M + T * M) * size
    if plan == "dense":
        return Work(flops, dense)
    if plan == "composed":
        flops += 2 * K * N * M + L * (N + 2 * M) + N * M
    else:
        flops += 2 * T * K * (N + M) + L * (N + M + T)
    return Work(flops, dense + adapter)


class Ceilings:
    """The fastest large copy (bytes read and written) and the fastest large matrix product of each
    dtype, measured once in the same run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gbps: float | None = None
        self._tflops: dict[torch.dtype, float] = {}

    def gbps(self) -> float:
        """Memory bandwidth of a copy, in 1e9 bytes per second."""
        if self._gbps is None:
            count = COPY_BYTES[self.device.type]
            source = torch.ones(count, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._gbps = 2 * count / self._fastest(lambda: target.copy_(source)) / 1e9
        return self._gbps

    def tflops(self, dtype: torch.dtype) -> float:
        """Speed of a square ``x Wᵀ``, in 1e12 floating-point operations per second."""
        if dtype not in self._tflops:
            side = GEMM_SIDE[self.device.type]
            x = torch.randn(side, side, device=self.device).to(dtype)
            weight = torch.randn(side, side, device=self.device).to(dtype)
            seconds = self._fastest(lambda: F.linear(x, weight))
            self._tflops[dtype] = 2 * side**3 / seconds / 1e12
        return self._tflops[dtype]

    def _fastest(self, call: Callable[[], object]) -> float:
        """Seconds of the shortest call: what the device can do, not what it did on average."""
        return min(time_calls({"": [call]}, ROUNDS, self.device)[""].samples) / 1e3


def speed(
    done: Work, milliseconds: float, ceilings: Ceilings, dtype: torch.dtype
) -> dict[str, float]:
    """The keys of a row that say how fast this work was done, beside the ceilings."""
    seconds, tflops, gbps = milliseconds / 1e3, ceilings.tflops(dtype), ceilings.gbps()
    least = max(done.flops / (tflops * 1e12), done.bytes / (gbps * 1e9))
    return {
        "tflops": done.flops / seconds / 1e12,
        "gbps": done.bytes / seconds / 1e9,
        "roofline_share": least / seconds,
        "ceiling_tflops": tflops,
        "ceiling_gbps": gbps,
    }
