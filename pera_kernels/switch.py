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
        # By thread: for every entry the innermost Function that was running, or None.
        self.entries: dict[threading.Thread, list[FunctionCtx | None]] = {}
        self.recorded = False

    def __reduce__(self) -> Any:
        return Switch, ()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within this context the adapter is off for this thread. May be nested."""
        thread, running = threading.current_thread(), _running_functions()
        own = self.entries.setdefault(thread, [])
        own.append(running[0][0] if running else None)
        try:
            yield
        finally:
            own.pop()
            if not own:
                del self.entries[thread]

    def is_off(self, always_off: bool = False) -> bool:
        """Whether the adapter is off in this call; ``always_off`` is a state that others keep.

        Code of ``torch.compile`` knows no threads: there it is off if it is so for one of them.
        """
        always_off = always_off or self.always_off
        if not (always_off or self.entries or self.recorded):
            return False
        if torch.compiler.is_compiling():
            return always_off or bool(self.entries)
        entries = self._own_entries()
        off = always_off or None in entries
        # A Function that runs its backward starts as its forward did, whatever is around it now.
        for ctx, is_backward in reversed(_running_functions()):
            if is_backward:
                off = self in getattr(ctx, "pera_switches_off", ())
            elif off:
                ctx.pera_switches_off = {*getattr(ctx, "pera_switches_off", ()), self}  # type: ignore[attr-defined]
                self.recorded = True
            off = off or ctx in entries
        return off

    def _own_entries(self) -> list[FunctionCtx | None]:
        thread = threading.current_thread()
        if thread in self.entries or not isinstance(thread, threading._DummyThread):
            return self.entries.get(thread, [])
        # One of PyTorch's own threads, which run the backward of a thread that may have entered.
        return [entry for entries in self.entries.values() for entry in entries]


def _running_functions() -> list[tuple[FunctionCtx, bool]]:
    """(ctx, whether in its backward) of the autograd Functions in this thread's Python stack, the
    innermost first.
    """
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx):
                found.append((ctx, code.co_name == "backward"))
        frame = frame.f_back  # type: ignore[assignment]
    return found
