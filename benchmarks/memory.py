"""How much memory a call needs, counted by PyTorch's allocators on either kind of device."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Memory", "memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before a call: held by its result, and the most on the way."""

    held: int
    peak: int


def memory(call: Callable[[], object], device: torch.device) -> Memory:
    """Count one call; warm it up first, because libraries allocate workspaces in the first call.

    On a CPU the scratch memory inside libraries is not seen, nor that a block which was allocated
    before the call is freed by it.
    """
    return _cuda_memory(call, device) if device.type == "cuda" else _cpu_memory(call)


def _cuda_memory(call: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return Memory(held, peak)


def _cpu_memory(call: Callable[[], object]) -> Memory:
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with _standard_error_closed():
        profiler.start()
    try:
        # Held until the profiler has stopped: freeing it is not part of the call.
        result = call()
    finally:
        with _standard_error_closed():
            profiler.stop()
    del result
    # PyTorch's stubs leave out what an event carries.
    recorded: Any = profiler.profiler
    events = sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    levels = list(itertools.accumulate(sizes, initial=0))
    return Memory(levels[-1], max(levels))


@contextlib.contextmanager
def _standard_error_closed() -> Iterator[None]:
    """Kineto logs every start and stop on descriptor 2, whatever log level it is given."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
