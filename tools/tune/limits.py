"""Where the ways to form a projection's expansion cross: the limit of ``pera_kernels.plans``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from unittest import mock

import torch

from pera_kernels import plans
from pera_kernels.terms import coefficient_count

from .measure import CACHE_MULTIPLE, MAX_SETS, Timed, time_calls

__all__ = ["TOKENS", "WAYS", "suggested", "time_ways"]

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# Formed on chip for every block of tokens, or once in memory.
WAYS = ("chip", "memory")
FEATURES, R = 4096, 16


class _Update:
    """The low-rank update of a 4096 x 4096 layer's forward at r=16, full, bfloat16, in place."""

    def __init__(self, T: int, device: torch.device) -> None:
        from pera_kernels import launch

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        y = normal(T, FEATURES)
        a = launch.Factor(normal(R, FEATURES), None, R, "full")
        h = normal(coefficient_count(R, "full"))
        b = launch.Factor(normal(FEATURES, R).t(), h, R, "full")
        self.sources = [launch.Source(normal(T, FEATURES), a)]
        self.sinks = [launch.Sink(b, y, y)]

    def __call__(self) -> object:
        from pera_kernels import launch

        return launch.update(self.sources, self.sinks, scale=0.5)


def _forced(update: _Update, way: str) -> Callable[[], object]:
    def call() -> object:
        least = 0 if way == "memory" else 1 << 62
        with mock.patch.object(plans, "EXPANDED_SOURCE_TOKENS", least):
            return update()

    return call


def time_ways(T: int, device: torch.device, rounds: int) -> dict[str, Timed]:
    """Times of an update of ``T`` tokens by the way it is computed."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    touched = 2 * 3 * T * FEATURES + 2 * 2 * R * FEATURES
    sets = min(MAX_SETS, math.ceil(CACHE_MULTIPLE * cache / touched))
    updates = [_Update(T, device) for _ in range(sets)]
    calls = {way: [_forced(update, way) for update in updates] for way in WAYS}
    return time_calls(calls, rounds)


def suggested(times: Mapping[int, Mapping[str, float]]) -> int | None:
    """The least of the token counts from which on "memory" is nowhere slower; None if it is slower
    at the largest.
    """
    least = None
    for T in sorted(times, reverse=True):
        if times[T]["memory"] > times[T]["chip"]:
            break
        least = T
    return least
