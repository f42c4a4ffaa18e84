"""Adapted layers that share their input (q, k and v; gate and up) read it once in the forward.

Which layers they are is said by a table of names. Outputs wait only inside one call of the parent's
forward; a layer that is called from anywhere else computes alone.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import functional
from ..autograd import autocast_dtype
from ..checks import check_model
from ..module import PeraOverModule
from ..operands import Base, Factors, Options
from .hooks import OwnHook, remove_hooks

__all__ = ["SHARED_INPUTS", "SharedInputs", "check_shared_inputs", "share", "shared_inputs"]

# Children that their parent calls on one tensor, by their names in widespread models.
SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


SharedCall = tuple[Base, Factors, Options]


class _Waiting(NamedTuple):
    """An output that is computed and not yet asked for, and what it was computed from."""

    call: SharedCall
    state: tuple[Any, ...]
    finish: Callable[[], torch.Tensor]


class _Member(Protocol):
    """A layer that may be computed together with others: ``PeraLinear``, or PEFT's layer."""

    def shared_call(self, x: torch.Tensor) -> SharedCall | None: ...


class _Call:
    """One call of the parent's forward: the first member that is asked for computes all."""

    def __init__(self, members: Sequence[_Member], frame: FrameType) -> None:
        self.members = members
        # That of the parent's call, which a KeyboardInterrupt ends without a word.
        self.frame = frame
        # An exception that is being handled while the call starts is not one of the call.
        self.handled = sys.exc_info()[1]
        self.computed = False
        self.x: torch.Tensor | None = None
        self.waiting: dict[_Member, _Waiting] = {}

    def runs(self) -> bool:
        """Whether the parent's call is still going on: its frame is a few frames up."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def compute(self, layer: _Member, x: torch.Tensor) -> None:
        """Compute the outputs of ``layer`` and of those that can be computed with it."""
        calls = {m: call for m in self.members if _shares(call := m.shared_call(x))}
        own = calls.get(layer)
        if own is None or type(x) not in (torch.Tensor, nn.Parameter) or x.is_inference():
            return
        kind = _kind(own)
        together = {m: call for m, call in calls.items() if _kind(call) == kind}
        self.computed = True
        if len(together) < 2:
            return
        bases, adapters, _ = zip(*together.values(), strict=True)
        outputs = functional.apply_together(x, bases, adapters, own[2])
        if outputs is None:
            return
        self.x = x
        self.waiting = {
            member: _Waiting(call, _state(x, call), output)
            for (member, call), output in zip(together.items(), outputs, strict=True)
        }

    def take(self, layer: _Member, x: torch.Tensor) -> torch.Tensor | None:
        """The output of ``layer``, if it waits for this very x and nothing has changed since."""
        waiting = self.waiting.get(layer)
        if waiting is None or x is not self.x:
            return None
        call = layer.shared_call(x)
        if call is None or call[2] != waiting.call[2] or _state(x, call) != waiting.state:
            return None
        del self.waiting[layer]
        return waiting.finish()


def _shares(call: SharedCall | None) -> TypeGuard[SharedCall]:
    """Whether a layer may be computed together with others: with plain parameters, on a frozen
    base, without dropout, whose mask has to be the same when a checkpoint computes again.

    Inference tensors have no version: a write to one could not be seen.
    """
    if call is None:
        return False
    base, _, options = call
    return (
        options.dropout_p == 0.0
        and options.backend != "reference"
        and options.plan != "composed"
        and all(type(t) is nn.Parameter and not t.is_inference() for t in _tensors(call))
        and not any(t is not None and t.requires_grad for t in base)
    )


def _tensors(call: SharedCall) -> list[torch.Tensor]:
    base, adapter, _ = call
    return [t for t in (*base, *adapter) if t is not None]


def _kind(call: SharedCall) -> tuple[Any, ...]:
    """What layers have in common that are computed together."""
    base, adapter, options = call
    dtypes = [t.dtype for t in (base.weight, *adapter) if t is not None]
    own_bias = base.bias is not None and base.bias.dtype != base.weight.dtype  # type: ignore[union-attr]
    return options, adapter.A.shape, dtypes, own_bias, adapter.A.device


def _state(x: torch.Tensor, call: SharedCall) -> tuple[Any, ...]:
    """What must be the same when an output is asked for as when it was computed."""
    return (
        x._version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_dtype(x.device.type),
        _stream(x.device),
        [(id(t), t._version) for t in _tensors(call)],
    )


def _stream(device: torch.device) -> int | None:
    """Where a GPU computes: another stream waits neither for outputs nor for gradients."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


class _PerThread(threading.local):
    call: _Call | None = None


