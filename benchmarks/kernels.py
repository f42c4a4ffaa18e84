"""Every kernel alone on a GPU: what it moves and computes, beside a copy and a large GEMM.

    python -m benchmarks.kernels --T 512,16384 --ranks 16,32

Each is judged by the numeric rule, then timed as a CUDA graph on operands rotated past the L2. Its
compulsory bytes are those of every operand read once and every result written once. A kernel is
memory-bound where they take longer at the measured copy bandwidth than its operations at the
measured speed of a large GEMM; the target is 80 % of that bandwidth. Below 5 µs at that bandwidth
a launch takes as long as the work, and no verdict is given.

Rows have the keys of the suite's: contender "kernel:<name>", phase "kernel". A letter behind the
name is the layout of the factor: A (r, n) or the transpose of B (m, r). T, n or m is 0 where a
kernel has no such size. "compose" contains the expansion that it reads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pera_kernels import backends
from pera_kernels.terms import TERMS, Terms
from tools.tune import measure
from tools.tune.problems import Problem

from . import results
from .ceilings import Ceilings
from .options import OneLineParser, list_of, one_of, shape, whole
from .results import Host, Row

__all__ = ["bench_kernels", "row_of", "verdict"]

CLASSES = {"bfloat16": "half", "bfloat16+float32": "mixed", "float32": "single"}
TARGET = 0.8
SHORT_SECONDS = 5e-6
NAMES = (
    "project-A",
    "project-B",
    "project-expanded",
    "accumulate",
    "contract-A",
    "contract-B",
    "sum",
    "expand",
    "compose",
)
# Kernels that do not depend on the number of tokens.
WITHOUT_TOKENS = ("expand", "compose")
# Kernels that never read a float32 factor for half-precision operands.
WITHOUT_MIXED = ("project-expanded", "accumulate", "sum")


@dataclass(frozen=True)
class Measured:
    """A kernel's times, and the ceilings of the same run."""

    name: str
    problem: Problem
    timed: measure.Timed
    tflops: float
    gbps: float

    @property
    def seconds(self) -> float:
        return self.timed.median / 1e3

    @property
    def memory_seconds(self) -> float:
        return self.problem.bytes() / (self.gbps * 1e9)

    @property
    def matrix_seconds(self) -> float:
        return self.problem.flops() / (self.tflops * 1e12)


def bench_kernels(
    names: Sequence[str],
    T: int,
    features: tuple[int, int],
    r: int,
    terms: Terms,
    kind: str,
) -> dict[str, Problem]:
    """The problem of each kernel in a layer of (in, out) ``features``, those that depend on T."""
    n, m = features
    common: dict[str, Any] = {"kind": kind, "r": r, "T": T, "terms": terms}
    made = {
        "project-A": Problem("project", N=n, M=0, factor="A", **common),
        "project-B": Problem("project", N=m, M=0, factor="B", **common),
        "project-expanded": Problem("project_expanded", N=n, M=0, **common),
        "accumulate": Problem("accumulate", N=m, M=0, **common),
        "contract-A": Problem("contract", N=n, M=0, factor="A", **common),
        "contract-B": Problem("contract", N=m, M=0, factor="B", **common),
        "sum": Problem("sum", N=0, M=0, **common),
        "expand": Problem("expand", N=n, M=m, **{**common, "T": 0}),
        "compose": Problem("compose", N=n, M=m, **{**common, "T": 0}),
    }
    return {
        name: problem
        for name, problem in made.items()
        if name in names and not (kind == "mixed" and name in WITHOUT_MIXED)
    }


def verdict(measured: Measured) -> str:
    """Whether a memory-bound kernel meets the target; which limit it has otherwise."""
    if measured.memory_seconds < measured.matrix_seconds:
        return "compute-bound"
    if measured.memory_seconds < SHORT_SECONDS:
        return "short"
    share = measured.memory_seconds / measured.seconds
    return "memory-bound, " + ("met" if share >= TARGET else "MISSED")


def row_of(measured: Measured, dtype: str, host: Host, rounds: int) -> Row:
    problem, seconds = measured.problem, measured.seconds
    low, high = measured.timed.spread
    floats = {
        "median_ms": measured.timed.median,
        "p20_ms": low,
        "p80_ms": high,
        "tflops": problem.flops() / seconds / 1e12,
        "gbps": problem.bytes() / seconds / 1e9,
        "roofline_share": max(measured.memory_seconds, measured.matrix_seconds) / seconds,
        "ceiling_tflops": measured.tflops,
        "ceiling_gbps": measured.gbps,
    }
    rounded: dict[str, Any] = {name: float(f"{value:.5g}") for name, value in floats.items()}
    note = verdict(measured)
    return _row(measured.name, problem, dtype, host, **rounded, rounds=rounds, note=note)


def _row(name: str, problem: Problem, dtype: str, host: Host, **found: Any) -> Row:
    plan = "composed" if problem.kernel == "compose" else "factored"
    key = _key(name, problem, dtype)
    return Row(**key, plan=plan, dropout=0.0, graph=True, **found, **asdict(host))


