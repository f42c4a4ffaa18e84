"""What the compiler makes of every kernel, for GPUs that need not be there.

The launchers run on tensors without storage and their launches are recorded, so the report sees
exactly the block sizes, flags and argument specialisations that ship. Each is compiled for sm_80,
sm_90, sm_100 and gfx942 with the assemblers in Triton's wheel.

    python -m tools.compile_report                              everything (long: see --jobs)
    python -m tools.compile_report --ranks 16 --terms full      one adapter
    python -m tools.compile_report --archs sm_90 --json r.json  one architecture, rows as JSON
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pera_kernels import configs
from pera_kernels.terms import TERMS, coefficient_count, lane_count

RANKS = (4, 8, 16, 32, 64)
# Operand dtype and adapter dtype of each kind of row.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}
# Shared memory a thread block (workgroup) may use, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}
FEATURES, TOKENS = 4096, 8192

POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
TENSOR_CORE = {
    "ptx": re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"),
    "amdgcn": re.compile(r"\bv_mfma_\w+"),
}
# Half-precision products on tensor cores, told apart from the tf32 ones of the contraction.
HALF_DOT = re.compile(
    r"(wgmma\.mma_async|mma\.sync)\S*\.b?f16\.b?f16|tcgen05\.mma\S*kind::f16|v_mfma_f32\w+_b?f16"
)


@dataclass(frozen=True)
class Launch:
    """A recorded launch: what the JIT would specialise on."""

    variant: str
    terms: str
    r: int
    dtype: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Row:
    """One launch compiled for one architecture."""

    variant: str
    terms: str
    r: int
    dtype: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_core: int
    problem: str


class _Recorder:
    """Stands in for a kernel: ``kernel[grid](**arguments)`` appends to ``calls``."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.calls.append((self.kernel, arguments))


def _recorded(variant: str, terms: str, r: int, dtype: str, arch: str) -> Iterator[Launch]:
    from pera_kernels import launch

    calls: list[tuple[Any, dict[str, Any]]] = []
    kernels = [name for name in vars(launch) if name.endswith("_kernel")]
    with ExitStack() as stack:
        for name in kernels:
            recorder = _Recorder(getattr(launch, name), calls)
            stack.enter_context(mock.patch.object(launch, name, recorder))
        stack.enter_context(mock.patch.object(configs, "processor_count", lambda device: 132))
        hip = "7" if arch.startswith("gfx") else None
        stack.enter_context(mock.patch.object(torch.version, "hip", hip))
        table = arch if (configs.TABLES / f"{arch}.json").exists() else configs.GENERIC
        stack.enter_context(mock.patch.object(configs, "architecture", lambda device: table))
        configs.tile_for.cache_clear()
        stack.callback(configs.tile_for.cache_clear)
        _run_variant(launch, variant, terms, r, *DTYPES[dtype])
    for kernel, arguments in calls:
        yield _specialise(variant, terms, r, dtype, kernel, arguments)


