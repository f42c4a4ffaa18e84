"""What a call costs besides its work: how much it makes the GPU run, and the host's own time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from .profiling import profiled

__all__ = ["host_us", "launches"]

# The kernel of torch.cuda._sleep. On one stream it stands between one call's kernels and another's.
MARKER = "spin_kernel"
HOST_REPEATS = 15


def launches(
    calls: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, int | None]:
    """Kernels, copies and fills that the GPU runs in one call of each; None where none is asked.

    One profiling session counts all: starting one takes longer than the calls. Everything has to
    be on the current stream. None too if the profiler lost a marker.
    """
    if device.type != "cuda":
        return dict.fromkeys(calls)
    with profiled(torch.profiler.ProfilerActivity.CUDA, memory=False) as recording:
        for call in calls.values():
            torch.cuda._sleep(1)
            call()
        torch.cuda._sleep(1)
        torch.cuda.synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [event.name() for event in recording.events if event.device_type() == on_gpu]
    return dict(zip(calls, count_between_markers(names, len(calls)), strict=True))


def count_between_markers(names: Sequence[str], count: int) -> Sequence[int | None]:
    """How many names stand behind each of ``count`` markers; the last marker closes the list."""
    marks = [index for index, name in enumerate(names) if MARKER in name]
    if len(marks) != count + 1:
        return [None] * count
    return [after - before - 1 for before, after in zip(marks, marks[1:], strict=False)]


def host_us(call: Callable[[], object], device: torch.device) -> float | None:
    """Microseconds in which the host issues one call, to a GPU with nothing left to do; median.

    None on a CPU, where issuing a call and computing it are one.
    """
    if device.type != "cuda":
        return None
    times = []
    for _ in range(HOST_REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times) * 1e6
