"""What an op does, recorded once for a configuration and repeated with new pointers.

To launch a kernel through Triton's binder costs the host some 25 µs, to choose its tiles, splits
and arguments as much again, and both come to the same for the same shapes, strides, dtypes, options
and device. The second call of an op with a configuration therefore does its work twice: as always,
which compiles the kernels, and on fake tensors, which shows the launches and PyTorch operators that
it consists of and the memory that each works on. From then on a call allocates, fills in pointers
and launches.

What has no plan takes the ordinary path: a configuration seen once, pointers that are not aligned,
GPUs other than NVIDIA's, for which Triton specialises on the sizes of tensors too.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from .launch import Launch, launching, on_device, start, starting

__all__ = ["run"]

# Each a tensor or None.
Tensors = Sequence[Any]
Op = Callable[..., list[torch.Tensor]]
Values = list[Any]
Take = Callable[[Values], tuple[Any, ...]]

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
    _plans[key] = _Plan(op, tensors, options, compiled)
    return results


def plannable(device: torch.device) -> bool:
    """Whether launches there are specialised on nothing but what the key holds."""
    inspects = getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None
    return device.type == "cuda" and torch.version.hip is None and not inspects


def _settings() -> tuple[Any, ...]:
    """What else decides which kernel a launch is compiled to."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        knobs.runtime.debug,
        getattr(knobs.compilation, "instrumentation_mode", None),
        getattr(knobs.compilation, "fpsan_homomorphic_casts", None),
    )


class _Operation(NamedTuple):
    """A call of a PyTorch operator."""

    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: torch.Tensor


