"""How calls are timed: contenders take turns in every round, on inputs too many for the cache."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from pera_kernels.kernels import interpreting

__all__ = ["Call", "Name", "Timing", "host_us", "place", "set_count", "time_calls"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

# Inputs are rotated past this many times the last-level cache; tiny ones stop at MAX_SETS.
CACHE_MULTIPLE = 3
MAX_SETS = 40
CPU_CACHE_BYTES = 32 * 2**20
# On a GPU a sample is so many calls, in whole rotations, unless MIN_ROUNDS of them, all contenders
# together, would take longer than the budget.
GPU_CALLS = 40
GPU_BUDGET_S = 30.0
# On a CPU it is so many calls, or as many as take so long.
CPU_CALLS = 100
CPU_SAMPLE_MS = 2.0
# A call that takes this long on a CPU fills the cache with its own in a small part of it.
SWEEP_BELOW_MS = 50.0
# Where calls are slow there are fewer rounds: timing stops after so long, but not before there are
# enough rounds for a median.
SECONDS = 20.0
MIN_ROUNDS = 7
HOST_REPEATS = 15


@dataclass
class Timing:
    """Milliseconds per call by round; ``graph`` if a CUDA graph was replayed.

    On a GPU ``eager`` has the times of the same number of calls, issued one by one, and is this
    very object where there is no graph.
    """

    graph: bool = False
    calls: int = 0
    note: str = ""
    samples: list[float] = field(default_factory=list)
    eager: Timing | None = field(default=None, repr=False, compare=False)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def keys(self) -> dict[str, Any]:
        """The keys of a row that say what was timed; spread is by the 20th and 80th percentile."""
        fifths = statistics.quantiles(self.samples, n=5, method="inclusive")
        times = {"median_ms": self.median, "p20_ms": fifths[0], "p80_ms": fifths[3]}
        if self.eager is not None:
            times |= {"eager_ms": self.eager.median, "calls": self.calls}
        return {**times, "graph": self.graph, "rounds": len(self.samples), "note": self.note}

    def ratio_to(self, other: Timing) -> float:
        """The median over rounds of this time over the other's in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@contextlib.contextmanager
def place(device: torch.device) -> Iterator[None]:
    """Run everything inside on one stream of the device.

    It is not the default stream, which cannot be captured; autograd runs a backward on the stream
    of its forward, so both have to be on this one.
    """
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def set_count(touched: int, device: torch.device) -> int:
    """In how many places inputs of so many bytes have to be to miss the last-level cache."""
    cache = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, math.ceil(CACHE_MULTIPLE * cache / max(1, touched)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls_per_sample(
    calls: Mapping[Name, Sequence[Call]], device: torch.device
) -> tuple[int, str]:
    """The same number of warm calls for everybody, and a note if a budget makes it smaller."""
    if interpreting():
        # A dry run, whose kernels take a thousand times as long.
        return 1, ""
    own = next(iter(calls.values()))
    _synchronize(device)
    start = time.perf_counter()
    _run(itertools.cycle(own), 3)
    _synchronize(device)
    milliseconds = (time.perf_counter() - start) * 1e3 / 3
    if device.type == "cpu":
        return max(1, min(CPU_CALLS, math.ceil(CPU_SAMPLE_MS / milliseconds))), ""
    rotations = math.ceil(GPU_CALLS / len(own))
    # A graph is replayed twice for a sample, and the eager calls follow. Only milliseconds of a
    # call reach the budget, and the host hardly slows such a call down.
    seconds = 3 * rotations * len(own) * milliseconds / 1e3 * len(calls) * MIN_ROUNDS
    if seconds <= GPU_BUDGET_S:
        return rotations * len(own), ""
    count = max(1, int(rotations * GPU_BUDGET_S / seconds)) * len(own)
    return count, f"{count} calls in a sample: {rotations * len(own)} would take {seconds:.0f} s"


def _cpu_sampler(rotation: Iterator[Call], count: int) -> Callable[[], float]:
    sweep = not interpreting()

    def sample() -> float:
        nonlocal sweep
        # One call that is not timed sweeps out what the contender before left behind.
        _run(rotation, int(sweep))
        start = time.perf_counter()
        _run(rotation, count)
        milliseconds = (time.perf_counter() - start) * 1e3 / count
        sweep = sweep and milliseconds < SWEEP_BELOW_MS
        return milliseconds

    return sample


def _cuda_sampler(run: Call, count: int, before: Call) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        # What is not timed keeps the GPU busy while the first timed call is launched.
        before()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    return sample


def _captured(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    """``count`` warm calls in one CUDA graph, on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _run(itertools.cycle(calls), count)
    return graph


def time_calls(
    calls: Mapping[Name, Sequence[Call]],
    rounds: int,
    device: torch.device,
    eager: Collection[Name] = (),
) -> dict[Name, Timing]:
    """Time the calls of every name, taken in rotation, for so many rounds.

    A sample is the same number of calls for everybody. On a GPU they are replayed as a CUDA graph,
    and timed again as Python issues them. Those in ``eager`` have no graph, nor have calls that
    cannot be captured, whose ``note`` says so.
    """
    for own in calls.values():
        _run(itertools.cycle(own), 1 if interpreting() else max(3, len(own)))
    count, note = _calls_per_sample(calls, device)
    timings = {name: Timing(calls=count, note=note) for name in calls}
    samplers: list[tuple[Timing, Callable[[], float]]] = []
    turn = itertools.count()
    for name, own in calls.items():
        # All contenders draw on one counter: nobody is handed what the one before just read.
        rotation = (own[next(turn) % len(own)] for own in itertools.repeat(own))
        timing = timings[name]
        if device.type == "cpu":
            samplers.append((timing, _cpu_sampler(rotation, count)))
            continue
        timing.eager = timing
        if name not in eager:
            try:
                replay = _captured(own, count).replay
            except RuntimeError as error:
                reason = f"no CUDA graph: {error!r}".splitlines()[0]
                timing.note = "; ".join(filter(None, (note, reason)))
            else:
                timing.graph, timing.eager = True, Timing()
                samplers.append((timing, _cuda_sampler(replay, count, replay)))
        run, first = (functools.partial(_run, rotation, size) for size in (count, len(own)))
        samplers.append((timing.eager, _cuda_sampler(run, count, first)))
    _rounds(samplers, rounds)
    return timings


def _run(calls: Iterable[Call], count: int) -> None:
    for call in itertools.islice(calls, count):
        call()


def _rounds(samplers: Sequence[tuple[Timing, Callable[[], float]]], rounds: int) -> None:
    order, shuffle = list(samplers), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        # There is no spread of a single sample.
        for number in range(max(2, rounds)):
            if number >= MIN_ROUNDS and time.perf_counter() - began > SECONDS:
                break
            # Nobody always follows the same one, whose traces differ from another's.
            shuffle(order)
            for timing, sample in order:
                timing.samples.append(sample())
    finally:
        gc.enable()


def host_us(call: Call, device: torch.device) -> float | None:
    """Microseconds in which the host issues one warm call to an idle GPU; None on a CPU."""
    if device.type == "cpu":
        return None
    times = []
    for _ in range(HOST_REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times) * 1e6
