"""What the compiler makes of every kernel, for GPUs that need not be there.

The launchers run on tensors without storage and their launches are recorded, so the report sees
exactly the block sizes, flags and argument specialisations that ship. Each is compiled through
Triton's own just-in-time path, with the assemblers in its wheel: what is compiled for the GPU that
is here is found in Triton's cache by the launches that follow.

    python -m tools.compile_report                              everything (long: see --jobs)
    python -m tools.compile_report --ranks 16 --terms full      one adapter
    python -m tools.compile_report --archs sm_90 --instructions machine instructions too
    python -m tools.compile_report --precompile --tokens 16384 512 --ranks 16 --terms full
                                                                fill the cache before a benchmark
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pera_kernels.kernels import tiles
from pera_kernels.kernels.launch import recorded
from pera_kernels.terms import TERMS

from .instructions import Count, count, cuobjdump
from .problems import DTYPES, FEATURES, TOKENS, VARIANTS, Job, Operands, meta

__all__ = [
    "Launch",
    "Row",
    "compile_all",
    "compilers",
    "distinct",
    "here",
    "launches_of",
    "specialised",
    "tiles_of",
]

RANKS = (4, 8, 16, 32, 64)
# Shared memory a thread block (workgroup) may use, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}
# Multiprocessors of a large GPU: an H200.
PROCESSORS = 132
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+)\b")
BARRIER = re.compile(r"\b(?:bar|barrier)(?:\.cta)?\.(?:sync|red)|\bs_barrier\b")
# Half-precision products on tensor cores, told apart from the tf32 ones of the contraction.
HALF_DOT = re.compile(
    r"(wgmma\.mma_async|mma\.sync)\S*\.b?f16\.b?f16|tcgen05\.mma\S*kind::f16|v_mfma_f32\w+_b?f16"
)


@dataclass(frozen=True)
class Launch:
    """A kernel and what the compiler specialises it on: constants, dtypes of tensors, and of each
    number whether it is one, divisible by 16, and above 32 bits.
    """

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """One launch compiled for one architecture; ``problem`` says why it may not ship."""

    variant: str
    terms: str
    r: int
    dtype: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    tensor_core: int = 0
    barriers: int = 0
    problem: str = ""
    loop: Count | None = None
    rest: Count | None = None


# What a report shows; layers launch what the others show, at their own splits.
REPORTED = tuple(name for name in VARIANTS if not name.startswith("layer"))


@contextmanager
def tiles_of(arch: str, processors: int = PROCESSORS) -> Iterator[None]:
    """Within this context launchers choose tiles and splits as on a GPU of this architecture."""
    table = arch if (tiles.TABLES / f"{arch}.json").exists() else tiles.GENERIC
    patch = mock.patch.object
    with ExitStack() as stack:
        stack.enter_context(patch(torch.version, "hip", "7" if arch.startswith("gfx") else None))
        stack.enter_context(patch(tiles, "architecture", lambda device: table))
        stack.enter_context(patch(tiles, "processor_count", lambda device: processors))
        tiles.tile_for.cache_clear()
        stack.callback(tiles.tile_for.cache_clear)
        yield


def launches_of(operands: Operands) -> list[Launch]:
    """What a job launches, on tensors of the device "meta"."""
    with recorded() as calls:
        operands.call()
    return [specialised(own.kernel, own.arguments) for own in calls]


def specialised(kernel: Any, arguments: dict[str, Any]) -> Launch:
    # Launch options are no parameters, and as constant as those declared so.
    varying = {parameter.name for parameter in kernel.params if not parameter.is_constexpr}
    kept = tuple(
        (name, _representative(value) if name in varying else value)
        for name, value in sorted(arguments.items())
    )
    return Launch(kernel.fn.__module__, kernel.fn.__name__, kept)


def _representative(value: Any) -> Any:
    """The smallest value that the compiler treats alike; a tensor by its dtype."""
    if isinstance(value, tuple):
        return tuple(map(_representative, value))
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, float):
        return 0.5
    if type(value) is not int or value == 1:
        return value
    return (0 if abs(value) < 2**31 else 2**32) + (16 if value % 16 == 0 else 17)


def distinct(jobs: Iterable[Job], arch: str, processors: int = PROCESSORS) -> dict[Launch, Job]:
    """Every distinct launch of these jobs, with the first of them that makes it."""
    found: dict[Launch, Job] = {}
    with tiles_of(arch, processors):
        for job in jobs:
            for launch in launches_of(Operands(job)):
                found.setdefault(launch, job)
    return found


class _Driver:
    """What the just-in-time path asks of a driver before it launches: one device for each target,
    because a kernel keeps what was compiled by the number of the device.
    """

    arch = "sm_90"
    seen: list[str] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        hip = self.arch.startswith("gfx")
        return GPUTarget("hip", self.arch, 64) if hip else GPUTarget("cuda", int(self.arch[3:]), 32)

    def get_current_device(self) -> int:
        if self.arch not in self.seen:
            self.seen.append(self.arch)
        return self.seen.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def _start() -> None:
    from triton.runtime.driver import driver

    driver.set_active(_Driver())  # type: ignore[arg-type]


def _compile(work: tuple[Launch, Job, str, bool]) -> tuple[Launch, Row]:
    """Runs in a worker. A compiler's refusal is a result: that launch cannot be had."""
    launch, job, arch, with_instructions = work
    from triton.errors import TritonError

    name = (job.variant, job.terms, job.r, job.dtype, arch)
    try:
        kernel = _warmed_up(launch, arch)
    except (TritonError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return launch, Row(*name, problem=f"does not compile: {reason}")
    if "cubin" in kernel.asm:
        text, usage = kernel.asm["ptx"], cuobjdump(kernel.asm["cubin"], "-res-usage")
        registers, spills = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    # An architecture that is not in the table has at least what small chips have.
    shared, limit = kernel.metadata.shared, SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))
    problems = []
    if spills:
        problems.append(f"spills {spills} B")
    if shared > limit:
        problems.append(f"shared memory {shared} B > {limit} B")
    has_dot = "PRECISION" in dict(launch.arguments)
    if has_dot and job.dtype != "fp32" and not HALF_DOT.search(text):
        problems.append("half-precision dot without tensor cores")
    loop = rest = None
    if with_instructions and "cubin" in kernel.asm:
        loop, rest = count(cuobjdump(kernel.asm["cubin"], "-sass"))
    return launch, Row(
        *name,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        shared_limit=limit,
        tensor_core=len(TENSOR_CORE.findall(text)),
        barriers=len(BARRIER.findall(text)),
        problem="; ".join(problems),
        loop=loop,
        rest=rest,
    )