class _Recorder(TorchDispatchMode):
    """Notes what is allocated and, among the launches, which operators compute. Views need not be
    repeated: they are known by the memory they lie in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Launch | _Operation] = []
        self.allocated: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ALLOCATIONS:
            self.allocated.append(result)
        elif isinstance(result, torch.Tensor) and not func.is_view:
            self.steps.append(_Operation(func, args, kwargs or {}, result))
        return result


class _Part(NamedTuple):
    """A tensor by the number of the memory it lies in; all of it where there is no layout."""

    number: int
    layout: tuple[Any, Any, int] | None

    def of(self, memory: Values) -> torch.Tensor:
        whole: torch.Tensor = memory[self.number]
        if self.layout is None:
            return whole
        shape, stride, offset = self.layout
        return whole.as_strided(shape, stride, whole.storage_offset() + offset)


class _Table:
    """What launches take their arguments from: constants, and pointers into numbered memory."""

    def __init__(self) -> None:
        self.values: Values = []
        # By the number of the memory: slots of the table, with offsets in bytes.
        self.pointers: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._slots: dict[tuple[int, int], int] = {}
        self._memory: dict[int, tuple[int, int, torch.Tensor]] = {}

    def add(self, t: torch.Tensor, number: int, offset: int = 0) -> None:
        """The storage of ``t`` stands for the memory of this number, from so many bytes on."""
        self._memory[_storage(t)] = number, offset, t

    def knows(self, t: torch.Tensor) -> bool:
        return _storage(t) in self._memory

    def part(self, t: torch.Tensor) -> _Part:
        number, _, whole = self._memory[_storage(t)]
        layout = t.shape, t.stride(), int(t.storage_offset())
        return _Part(number, None if layout == (whole.shape, whole.stride(), 0) else layout)

    def slot(self, value: Any) -> int:
        """Where this argument of a launch stands."""
        if not isinstance(value, torch.Tensor):
            self.values.append(value)
            return len(self.values) - 1
        number, begin, _ = self._memory[_storage(value)]
        at = number, begin + int(value.storage_offset()) * value.itemsize
        if at not in self._slots:
            self._slots[at] = self.slot(0)
            self.pointers[number].append((self._slots[at], at[1]))
        return self._slots[at]


class _Start(NamedTuple):
    """The launch of a compiled kernel on its grid."""

    kernel: Callable[..., None]
    arguments: Take
    # Arguments that are tuples, by their slot.
    tuples: list[tuple[int, Take]]

    def run(self, table: Values, memory: Values, stream: int) -> None:
        for slot, take in self.tuples:
            table[slot] = take(table)
        self.kernel(*self.arguments(table), stream=stream)


class _Call(NamedTuple):
    """The call of an operator; ``pointers`` go into what it returns, None if it was in place."""

    operator: Any
    arguments: list[Any]
    options: dict[str, Any]
    pointers: list[tuple[int, int]] | None

    def run(self, table: Values, memory: Values, stream: int) -> None:
        result = self.operator(*_filled(self.arguments, memory), **self.options)
        if self.pointers is not None:
            memory.append(result)
            _point(table, self.pointers, result.data_ptr())


class _Plan:
    """The steps of an op for one configuration.

    Memory has numbers: the tensors that are given, those that are allocated (the last holds all
    that only kernels see), then those that operators return.
    """

    def __init__(self, op: Op, tensors: Tensors, options: Any, compiled: Iterable[Any]) -> None:
        with FakeTensorMode():
            given = [None if t is None else _like(t) for t in tensors]
            with _Recorder() as recorder, launching(recorder.steps.append):
                results = op(given, *options)
        table = _Table()
        for number, t in enumerate(given):
            if t is not None:
                table.add(t, number)
        operations = [own for own in recorder.steps if isinstance(own, _Operation)]
        seen = {_storage(t) for t in _tensors([results, *(own.arguments for own in operations)])}
        lasting = [t for t in recorder.allocated if _storage(t) in seen]
        for number, t in enumerate(lasting, len(given)):
            table.add(t, number)
        scratch, self.allocated = 0, [(t.shape, t.stride(), t.dtype) for t in lasting]
        self.count = len(given) + len(lasting)
        for t in recorder.allocated:
            if _storage(t) not in seen:
                table.add(t, self.count, scratch)
                scratch += -(-t.untyped_storage().nbytes() // BLOCK) * BLOCK
        if scratch:
            self.allocated.append((torch.Size([scratch]), (1,), torch.uint8))
            self.count += 1
        self.steps = list(_steps(recorder.steps, iter(compiled), table, self.count))
        self.results = [table.part(t) for t in results]
        self.table, self.device = table.values, tensors[0].device
        self.pointers = [table.pointers[number] for number in range(self.count)]

    def run(self, tensors: Tensors) -> list[torch.Tensor]:
        with on_device(self.device):
            memory: Values = list(tensors)
            for shape, stride, dtype in self.allocated:
                memory.append(torch.empty_strided(shape, stride, dtype=dtype, device=self.device))
            table = self.table.copy()
            for t, pointers in zip(memory, self.pointers, strict=True):
                if pointers:
                    _point(table, pointers, t.data_ptr())
            stream = driver.active.get_current_stream(self.device.index or 0)
            for step in self.steps:
                step.run(table, memory, stream)
        return [part.of(memory) for part in self.results]


def _steps(
    recorded: Sequence[Launch | _Operation], compiled: Iterator[Any], table: _Table, number: int
) -> Iterator[_Start | _Call]:
    """What was recorded, in order; operators return memory from this number on."""
    for step in recorded:
        if isinstance(step, _Operation):
            arguments, pointers = _parts(step.arguments, table), None
            if not table.knows(step.result):
                table.add(step.result, number)
                pointers, number = table.pointers[number], number + 1
            yield _Call(step.operator, arguments, step.options, pointers)
            continue
        slots, tuples = [], []
        for name in step.kernel.arg_names:
            value = step.arguments[name]
            if isinstance(value, tuple):
                slots.append(table.slot(None))
                tuples.append((slots[-1], _taking([table.slot(own) for own in value])))
            else:
                slots.append(table.slot(value))
        width, height, depth = (*step.grid, 1, 1)[:3]
        yield _Start(next(compiled)[width, height, depth], _taking(slots), tuples)


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for own in arguments:
        if isinstance(own, torch.Tensor):
            yield own
        elif isinstance(own, (list, tuple)):
            yield from _tensors(own)


def _parts(arguments: Any, table: _Table) -> list[Any]:
    return [
        table.part(own)
        if isinstance(own, torch.Tensor)
        else _parts(own, table)
        if isinstance(own, (list, tuple))
        else own
        for own in arguments
    ]


def _filled(arguments: list[Any], memory: Values) -> list[Any]:
    return [
        own.of(memory) if type(own) is _Part else _filled(own, memory) if type(own) is list else own
        for own in arguments
    ]


def _taking(slots: Sequence[int]) -> Take:
    """What takes the values of these slots from a table, as a tuple."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda table: tuple(table[slot] for slot in slots)


def _point(table: Values, pointers: Sequence[tuple[int, int]], memory: int) -> None:
    for slot, offset in pointers:
        table[slot] = memory + offset
