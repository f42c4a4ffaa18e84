"""How it is timed: contenders take turns in every round, on inputs too many for the cache."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.autograd.graph import increment_version

from pera_kernels.verify.numerics import Inputs

from .layers import FROZEN, Layer
from .memory import memory, peak_bytes

__all__ = ["PHASES", "Timing", "input_sets", "peak_mib", "phase_call", "saved_mib", "time_phase"]

PHASES = ("forward", "backward", "both", "eval")

# After so many calls what a layer keeps while its parameters stay as they are is there.
EVAL_CALLS = 4
# A sample is this long, of as many calls as that takes.
SAMPLE_MS = 2.0
MAX_CALLS = 100
# Where the frozen layer is faster than this, launches cost as much as the work.
GRAPH_BELOW_MS = 0.2
# Inputs are rotated past this many times the last-level cache; tiny layers stop at MAX_SETS.
CACHE_MULTIPLE = 3
MAX_SETS = 64
CPU_CACHE_BYTES = 32 * 2**20
# A call that takes this long fills the cache with its own in a small part of it.
SWEEP_BELOW_MS = 50.0
# Where calls are slow there are fewer rounds: a phase stops after this time, but not before it has
# enough rounds for a median.
PHASE_SECONDS = 20.0
MIN_ROUNDS = 7


@dataclass
class Timing:
    """One contender in one phase: milliseconds per call by round, ``graph`` if replayed."""

    name: str
    graph: bool
    note: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        fifths = statistics.quantiles(self.samples, n=5, method="inclusive")
        return fifths[0], fifths[3]

    def ratio_to(self, other: Timing) -> float:
        """The median over rounds of this time over the other's in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size


def input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs in as many places as it takes to miss the cache, x as a leaf."""
    # A forward reads at least these two.
    touched = max(1, inputs.x.nbytes + inputs.weight.nbytes)
    count = min(MAX_SETS, math.ceil(CACHE_MULTIPLE * _cache_bytes(device) / touched))
    return [
        replace(
            inputs,
            x=inputs.x.detach().clone().requires_grad_(),
            weight=inputs.weight.clone(),
            dy=inputs.dy.clone(),
        )
        for _ in range(count)
    ]


def phase_call(layer: Layer, inputs: Inputs, phase: str) -> Callable[[], object]:
    """A call of one phase; a backward runs again and again over one forward.

    The layer is left in evaluation mode for "eval", which computes y alone with parameters that
    stay as they are, and in training mode for the others. Before a "forward" or "both" parameters
    count as changed, as an optimizer's step leaves them.
    """
    module, x, dy = layer.module, inputs.x, inputs.dy
    module.train(phase != "eval")
    trained = list(layer.trains.values())
    leaves = [x, *trained]

    def forward() -> torch.Tensor:
        increment_version(trained)
        return module(x)

    if phase == "forward":
        return forward
    if phase == "eval":
        return torch.no_grad()(lambda: module(x))
    if phase == "both":
        return lambda: torch.autograd.grad(forward(), leaves, dy)
    y = module(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def saved_mib(layer: Layer, inputs: Inputs, device: torch.device) -> float:
    """What the forward keeps for the backward besides inputs, parameters and y."""
    forward = phase_call(layer, inputs, "forward")
    # What is made once and kept, such as an index table, is made in the first call.
    y = forward()
    assert isinstance(y, torch.Tensor)
    size = y.nbytes
    del y
    # CUDA's allocator rounds sizes up: y may count for a little more than it is.
    return max(0, memory(forward, device).held - size) / 2**20


def peak_mib(layer: Layer, inputs: Inputs, phase: str, device: torch.device) -> float:
    """The most memory one call holds above inputs and parameters.

    In the backward that includes the output and what the forward kept.
    """
    # Libraries allocate their workspaces in the first call.
    phase_call(layer, inputs, phase)()
    held = 0
    if phase == "backward":
        held = memory(phase_call(layer, inputs, "forward"), device).held
    return (held + peak_bytes(phase_call(layer, inputs, phase), device)) / 2**20


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(calls: list[Callable[[], object]], phase: str, device: torch.device) -> float:
    """Call everything once, ``EVAL_CALLS`` times for "eval"; milliseconds of a call after that."""
    count = len(calls) * (EVAL_CALLS if phase == "eval" else 1)
    for call in itertools.islice(itertools.cycle(calls), max(3, count)):
        call()
    _synchronize(device)
    start = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), 3):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3 / 3


def _cpu_sampler(
    calls: Iterator[Callable[[], object]], repeats: int, sweep: bool
) -> Callable[[], float]:
    def sample() -> float:
        # One call that is not timed sweeps out what the contender before left behind.
        if sweep:
            next(calls)()
        start = time.perf_counter()
        for _ in range(repeats):
            next(calls)()
        return (time.perf_counter() - start) * 1e3 / repeats

    return sample


def _cuda_sampler(run: Callable[[], object], repeats: int, per_run: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        # One run that is not timed keeps the GPU busy while the timed ones are launched.
        run()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (repeats * per_run)

    return sample


def _capture(calls: list[Callable[[], object]], count: int) -> torch.cuda.CUDAGraph:
    """``count`` calls in one CUDA graph, on the current stream, where they were warmed up.

    That must not be the default stream, which cannot capture; autograd runs a backward on the
    stream of its forward, so both have to be on this one.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in itertools.islice(itertools.cycle(calls), count):
            call()
    return graph


