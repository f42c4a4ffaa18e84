"""The two ceilings of the roofline, measured on the device at hand in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["Ceilings"]

# Far larger than a cache, and a product large enough that its edges do not show.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
REPEATS = 10
SECONDS = 1.5


class Ceilings:
    """The fastest large copy (bytes read and written) and the fastest large GEMM of each dtype."""

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
            seconds = _fastest(lambda: target.copy_(source), self.device)
            self._gbps = 2 * count / seconds / 1e9
        return self._gbps

    def tflops(self, dtype: torch.dtype) -> float:
        """Speed of a square ``x Wᵀ``, in 1e12 floating-point operations per second."""
        if dtype not in self._tflops:
            side = GEMM_SIDE[self.device.type]
            x = torch.randn(side, side, device=self.device).to(dtype)
            weight = torch.randn(side, side, device=self.device).to(dtype)
            seconds = _fastest(lambda: F.linear(x, weight), self.device)
            self._tflops[dtype] = 2 * side**3 / seconds / 1e12
        return self._tflops[dtype]


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of several calls: what the device can do, not what it did on average."""
    call()
    if device.type == "cuda":
        return _fastest_on_cuda(call)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < REPEATS and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _fastest_on_cuda(call: Callable[[], object]) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return min(before.elapsed_time(after) for before, after in pairs) / 1e3
