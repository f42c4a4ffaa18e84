"""Tiles of one kernel timed against each other on a GPU, after each has shown that it is right.

A sample is a CUDA graph of launches on operands rotated past the L2; tiles take turns, in each
round in another order.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from pera_kernels.configs import Tile
from pera_kernels.verify.numerics import judge

from .problems import Operands, Problem, using

__all__ = ["CACHE_MULTIPLE", "Timed", "operand_sets", "time_calls", "time_tiles", "wrong"]

CACHE_MULTIPLE = 3
MAX_SETS = 32
SAMPLE_MS = 1.0
# Calls in a graph, so that the gap between replays does not count; replays in a sample.
CALLS_PER_GRAPH = 16
MAX_REPLAYS = 50
Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a launch by round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        fifths = statistics.quantiles(self.samples, n=5, method="inclusive")
        return fifths[0], fifths[3]

    def ratio_to(self, other: Timed) -> float:
        """The median over rounds of this time over the other's in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def operand_sets(problem: Problem, device: torch.device) -> list[Operands]:
    """Operands in as many places as it takes to miss the L2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MAX_SETS, math.ceil(CACHE_MULTIPLE * cache / max(1, problem.bytes())))
    return [Operands(problem, device, seed=seed) for seed in range(count)]


def time_calls(calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timed]:
    """Time each name's calls, taken in rotation, as a CUDA graph; on the current stream, which must
    not be the default one.
    """
    graphs = {name: _captured(own) for name, own in calls.items()}
    replays = {
        name: min(MAX_REPLAYS, math.ceil(SAMPLE_MS / max(_replayed(graph, 1), 1e-3)))
        for name, (graph, _) in graphs.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            graph, count = graphs[name]
            samples[name].append(_replayed(graph, replays[name]) / (replays[name] * count))
    return {name: Timed(tuple(own)) for name, own in samples.items()}


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of whole rotations, and how many calls it makes."""
    for call in calls:
        call()
    rotations = math.ceil(CALLS_PER_GRAPH / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rotations):
            for call in calls:
                call()
    # The first replay uploads the graph.
    graph.replay()
    return graph, rotations * len(calls)


def _replayed(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Milliseconds of so many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_tiles(
    problem: Problem, tiles: Sequence[Tile], table: str, device: torch.device, rounds: int
) -> list[Timed]:
    """Times of each tile, in order."""
    sets = operand_sets(problem, device)

    def within(tile: Tile, operands: Operands) -> Call:
        def call() -> object:
            with forced(tile, table, problem):
                return operands.launch()

        return call

    calls = {
        str(number): [within(tile, operands) for operands in sets]
        for number, tile in enumerate(tiles)
    }
    return list(time_calls(calls, rounds).values())


def forced(tile: Tile | None, table: str, problem: Problem) -> AbstractContextManager[None]:
    """With ``tile`` in a table; None is the tile that the kernel has."""
    return nullcontext() if tile is None else using(table, problem.kernel, problem.kind, tile)


def wrong(
    problem: Problem, tiles: Sequence[Tile | None], table: str, device: torch.device | str
) -> list[str]:
    """For each tile what is wrong with its results, "" if they pass the numeric rule.

    The reference of the first tile, the present one, is the rounded truth; its results are the
    reference of the others.
    """
    operands = Operands(problem, device, in_place=False)
    truth = operands.truth()
    reference: dict[str, torch.Tensor] = {}
    found = []
    for tile in tiles:
        with forced(tile, table, problem):
            got = operands.outputs()
        reference = reference or {name: truth[name].to(got[name].dtype) for name in got}
        verdicts = [
            judge(name, got[name], reference[name], truth[name], problem.dtype) for name in truth
        ]
        found.append("; ".join(str(verdict) for verdict in verdicts if not verdict.passed))
        if len(found) == 1:
            reference = got
    return found