def _key(name: str, problem: Problem, dtype: str) -> dict[str, Any]:
    return {
        "contender": f"kernel:{name}",
        "terms": problem.terms,
        "r": problem.r,
        "T": problem.T,
        "n": problem.N,
        "m": problem.M,
        "dtype": dtype,
        "phase": "kernel",
    }


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positives = parser.add_argument, list_of(whole(1))
    add("--T", type=positives, default=(16, 512, 4096, 16384), help="tokens (16,512,4096,16384)")
    add("--shapes", type=list_of(shape), default=((4096, 4096),), help="in x out (4096x4096)")
    add("--ranks", type=positives, default=(16,), help="ranks (16)")
    add("--terms", type=list_of(one_of(TERMS)), default=("full",), help=", ".join(TERMS))
    dtypes = tuple(CLASSES)
    add("--dtypes", type=list_of(one_of(dtypes)), default=dtypes[:1], help=", ".join(dtypes))
    add("--only", type=list_of(one_of(NAMES)), default=NAMES, help=", ".join(NAMES))
    add("--rounds", type=whole(2), default=20, help="in which kernels take turns (20)")
    add("--budget", type=whole(1), metavar="SECONDS", help="start nothing after that")
    add("--resume", action="store_true", help="skip what --out has of this commit and device")
    add("--out", type=Path, help="append rows here (benchmarks/results/kernels-<device>.jsonl)")
    return parser


def _groups(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Problem]]]:
    """Kernels that take turns: those of one layer and number of tokens, each problem once."""
    seen: set[tuple[str, Problem]] = set()
    for dtype in given.dtypes:
        for terms in given.terms:
            for r in given.ranks:
                for features in given.shapes:
                    for T in given.T:
                        kind = CLASSES[dtype]
                        group = bench_kernels(given.only, T, features, r, terms, kind)
                        fresh = {n: p for n, p in group.items() if (n, p) not in seen}
                        seen.update(fresh.items())
                        if fresh:
                            yield dtype, fresh


def _show(row: Row) -> str:
    """One line of the table; a row that failed has no numbers."""
    head = f"{row.contender.removeprefix('kernel:'):<18}{row.T:>6}{row.n:>7}{row.m:>7}"
    if row.median_ms is None or not (row.gbps and row.ceiling_gbps):
        return f"{head}  {row.status}: {row.note}"
    assert row.tflops is not None and row.ceiling_tflops is not None
    return (
        f"{head}{1e3 * row.median_ms:>10.2f}{row.gbps:>9.0f}{row.gbps / row.ceiling_gbps:>7.0%}"
        f"{row.tflops:>9.1f}{row.tflops / row.ceiling_tflops:>7.0%}  {row.note}"
    )


HEADER = (
    f"{'kernel':<18}{'T':>6}{'n':>7}{'m':>7}{'us':>10}{'GB/s':>9}{'copy':>7}{'TFLOP/s':>9}"
    f"{'GEMM':>7}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = _parser()
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here, and kernels are timed on nothing else")
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are never timed; unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    default = results.default_file(device)
    path = given.out or default.with_name(f"kernels-{default.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        parser.error(f"argument --out: cannot write {path}: {error.strerror}")
    host, ceilings = results.host(device), Ceilings(device)
    same = ("contender", "terms", "r", "T", "n", "m", "dtype", "device", "commit")
    done = {tuple(row[k] for k in same) for row in results.read(path)} if given.resume else set()
    print(f"{host.device}  torch {host.torch}  triton {host.triton}  commit {host.commit}")
    failed = False
    with torch.cuda.stream(torch.cuda.Stream(device)):
        print(f"copy {ceilings.gbps():.0f} GB/s")
        for dtype, group in _groups(given):
            wanted = {
                name: problem
                for name, problem in group.items()
                if tuple({**_key(name, problem, dtype), **asdict(host)}[k] for k in same)
                not in done
            }
            if not wanted:
                continue
            if given.budget and time.monotonic() - began > given.budget:
                print(f"the budget of {given.budget} s is used up")
                break
            rows = _run(wanted, dtype, given.rounds, device, host, ceilings)
            results.append(path, rows)
            first = next(iter(wanted.values()))
            print(f"\n{dtype} {first.terms} r={first.r}\n{HEADER}")
            print("\n".join(_show(row) for row in rows), flush=True)
            failed = failed or any(row.status != "timed" for row in rows)
    print(f"\nrows appended to {path}")
    return int(failed)


def _run(
    group: dict[str, Problem],
    dtype: str,
    rounds: int,
    device: torch.device,
    host: Host,
    ceilings: Ceilings,
) -> list[Row]:
    """Rows of one group: those that failed the rule, then those that were timed."""
    wrong = {name: measure.wrong(problem, [None], "", device)[0] for name, problem in group.items()}
    rows = [
        _row(name, group[name], dtype, host, status="failed", note=reason)
        for name, reason in wrong.items()
        if reason
    ]
    sound = {name: problem for name, problem in group.items() if not wrong[name]}
    calls = {
        name: [operands.launch for operands in measure.operand_sets(problem, device)]
        for name, problem in sound.items()
    }
    tflops, gbps = ceilings.tflops(measure_dtype(dtype)), ceilings.gbps()
    for name, timed in measure.time_calls(calls, rounds).items():
        measured = Measured(name, sound[name], timed, tflops, gbps)
        rows.append(row_of(measured, dtype, host, rounds))
    return rows


def measure_dtype(dtype: str) -> torch.dtype:
    """The operands' dtype of a name that ``--dtypes`` takes."""
    return results.DTYPES[dtype][0]


if __name__ == "__main__":
    sys.exit(main())