def _warmed_up(launch: Launch, arch: str) -> Any:
    _Driver.arch = arch
    arguments = {name: _argument(value) for name, value in launch.arguments}
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    # The grid is no part of what is compiled.
    return kernel.warmup(grid=(1,), **arguments)


def _argument(value: Any) -> Any:
    """What a representative stands for."""
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    return meta(0, of=value) if isinstance(value, torch.dtype) else value


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler's report has no {pattern}")
    return int(found.group(1))


@contextmanager
def compilers(jobs: int) -> Iterator[Any]:
    """Processes that compile, as long as the context lasts."""
    # Fresh ones: the parent has run torch, which does not survive a fork well.
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_start) as pool:
        yield pool


def compile_all(
    pool: Any, work: Iterable[tuple[Launch, Job, str]], *, with_instructions: bool = False
) -> Iterator[tuple[Launch, Row]]:
    """Compile (launch, its job, architecture) in the processes of ``pool``; results in order."""
    yield from pool.imap(_compile, [(*own, with_instructions) for own in work])


HEADER = (
    f"{'kernel':<25}{'terms':<8}{'r':>3} {'dtype':<10}{'arch':<8}{'regs':>5}{'spill':>7}"
    f"{'shared':>9}{'of limit':>9}{'mma':>6}  verdict"
)


def format_row(row: Row) -> str:
    share = f"{row.shared_bytes / row.shared_limit:.0%}" if row.shared_limit else ""
    line = (
        f"{row.variant:<25}{row.terms:<8}{row.r:>3} {row.dtype:<10}{row.arch:<8}"
        f"{row.registers:>5}{row.spill_bytes:>7}{row.shared_bytes:>9}{share:>9}"
        f"{row.tensor_core:>6}  {row.problem or 'ok'}"
    )
    if row.loop is None or row.rest is None:
        return line
    return (
        f"{line}\n    instructions of a warp: {row.loop.instructions} in the main loop "
        f"({row.loop.matrix} multiply-adds on matrix units, {row.loop.scalar} elsewhere, "
        f"{row.loop.bytes} B, {row.loop.narrow_loads} of {row.loop.loads} loads narrow), "
        f"{row.rest.instructions} outside"
    )