def time_phase(
    layers: dict[str, list[Layer]],
    sets: list[Inputs],
    phase: str,
    *,
    rounds: int,
    device: torch.device,
    capturable: frozenset[str] = frozenset(),
) -> list[Timing]:
    """Time every contender of ``layers`` (one layer per input set), the frozen one among them, for
    ``rounds`` rounds or as many as fit in ``PHASE_SECONDS``.

    On CUDA, where the frozen layer is short, those ``capturable`` are replayed as CUDA graphs; if
    some are not, the frozen layer is timed both ways, so that each is compared with its like.
    """
    gc.collect()
    calls: dict[str, list[Callable[[], object]]] = {}
    cost: dict[str, float] = {}
    for name, own in layers.items():
        pairs = zip(own, sets, strict=True)
        calls[name] = [phase_call(layer, inputs, phase) for layer, inputs in pairs]
        cost[name] = _warm_up(calls[name], phase, device)

    short = device.type == "cuda" and cost[FROZEN] < GRAPH_BELOW_MS
    turns: list[tuple[Timing, Callable[[], float]]] = []
    eager = dict.fromkeys(layers, "")
    for name in layers if short else ():
        if name in capturable:
            fill = SAMPLE_MS / (cost[name] * len(sets))
            count = len(sets) * max(1, math.ceil(min(fill, MAX_CALLS / len(sets))))
            try:
                graph = _capture(calls[name], count)
            except RuntimeError as error:
                eager[name] = f"no CUDA graph: {error!r}".splitlines()[0]
            else:
                turns.append((Timing(name, True), _cuda_sampler(graph.replay, 1, count)))
                del eager[name]
    if eager and FROZEN not in eager:
        eager[FROZEN] = ""

    turn = itertools.count()
    for name, note in eager.items():
        # All contenders draw on one counter: nobody is handed what the one before just read.
        rotation = (own[next(turn) % len(own)] for own in itertools.repeat(calls[name]))
        repeats = max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / cost[name])))
        if device.type == "cpu":
            sample = _cpu_sampler(rotation, repeats, cost[name] < SWEEP_BELOW_MS)
        else:
            sample = _cuda_sampler(lambda rotation=rotation: next(rotation)(), repeats, 1)  # type: ignore[misc]
        turns.append((Timing(name, False, note), sample))

    shuffled, order = turns.copy(), random.Random(0)
    gc.disable()
    began = time.perf_counter()
    try:
        for number in range(rounds):
            if number >= MIN_ROUNDS and time.perf_counter() - began > PHASE_SECONDS:
                break
            # Nobody always follows the same one, whose traces differ from another's.
            order.shuffle(shuffled)
            for timing, sample in shuffled:
                timing.samples.append(sample())
    finally:
        gc.enable()
    return [timing for timing, _ in turns]
