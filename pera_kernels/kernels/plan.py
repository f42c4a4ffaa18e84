"""What an op does, recorded once for a configuration and repeated with new pointers.

To launch a kernel through Triton's binder costs the host more than the launch itself, to choose its
tiles, splits and arguments as much again, and both come to the same for the same shapes, strides,
dtypes, options and device (``benchmarks.host`` has the times). The second call of an op with a
configuration therefore runs it twice: as always, which compiles the kernels, and on fake tensors,
which shows what launches and PyTorch operators it consists of and on which memory each works. From
then on a call allocates, fills in pointers and launches.

What has no plan takes the ordinary path: a configuration seen once, pointers that are not aligned,
GPUs other than NVIDIA's, for which Triton specialises on the sizes of tensors too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver

from .launch import Launch, allows_tf32, launching, on_device, start, starting

__all__ = ["Operation", "Recorder", "run"]

# Each a tensor or None.
Tensors = Sequence[Any]
Op = Callable[..., list[torch.Tensor]]
# Slots of a table, with offsets in bytes, that point into one piece of memory.
Pointers = list[tuple[int, int]]

# Triton compiles one kernel for pointers that this divides, another for those that it does not.
ALIGNMENT = 16
# Blocks of scratch memory start at multiples of this.
BLOCK = 256
# So many configurations are remembered; then it starts anew.
LIMIT = 1024
ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)

# None where a configuration was seen once.
_plans: dict[Any, _Plan | None] = {}
_lock = threading.Lock()


def run(op: Op, tensors: Tensors, *options: Any) -> list[torch.Tensor]:
    """``op(tensors, *options)``, by its plan where there is one.

    An op works on ``tensors``, of which the first is not None, and on what it allocates. It reads
    no values, and what it does depends on nothing that is not part of the key.
    """
    if any(t is not None and t.is_neg() for t in tensors):
        # Kernels read memory, where the sign of such a tensor is not.
        tensors = [t if t is None else t.resolve_neg() for t in tensors]
    device = tensors[0].device
    if not (plannable(device) and starting()):
        return op(tensors, *options)
    pointers, layouts = 0, list[Any]()
    for t in tensors:
        if t is None:
            layouts.append(None)
        else:
            pointers |= t.data_ptr()
            layouts.append((t.shape, t.stride(), t.dtype))
    if pointers % ALIGNMENT:
        return op(tensors, *options)
    key = (op, options, device, *layouts, *_settings())
    plan = _plans.get(key)
    if plan is not None:
        return plan.run(tensors)
    with _lock:
        seen = key in _plans
        if len(_plans) >= LIMIT:
            _plans.clear()
        _plans[key] = None
    if not seen:
        return op(tensors, *options)
    compiled: list[Any] = []
    with launching(lambda launch: compiled.append(start(launch))):
        results = op(tensors, *options)
    _plans[key] = _record(op, tensors, options, compiled)
    return results


def plannable(device: torch.device) -> bool:
    """Whether launches there are specialised on nothing but what the key holds."""
    inspects = getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None
    return device.type == "cuda" and torch.version.hip is None and not inspects


def _settings() -> tuple[Any, ...]:
    """What else decides which kernel a launch is compiled to."""
    return (
        allows_tf32(),
        knobs.runtime.debug,
        getattr(knobs.compilation, "instrumentation_mode", None),
        getattr(knobs.compilation, "fpsan_homomorphic_casts", None),
    )


class Operation(NamedTuple):
    """A call of a PyTorch operator, and what it returned."""

    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: torch.Tensor


class Recorder(TorchDispatchMode):
    """Notes, among the launches, which operators compute, and what is allocated. Views need not be
    repeated: they are known by the memory they lie in. In inference mode ``contiguous`` comes here
    too, which may be none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Launch | Operation] = []
        self.allocated: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in ALLOCATIONS:
            self.allocated.append(result)
        elif _is_tensor(result) and not (func.is_view and _storage(result) == _storage(args[0])):
            self.steps.append(Operation(func, args, kwargs, result))
        return result


class _Part(NamedTuple):
    """A tensor by the number of the memory it lies in; all of it where there is no layout."""

    number: int
    layout: tuple[Any, Any, int] | None

    def of(self, memory: list[torch.Tensor]) -> torch.Tensor:
        whole = memory[self.number]
        if self.layout is None:
            return whole
        shape, stride, offset = self.layout
        return whole.as_strided(shape, stride, whole.storage_offset() + offset)


class _Start(NamedTuple):
    """The launch of a compiled kernel on its grid, with arguments from the table."""

    kernel: Callable[..., None]
    arguments: Callable[[list[Any]], tuple[Any, ...]]

    def run(self, table: list[Any], memory: list[Any], stream: int) -> None:
        self.kernel(*self.arguments(table), stream=stream)