def here() -> tuple[str, int]:
    """The architecture and the multiprocessors of the GPU that is here."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def precompile(jobs: Sequence[Job], arch: str, processors: int, given: argparse.Namespace) -> int:
    """Fill Triton's cache within a budget; the number of launches that do not compile cleanly."""
    began, done, refused = time.monotonic(), 0, 0
    found = distinct(jobs, arch, processors)
    work = [(launch, job, arch) for launch, job in found.items()]
    with compilers(min(given.jobs, len(work))) as pool:
        for launch, row in compile_all(pool, work):
            done += 1
            if row.problem:
                refused += 1
                print(f"{launch.kernel}: {format_row(row)}", file=sys.stderr)
            if given.budget is not None and time.monotonic() - began > given.budget:
                break
    print(
        f"{done} of {len(found)} distinct launches compiled for {arch} in "
        f"{time.monotonic() - began:.0f} s, {refused} with a problem"
    )
    return refused


def report(jobs: Sequence[Job], given: argparse.Namespace) -> int:
    """Print a row for each launch and architecture; the number of rows with a problem."""
    work = [(own, job, arch) for arch in given.archs for own, job in distinct(jobs, arch).items()]
    rows = []
    print(HEADER)
    with compilers(min(given.jobs, len(work))) as pool:
        for _, row in compile_all(pool, work, with_instructions=given.instructions):
            rows.append(row)
            if row.problem or not given.problems:
                print(format_row(row), flush=True)
            if sys.stderr.isatty():
                print(f"\r{len(rows)}/{len(work)}", end="\r", file=sys.stderr, flush=True)
    if given.json is not None:
        import triton

        payload = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(payload, indent=1) + "\n")
    bad, most = sum(bool(row.problem) for row in rows), max(rows, key=lambda row: row.registers)
    print(
        f"{len(rows)} compilations, {bad} with a problem; at most {most.registers} registers "
        f"({most.variant}, {most.terms}, r={most.r}, {most.dtype}, {most.arch})"
    )
    return bad


def _features(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1024x4096 (in x out)")
    return int(found[1]), int(found[2])


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be >= 1; got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def choice(option: str, of: Iterable[str], default: Iterable[str], **more: Any) -> None:
        names = tuple(of)
        text = "of " + ", ".join(names)
        parser.add_argument(
            option, nargs="+", choices=names, default=list(default), help=text, **more
        )

    choice("--archs", SHARED_LIMIT, SHARED_LIMIT, metavar="ARCH")
    choice("--kernels", VARIANTS, REPORTED, metavar="NAME")
    choice("--terms", TERMS, TERMS, metavar="TERMS")
    choice("--dtypes", DTYPES, DTYPES, metavar="DTYPE")
    add = parser.add_argument
    add("--ranks", nargs="+", type=_positive, default=list(RANKS), metavar="R")
    add("--tokens", nargs="+", type=_positive, default=[TOKENS], metavar="T")
    shape = (FEATURES, FEATURES)
    add("--shapes", nargs="+", type=_features, default=[shape], metavar="NxM", help="in x out")
    add("--jobs", type=_positive, default=os.cpu_count() or 1, help="in so many processes")
    add("--problems", action="store_true", help="print only rows with a problem")
    add("--instructions", action="store_true", help="count machine instructions (NVIDIA)")
    add("--json", type=Path, metavar="FILE", help="also write every row as JSON")
    add(
        "--precompile",
        action="store_true",
        help="only fill Triton's cache, for the GPU here or for the first of --archs",
    )
    add("--budget", type=_positive, metavar="SECONDS", help="stop --precompile then")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "compile_report: unset TRITON_INTERPRET: interpreted kernels are not compiled",
            file=sys.stderr,
        )
        return 2
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    # A precompilation begins with whole layers: they are launched first.
    kernels = given.kernels
    if given.precompile and kernels == list(REPORTED):
        kernels = ["layer", "layer of 3", *REPORTED]
    axes = (given.tokens, given.dtypes, given.ranks, given.terms, given.shapes, kernels)
    jobs = [
        Job(variant, terms, r, dtype, T, N, M)
        for T, dtype, r, terms, (N, M), variant in itertools.product(*axes)
    ]
    if not given.precompile:
        return int(report(jobs, given) > 0)
    arch, processors = here() if torch.cuda.is_available() else (given.archs[0], PROCESSORS)
    return int(precompile(jobs, arch, processors, given) > 0)


if __name__ == "__main__":
    sys.exit(main())
