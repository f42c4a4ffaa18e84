"""Time and memory of a training step of the whole layer, contenders taking turns."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from ..layers import Layer
from ..memory import memory
from ..timing import MIN_ROUNDS, Timing

__all__ = ["PHASES", "phase_call", "saved_bytes", "time_calls"]

# Forward and backward; the same and AdamW on what is trained.
PHASES = ("both", "step")
LEARNING_RATE = 1e-4
# Where steps are slow there are fewer rounds: a phase stops after this time, but not before it has
# enough rounds for a median.
PHASE_SECONDS = 60.0

KeyT = TypeVar("KeyT", bound=Hashable)


def phase_call(layer: Layer, x: torch.Tensor, dy: torch.Tensor, phase: str) -> Callable[[], object]:
    """A call of one phase; the frozen layer has nothing to optimize, so both are the same there."""
    trained = list(layer.trains.values())
    if phase == "both":
        return lambda: torch.autograd.grad(layer.module(x), [x, *trained], dy)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE) if trained else None

    def step() -> None:
        layer.module(x).backward(dy)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None

    return step


def saved_bytes(layer: Layer, x: torch.Tensor, device: torch.device) -> int:
    """What the forward keeps for the backward besides its input, parameters and output."""
    # What is made once and kept, such as a table, is made in the first call.
    size = layer.module(x).nbytes
    # CUDA's allocator rounds sizes up: the output may count for a little more than it is.
    return max(0, memory(lambda: layer.module(x), device).held - size)


def _sample_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _sample_cuda(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # One call that is not timed keeps the GPU busy while the timed one is launched.
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_calls(
    calls: dict[KeyT, Callable[[], object]], rounds: int, device: torch.device
) -> dict[KeyT, Timing]:
    """Milliseconds of every call in ``rounds`` rounds, or in as many as fit in ``PHASE_SECONDS``.

    A step is long enough to be one sample.
    """
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    timings = {key: Timing(str(key), False) for key in calls}
    shuffled, order = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        for number in range(rounds):
            if number >= MIN_ROUNDS and time.perf_counter() - began > PHASE_SECONDS:
                break
            # Nobody always follows the same one, whose traces differ from another's.
            order.shuffle(shuffled)
            for key in shuffled:
                timings[key].samples.append(sample(calls[key]))
    finally:
        gc.enable()
    return timings
