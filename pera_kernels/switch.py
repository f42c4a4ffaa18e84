"""Whether an adapter is switched off, in this call."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

__all__ = ["Switch"]


class Switch:
    """An adapter's switch: off for a thread within :meth:`off`, and in a copy on.

    An autograd ``Function`` that calls a layer again in its backward, as a reentrant checkpoint
    does, finds the adapter as it was in the forward: the state is kept on the Function's ``ctx``.
    """

    def __init__(self, always_off: bool = False) -> None:
        self.always_off = always_off
        # By thread: for every entry the Functions that were running, the innermost first.
        self.entries: dict[int, list[tuple[FunctionCtx, ...]]] = {}
        self.recorded = False

    def __reduce__(self) -> Any:
        return Switch, ()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within this context the adapter is off for this thread. May be nested."""
        thread = threading.get_ident()
        own = self.entries.setdefault(thread, [])
        own.append(tuple(ctx for ctx, _ in _running_functions()))
        try:
            yield
        finally:
            own.pop()
            if not own:
                del self.entries[thread]

    def is_off(self, always_off: bool = False) -> bool:
        """Whether the adapter is off in this call; ``always_off`` is a state that others keep."""
        always_off = always_off or self.always_off
        if not (always_off or self.entries or self.recorded):
            return False
        if torch.compiler.is_compiling():
            return always_off or bool(self.entries)
        entries = self._own_entries()
        off = always_off or () in entries
        # A Function that runs its backward starts as its forward did, whatever is around it now.
        for ctx, is_backward in reversed(_running_functions()):
            if is_backward:
                off = self in getattr(ctx, "pera_switches_off", ())
            elif off:
                ctx.pera_switches_off = {*getattr(ctx, "pera_switches_off", ()), self}  # type: ignore[attr-defined]
                self.recorded = True
            off = off or any(entry and entry[0] is ctx for entry in entries)
        return off

    def _own_entries(self) -> list[tuple[FunctionCtx, ...]]:
        own = self.entries.get(threading.get_ident())
        if own is None and torch._C._current_graph_task_id() != -1:
            # PyTorch's threads run the backward of a thread that has entered.
            return [entry for entries in self.entries.values() for entry in entries]
        return own or []


def _running_functions() -> list[tuple[FunctionCtx, bool]]:
    """(ctx, whether in its backward) of the autograd Functions in this thread's Python stack, the
    innermost first.
    """
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("forward", "backward") and "ctx" in frame.f_code.co_varnames:
            ctx = frame.f_locals.get("ctx")
            if isinstance(ctx, FunctionCtx):
                found.append((ctx, frame.f_code.co_name == "backward"))
        frame = frame.f_back  # type: ignore[assignment]
    return found