class SharedInputs(OwnHook):
    """Children of one module that are called on one tensor: the first one computes all.

    Hooks of the parent open and close the group. It dissolves for good once it computed something
    that a completed call of the parent did not ask for; a call that ends in an exception, as the
    recomputation of a checkpoint does, only frees what waits.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.dissolved = False
        self._thread = _PerThread()

    def watch(self, parent: nn.Module) -> None:
        """Register the hooks of the parent."""
        self.register(parent.register_forward_pre_hook, self.open)
        self.register(parent.register_forward_hook, self.close, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_thread": _PerThread()})

    def open(self, parent: nn.Module, _: Any) -> None:
        """The parent's forward starts."""
        if torch.compiler.is_compiling() or self.dissolved:
            return
        children = [parent._modules.get(name) for name in self.names]
        members = [m for m in children if getattr(m, "shared_inputs", None) is self]
        self._thread.call = _Call(members, sys._getframe(1))  # type: ignore[arg-type]

    def close(self, parent: nn.Module, _: Any, __: Any) -> None:
        """The parent's forward ended, in an exception or not. PyTorch does not call it after a
        ``KeyboardInterrupt``.
        """
        if torch.compiler.is_compiling():
            return
        call, self._thread.call = self._thread.call, None
        if call is not None and call.waiting and sys.exc_info()[1] is call.handled:
            self.dissolved = True

    def take(self, layer: _Member, x: torch.Tensor) -> torch.Tensor | None:
        """The output of ``layer``, computed together with others; None to compute it alone."""
        if torch.compiler.is_compiling() or (call := self._thread.call) is None:
            return None
        if not call.runs():
            self._thread.call = None
            return None
        # What is traced must not depend on what was computed outside of the trace.
        if is_in_torch_dispatch_mode():
            return None
        if not call.computed:
            call.compute(layer, x)
        return call.take(layer, x)


def check_shared_inputs(names: object) -> list[tuple[str, ...]]:
    """The groups of names as tuples, no name in two of them; an error names the argument."""
    groups = list(names) if isinstance(names, (list, tuple)) else None
    if groups is None or not all(
        isinstance(group, (list, tuple))
        and len(group) > 1
        and all(isinstance(name, str) and name for name in group)
        for group in groups
    ):
        raise ValueError(
            "shared_inputs must be a list of tuples of at least two names of children, such as "
            f"[('q_proj', 'k_proj', 'v_proj')], or () for none; got {names!r}"
        )
    twice = [name for name, count in Counter(n for g in groups for n in g).items() if count > 1]
    if twice:
        raise ValueError(f"shared_inputs has {', '.join(map(repr, twice))} more than once")
    return [tuple(group) for group in groups]


def shared_inputs(
    model: nn.Module, names: Sequence[Sequence[str]] = SHARED_INPUTS
) -> dict[str, tuple[str, ...]]:
    """Say which adapted layers of ``model`` share their input, in place of what was said before.

    For every module of ``model``, adapted children with the names of one group are computed
    together when the module calls them on the same tensor: the kernels read x once in the forward.
    A call with another tensor, on another stream, changed parameters, dropout, hooks, sharded or
    quantized weights makes a layer compute alone, as does ``torch.compile``. Outputs wait only
    inside one call of that module's forward; a group dissolves for good where one of them is not
    asked for.

    Args:
        names: groups of names of children; the default is a table of widespread ones
            (``q_proj, k_proj, v_proj``; ``query, key, value``; ``gate_proj, up_proj``; ``w1, w3``).
            ``()`` ends all sharing.

    Returns:
        The children's names by the name of their parent.

    Raises:
        ValueError: ``names`` is not a list of groups of at least two names.
    """
    check_model(model)
    groups = check_shared_inputs(names)
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        together = share(module, groups)
        if together:
            found[path] = together
    return found


def share(module: nn.Module, groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Group the adapted children of one module; returns the names of those that are grouped."""
    dissolved = {group.names for group in remove_hooks(module, SharedInputs) if group.dissolved}
    for child in module.children():
        if hasattr(child, "shared_call"):
            child.shared_inputs = None  # type: ignore[assignment]
    found: tuple[str, ...] = ()
    for names in groups:
        children = {name: module._modules.get(name) for name in names}
        members = {
            name: child
            for name, child in children.items()
            if hasattr(child, "shared_call") and not isinstance(child, PeraOverModule)
        }
        if len(set(members.values())) < 2 or tuple(members) in dissolved:
            continue
        group = SharedInputs(tuple(members))
        for member in members.values():
            member.shared_inputs = group  # type: ignore[union-attr, assignment]
        group.watch(module)
        found += tuple(members)
    return found
