"""How much memory a call needs, counted by PyTorch's allocators on either kind of device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .profiling import profiled

__all__ = ["Memory", "memory", "peak_bytes"]


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before a call: held by its result, and the most on the way."""

    held: int
    peak: int


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``call`` holds at once above what was allocated before it.

    Warm it up first: libraries allocate their workspaces in the first call.
    """
    return memory(call, device).peak


def memory(call: Callable[[], object], device: torch.device) -> Memory:
    """Count one call of ``call``; on a CPU the scratch memory inside libraries is not seen.

    What was allocated before and is freed by the call is taken off on CUDA; on a CPU the profiler
    does not see such a block leave.
    """
    if device.type == "cuda":
        return _cuda_memory(call, device)
    return _cpu_memory(call)


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
    with profiled(torch.profiler.ProfilerActivity.CPU, memory=True) as recording:
        # Held until the profiler has stopped: freeing it is not part of the call.
        result = call()
    del result
    sizes = (event.nbytes() for event in recording.events if event.name() == "[memory]")
    levels = list(itertools.accumulate(sizes, initial=0))
    return Memory(levels[-1], max(levels))
