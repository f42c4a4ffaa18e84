"""PyTorch's profiler around a few calls, without what it writes to the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Recording", "profiled"]


class Recording:
    """What a profiler saw, once it has stopped."""

    def __init__(self) -> None:
        self.events: list[Any] = []


@contextlib.contextmanager
def profiled(activity: torch.profiler.ProfilerActivity, *, memory: bool) -> Iterator[Recording]:
    """Record the body; ``events`` are Kineto's, in the order in which they started."""
    recording = Recording()
    profiler = torch.profiler.profile(activities=[activity], profile_memory=memory)
    with _standard_error_closed():
        profiler.start()
    try:
        yield recording
    finally:
        with _standard_error_closed():
            profiler.stop()
    # PyTorch's stubs leave out what an event carries.
    recorded: Any = profiler.profiler
    recording.events = sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns())


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