class _Call(NamedTuple):
    """The call of an operator; its result is new memory unless ``pointers`` is None."""

    operator: Callable[..., torch.Tensor]
    arguments: list[Any]
    pointers: Pointers | None

    def run(self, table: list[Any], memory: list[Any], stream: int) -> None:
        arguments = [a.of(memory) if type(a) is _Part else a for a in self.arguments]
        result = self.operator(*arguments)
        if self.pointers is not None:
            memory.append(result)
            _point(table, self.pointers, result)


class _Plan(NamedTuple):
    """The steps of an op for one configuration.

    Memory has numbers: the tensors that are given, those that are allocated (the last holds all
    that only kernels see), then what operators return. Launches take their arguments from a table
    of constants and pointers.
    """

    device: torch.device
    allocated: list[tuple[Any, Any, torch.dtype]]
    table: list[Any]
    pointers: list[Pointers]
    steps: list[_Start | _Call]
    results: list[_Part]

    def run(self, tensors: Tensors) -> list[torch.Tensor]:
        memory, table = list(tensors), self.table.copy()
        with on_device(self.device):
            memory += [_empty(*layout, self.device) for layout in self.allocated]
            for own, pointers in zip(memory, self.pointers, strict=True):
                if pointers:
                    _point(table, pointers, own)
            stream = driver.active.get_current_stream(self.device.index or 0)
            for step in self.steps:
                step.run(table, memory, stream)
        return [part.of(memory) for part in self.results]


def _point(table: list[Any], pointers: Pointers, memory: torch.Tensor) -> None:
    address = memory.data_ptr()
    for slot, offset in pointers:
        table[slot] = address + offset


def _record(op: Op, tensors: Tensors, options: Any, compiled: Iterable[Any]) -> _Plan:
    """The plan of an op whose launches were compiled to these kernels."""
    with FakeTensorMode() as mode:
        # One for all modes, which keeps every configuration for good.
        mode.cache_enabled = False
        given = [
            t if t is None else _empty(t.shape, t.stride(), t.dtype, t.device) for t in tensors
        ]
        with Recorder() as recorder, launching(recorder.steps.append):
            results = op(given, *options)
    device, kernels, steps = tensors[0].device, iter(compiled), list[_Start | _Call]()
    # Operators and callers take tensors; what only kernels see is scratch memory.
    operands = chain(*(own.arguments for own in recorder.steps if isinstance(own, Operation)))
    visible = {_storage(t) for t in chain(results, operands) if _is_tensor(t)}
    allocated = {_storage(t): t for t in recorder.allocated}
    lasting = [t for own, t in allocated.items() if own in visible]
    # By storage: a number, where in that memory it begins, and a tensor that is all of it.
    places = {_storage(t): (n, 0, t) for n, t in enumerate([*given, *lasting]) if t is not None}
    count, scratch = len(given) + len(lasting), 0
    table: list[Any] = []
    pointers: list[Pointers] = [[] for _ in range(count + 1)]
    slots: dict[tuple[int, int], int] = {}

    def slot(value: Any) -> int:
        """Where in the table a launch finds this argument."""
        nonlocal scratch
        if not _is_tensor(value):
            table.append(value)
            return len(table) - 1
        if (storage := _storage(value)) not in places:
            places[storage] = count, scratch, allocated[storage]
            scratch += -(-value.untyped_storage().nbytes() // BLOCK) * BLOCK
        number, begin, _ = places[storage]
        at = number, begin + value.storage_offset() * value.itemsize
        if at not in slots:
            slots[at] = slot(None)
            pointers[number].append((slots[at], at[1]))
        return slots[at]

    def taken(value: Any) -> str:
        """The expression that takes this argument from a table t."""
        if isinstance(value, tuple):
            return f"({''.join(taken(own) + ',' for own in value)})"
        return f"t[{slot(value)}]"

    def part(value: Any) -> Any:
        if not _is_tensor(value):
            return value
        number, _, whole = places[_storage(value)]
        layout = value.shape, value.stride(), value.storage_offset()
        return _Part(number, None if layout == (whole.shape, whole.stride(), 0) else layout)

    for step in recorder.steps:
        if isinstance(step, Launch):
            arguments = taken(tuple(step.arguments[name] for name in step.kernel.arg_names))
            grid = (*step.grid, 1, 1)[:3]
            steps.append(_Start(next(kernels)[grid], eval(f"lambda t: {arguments}")))
            continue
        rest = [own for own in step.arguments if not _is_tensor(own)]
        if any(map(_is_tensor, tree_leaves([rest, step.options]))):
            raise NotImplementedError(
                f"a plan of {step.operator} with tensors in a list or by name"
            )
        new = _storage(step.result) not in places
        parts = [part(own) for own in step.arguments]
        if new:
            places[_storage(step.result)] = len(pointers), 0, step.result
            pointers.append([])
        call = partial(step.operator, **step.options)
        steps.append(_Call(call, parts, pointers[-1] if new else None))
    parts = [part(t) for t in results]
    layouts = [(t.shape, t.stride(), t.dtype) for t in lasting]
    layouts.append((torch.Size([scratch]), (1,), torch.uint8))
    return _Plan(device, layouts, table, pointers[: count + 1], steps, parts)


def _empty(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