def _run_variant(
    launch: Any, variant: str, terms: str, r: int, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    """Call the launcher of a variant as ``pera_kernels.ops`` does, on storage-free tensors."""

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    x, u = meta(TOKENS, FEATURES), meta(TOKENS, lane_count(r, terms))  # type: ignore[arg-type]
    A, B = meta(r, FEATURES, of=adapter), meta(FEATURES, r, of=adapter)
    h = None if terms == "linear" else meta(coefficient_count(r, terms), of=adapter)  # type: ignore[arg-type]
    dh = None if h is None else torch.empty_like(h)
    a, b = launch.Factor(A, h, r, terms), launch.Factor(B.t(), h, r, terms)
    expanded = launch.Expanded(meta(u.shape[1], FEATURES))
    partial = launch.Sum(meta(4, *u.shape, of=torch.float32), u, u.shape[1], u.stride(0))
    dropout = launch.Dropout(0.05, meta(1, of=torch.int64))
    if variant == "expand":
        launch.expand([a, b], partial, dtype=dtype)
    elif variant == "project A":
        launch.project(x, a, out=u)
    elif variant == "project A dropout":
        launch.project(x, a, out=u, dropout=dropout)
    elif variant == "project B":
        launch.project(x, b, out=u)
    elif variant == "project expanded":
        launch.project(x, expanded, out=u)
    elif variant == "project expanded dropout":
        launch.project(x, expanded, out=u, dropout=dropout)
    elif variant == "accumulate":
        launch.accumulate(x, u, expanded, out=x, scale=0.5)
    elif variant == "accumulate dropout":
        launch.accumulate(x, u, expanded, out=x, scale=0.5, dropout=dropout)
    elif variant == "contract dA dropout":
        launch.contract(u, x, a, df=torch.empty_like(A), dh=None, scale=0.5, dropout=dropout)
    elif variant == "contract dB dh":
        launch.contract(u, x, b, df=torch.empty_like(B).t(), dh=dh, scale=0.5)
    elif variant == "contract G dA dh":
        left = meta(u.shape[1], FEATURES).t()
        df = torch.empty_like(A)
        launch.contract(left, meta(FEATURES, FEATURES), a, df=df, dh=dh, scale=0.5)
    elif variant == "contract dA of 3":
        # Larger stacks are contracted one adapter at a time.
        members = 3 if 3 * r <= launch.CONTRACTED_ROWS else 1
        stack = launch.Factor(meta(members * r, FEATURES, of=adapter), h, r, terms, members)
        left = meta(TOKENS, stack.lanes)
        launch.contract(left, x, stack, df=torch.empty_like(stack.rows), dh=None, scale=0.5)
    elif variant == "project A of 3":
        stack = launch.Factor(meta(3 * r, FEATURES, of=adapter), h, r, terms, 3)
        launch.project(x, stack, out=meta(TOKENS, stack.lanes))
    elif variant == "compose":
        launch.compose(meta(FEATURES, FEATURES), a, b, scale=0.5, dtype=dtype)
    else:
        raise ValueError(f"unknown variant {variant!r}")


VARIANTS = (
    "expand",
    "project A",
    "project A dropout",
    "project A of 3",
    "project B",
    "project expanded",
    "project expanded dropout",
    "accumulate",
    "accumulate dropout",
    "contract dA dropout",
    "contract dA of 3",
    "contract dB dh",
    "contract G dA dh",
    "compose",
)


def _specialise(
    variant: str, terms: str, r: int, dtype: str, kernel: Any, arguments: dict[str, Any]
) -> Launch:
    """Types, constants and alignments as Triton's own launcher would infer them from the values."""
    arguments = dict(arguments)
    names = {parameter.name for parameter in kernel.params}
    options = {name: arguments[name] for name in arguments if name not in names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    return Launch(
        variant,
        terms,
        r,
        dtype,
        kernel.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


def compile_launch(launch: Launch, arch: str) -> Row:
    """Compile one launch for one architecture and read the assembler's report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pera_kernels import launch as launchers

    kernel = getattr(launchers, launch.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(index[name],): value for name, value in launch.constants},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    if hip:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        tensor_core = len(TENSOR_CORE["amdgcn"].findall(text))
    else:
        text = compiled.asm["ptx"]
        registers, spills = _cubin_report(compiled.asm["cubin"])
        tensor_core = len(TENSOR_CORE["ptx"].findall(text))
    shared, limit = compiled.metadata.shared, SHARED_LIMIT[arch]
    problems = []
    if spills:
        problems.append(f"spills {spills} B")
    if shared > limit:
        problems.append(f"shared memory {shared} B > {limit} B")
    has_dot = launch.kernel not in ("sum_partials_kernel", "expand_kernel")
    if has_dot and launch.dtype != "fp32" and not HALF_DOT.search(text):
        problems.append("half-precision dot without tensor cores")
    return Row(
        launch.variant,
        launch.terms,
        launch.r,
        launch.dtype,
        arch,
        registers,
        spills,
        shared,
        limit,
        tensor_core,
        "; ".join(problems),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler's report has no {pattern}")
    return int(found.group(1))


def _cubin_report(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin, by the wheel's cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def launches(
    variants: Sequence[str],
    terms: Sequence[str],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    arch: str,
) -> list[Launch]:
    """Every distinct launch of the grid, in order."""
    grid = itertools.product(variants, terms, ranks, dtypes)
    found = [launch for row in grid for launch in _recorded(*row, arch)]
    seen: dict[Any, Launch] = {}
    for launch in found:
        key = (
            launch.kernel,
            launch.signature,
            launch.constants,
            launch.aligned,
            launch.options,
        )
        seen.setdefault(key, launch)
    return list(seen.values())


def _work(job: tuple[Launch, str]) -> Row:
    return compile_launch(*job)


def report(
    archs: Sequence[str],
    *,
    variants: Sequence[str] = VARIANTS,
    terms: Sequence[str] = TERMS,
    ranks: Sequence[int] = RANKS,
    dtypes: Sequence[str] = tuple(DTYPES),
    jobs: int = 1,
) -> Iterator[tuple[int, int, Row]]:
    """Compile the grid; yields (done, total, row) as rows come."""
    work = [
        (launch, arch)
        for arch in archs
        for launch in launches(variants, terms, ranks, dtypes, arch)
    ]
    if jobs == 1:
        for done, job in enumerate(work, 1):
            yield done, len(work), _work(job)
        return
    # A fresh process per worker: the parent has run torch, which does not survive a fork well.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, row in enumerate(pool.imap(_work, work, chunksize=4), 1):
            yield done, len(work), row


HEADER = (
    f"{'kernel':<22}{'terms':<8}{'r':>3} {'dtype':<10}{'arch':<8}{'regs':>5}{'spill':>7}"
    f"{'shared':>9}{'of limit':>9}{'mma':>6}  verdict"
)


def format_row(row: Row) -> str:
    share = f"{row.shared_bytes / row.shared_limit:.0%}"
    return (
        f"{row.variant:<22}{row.terms:<8}{row.r:>3} {row.dtype:<10}{row.arch:<8}"
        f"{row.registers:>5}{row.spill_bytes:>7}{row.shared_bytes:>9}{share:>9}"
        f"{row.tensor_core:>6}  {row.problem or 'ok'}"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--archs",
        nargs="+",
        choices=SHARED_LIMIT,
        default=list(SHARED_LIMIT),
        metavar="ARCH",
        help="of " + ", ".join(SHARED_LIMIT),
    )
    add(
        "--kernels",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help="of " + ", ".join(map(repr, VARIANTS)),
    )
    add("--terms", nargs="+", choices=TERMS, default=list(TERMS))
    add("--ranks", nargs="+", type=int, default=list(RANKS), metavar="R")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        metavar="DTYPE",
        help="of " + ", ".join(DTYPES) + " (operands + adapters)",
    )
    add("--jobs", type=int, default=os.cpu_count() or 1, help="compile in this many processes")
    add("--problems", action="store_true", help="print only rows with a problem")
    add("--json", type=Path, metavar="FILE", help="also write every row as JSON")
    arguments = parser.parse_args(argv)
    if min(arguments.ranks) < 1:
        parser.error(f"--ranks must be >= 1; got {min(arguments.ranks)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be >= 1; got {arguments.jobs}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "compile_report: unset TRITON_INTERPRET: interpreted kernels are not compiled",
            file=sys.stderr,
        )
        return 2
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(HEADER)
    rows = []
    for done, total, row in report(
        arguments.archs,
        variants=arguments.kernels,
        terms=arguments.terms,
        ranks=arguments.ranks,
        dtypes=arguments.dtypes,
        jobs=arguments.jobs,
    ):
        rows.append(row)
        if row.problem or not arguments.problems:
            print(format_row(row), flush=True)
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\r", file=sys.stderr, flush=True)
    bad = [row for row in rows if row.problem]
    if arguments.json is not None:
        payload = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(payload, indent=1) + "\n")
    most = max(rows, key=lambda row: row.registers)
    print(
        f"{len(rows)} compilations, {len(bad)} with a problem; at most {most.registers} registers "
        f"({most.variant}, {most.terms}, r={most.r}, {most.dtype}, {most.arch})"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
