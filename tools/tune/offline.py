"""Kernels compiled in other processes, for a GPU that need not be there.

Launches are recorded from the launchers on tensors without storage. Worker processes compile them
through Triton's own just-in-time path, with a driver that only names the target: the compiled code
lands in the cache under the very key with which a later launch on such a GPU looks it up.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from pera_kernels import configs
from tools import compile_report

from . import sass

__all__ = ["Chip", "Compiled", "Compilers", "Launch", "recorded"]


@dataclass(frozen=True)
class Chip:
    """A GPU as far as launchers and compiler ask: its architecture, the table it takes its tiles
    from, and its size.
    """

    arch: str
    table: str
    processors: int
    shared_limit: int


@dataclass(frozen=True)
class Launch:
    """A kernel and what the compiler specialises it on: constants, dtypes of tensors, and of each
    number whether it is one, divisible by 16, and above 32 bits.
    """

    kernel: str
    arguments: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recorded:
    """A launch with the sizes it was made with."""

    launch: Launch
    grid: tuple[int, ...]
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch; ``problem`` says why it may not be shipped."""

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    problem: str = ""
    code: sass.Code | None = None


class _Recorder:
    """Stands in for a kernel: ``kernel[grid](**arguments)`` appends to ``found``."""

    def __init__(self, kernel: Any, found: list[Recorded]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(**arguments: Any) -> None:
            # Launch options are no parameters, and as constant as those declared so.
            parameters = inspect.signature(self.kernel.fn).parameters
            varying = {n for n, p in parameters.items() if p.annotation is inspect.Parameter.empty}
            kept = tuple(
                (name, _specialised(value) if name in varying else value)
                for name, value in sorted(arguments.items())
            )
            sizes = {n: v for n, v in arguments.items() if not isinstance(v, torch.Tensor)}
            self.found.append(Recorded(Launch(self.kernel.__name__, kept), grid, sizes))

        return record


def _specialised(value: Any) -> Any:
    """The smallest value that is specialised on alike; a tensor by its dtype."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, float):
        return 0.5
    if type(value) is not int or value == 1:
        return value
    return (0 if abs(value) < 2**31 else 2**32) + (16 if value % 16 == 0 else 17)


def recorded(call: Callable[[], object], chip: Chip) -> list[Recorded]:
    """What ``call`` launches, on tensors of the device "meta", with the tiles of the chip."""
    found: list[Recorded] = []
    with recording(chip, found):
        call()
    return found


@contextmanager
def recording(chip: Chip, found: list[Recorded]) -> Iterator[None]:
    """Within this context launches are appended to ``found`` instead of made."""
    from pera_kernels import launch

    patch = mock.patch.object
    with ExitStack() as stack:
        for name in [name for name in vars(launch) if name.endswith("_kernel")]:
            recorder = _Recorder(getattr(launch, name), found)
            stack.enter_context(patch(launch, name, recorder))
        stack.enter_context(patch(configs, "architecture", lambda device: chip.table))
        stack.enter_context(patch(configs, "processor_count", lambda device: chip.processors))
        configs.tile_for.cache_clear()
        stack.callback(configs.tile_for.cache_clear)
        yield


class _NoDriver:
    """What the just-in-time path asks of a driver before it launches."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _start(arch: str) -> None:
    # Before the kernels are imported: they are decorated for one mode or the other.
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    driver.set_active(_NoDriver(target))  # type: ignore[arg-type]


def _compile(job: tuple[Launch, int, bool]) -> tuple[Launch, Compiled]:
    """Runs in a worker. A compiler's refusal is a result: that tile cannot be had."""
    launch, shared_limit, disassemble = job
    from triton.errors import TritonError

    try:
        kernel = _warmed_up(launch)
    except (TritonError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return launch, Compiled(problem=f"does not compile: {reason}")
    return launch, _report(launch, kernel, shared_limit, disassemble)


def _warmed_up(launch: Launch) -> Any:
    from pera_kernels import launch as launchers

    arguments = {
        name: torch.empty(0, dtype=value, device="meta")
        if isinstance(value, torch.dtype)
        else value
        for name, value in launch.arguments
    }
    # The grid is no part of the key.
    return getattr(launchers, launch.kernel).warmup(grid=(1,), **arguments)


def _report(launch: Launch, kernel: Any, shared_limit: int, disassemble: bool) -> Compiled:
    if "cubin" in kernel.asm:
        text = kernel.asm["ptx"]
        registers, spills = compile_report._cubin_report(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        registers = compile_report._number(r"\.vgpr_count:\s*(\d+)", text)
        spills = compile_report._number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    shared, problems = kernel.metadata.shared, []
    if spills:
        problems.append(f"spills {spills} B")
    if shared > shared_limit:
        problems.append(f"shared memory {shared} B > {shared_limit} B")
    dtypes = {value for _, value in launch.arguments if isinstance(value, torch.dtype)}
    has_dot = "PRECISION" in dict(launch.arguments)
    half = bool(dtypes & {torch.bfloat16, torch.float16})
    if has_dot and half and not compile_report.HALF_DOT.search(text):
        problems.append("half-precision dot without tensor cores")
    code = sass.read(sass.disassemble(kernel.asm["cubin"])) if disassemble else None
    return Compiled(registers, spills, shared, "; ".join(problems), code)


def _check(job: tuple[compile_report.Launch, str]) -> str:
    """Runs in a worker: what is wrong with a shipped launch, "" if nothing is."""
    row = compile_report.compile_launch(*job)
    return row.problem and f"{row.problem} ({row.variant}, {row.terms} r={row.r} {row.dtype})"


class Compilers:
    """Worker processes that compile for one chip; each launch is compiled once."""

    def __init__(self, chip: Chip, jobs: int, *, disassemble: bool = False) -> None:
        self.chip, self._jobs, self._disassemble = chip, jobs, disassemble
        self._done: dict[Launch, Compiled] = {}
        # Fresh processes: the parent has run torch, which does not survive a fork well.
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(jobs, initializer=_start, initargs=(chip.arch,))

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def compile(self, launches: Iterable[Launch]) -> Iterator[tuple[Launch, Compiled]]:
        """Every launch with its outcome, those known already first."""
        wanted = list(dict.fromkeys(launches))
        yield from [(launch, self._done[launch]) for launch in wanted if launch in self._done]
        jobs = [
            (launch, self.chip.shared_limit, self._disassemble)
            for launch in wanted
            if launch not in self._done
        ]
        for launch, outcome in self._pool.imap_unordered(_compile, jobs):
            self._done[launch] = outcome
            yield launch, outcome

    def problems(self, launches: Iterable[compile_report.Launch]) -> Iterator[str]:
        """What is wrong with each of these launches, as they come; "" where nothing is.

        In small portions: who has seen enough leaves little behind that is still to be compiled.
        """
        wanted, portion = list(launches), 2 * self._jobs
        for start in range(0, len(wanted), portion):
            jobs = [(own, self.chip.arch) for own in wanted[start : start + portion]]
            yield from self._pool.imap_unordered(_check, jobs)
