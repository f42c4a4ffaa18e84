"""``verify``: outputs and gradients of every op, terms, rank and dtype against float64.

Each backend is judged by the numeric rule of ``pera_kernels.testing``. Triton's kernels are slow to
interpret and to compile, so by default they get every terms, rank and dtype, and take turns with
the ways of computing and with the shapes; ``--exhaustive`` runs all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from .. import testing
from ..backends import unavailable
from ..terms import expanded_rank
from ..testing import Case, Verdict
from . import describe

__all__ = ["BACKENDS", "DTYPES", "OPS", "RANKS", "verify"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 64)
BACKENDS = ("triton", "torch")
# The three in the middle are pera_linear computed in another way; "mixed" has float32 adapters
# under half-precision activations.
OPS: dict[str, dict[str, Any]] = {
    "pera_linear": {},
    "dropout": {"dropout_p": 0.25},
    "composed": {"plan": "composed"},
    "mixed": {"adapter_dtype": torch.float32},
    "delta_weight": {"op": "delta_weight"},
}
# By default Triton gets one of these in turn at each terms, rank and dtype, and the rest always.
TAKING_TURNS = {"cpu": tuple(OPS), "cuda": ("dropout", "composed", "mixed")}
# Tokens, in and out features, one in turn: ragged tiles, many features (the projection splits N),
# few of everything (the contraction splits K), many tokens (the contraction splits T).
SHAPES = {
    "cpu": ((33, 70, 50), (9, 140, 20), (17, 40, 24), (260, 20, 17)),
    "cuda": ((1000, 333, 517), (70, 2056, 264), (33, 70, 50), (4096, 512, 512)),
}
# float64 has no more exact truth here: its reference is taken to err as float32's does, in its own
# ulps, times this for two sums in different orders. A mistake is many powers of ten larger.
FLOAT64_ALLOWANCE = 16.0
# The ratio of two errors of a few numbers exceeds the bound by chance about once in a hundred:
# such a failure is judged again on this many times the draws.
MORE_DRAWS = 5
# What one process may need on a GPU: its context, and a float64 reference at the largest shape.
BYTES_PER_JOB = 3 * 2**30
MAX_JOBS = 16


@dataclass(frozen=True)
class Task:
    """One case under its op's name, and the backend that is judged on it."""

    op: str
    backend: str
    case: Case

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        return f"{self.case.T}x{self.case.N}x{self.case.M}"

    def __str__(self) -> str:
        case = self.case
        return f"{self.op} {case.terms} r={case.r} {self.dtype} {self.backend} {self.shape}"

    def command(self, device: str) -> str:
        """The command that runs this task alone."""
        return (
            f"python -m pera_kernels verify --device {device} --backend {self.backend} "
            f"--ops {self.op} --terms {self.case.terms} --ranks {self.case.r} "
            f"--dtypes {self.dtype} --shapes {self.shape} --seed {self.case.seed}"
        )


@dataclass(frozen=True)
class Result:
    """The verdicts on a task, or why there are none: an error, or a backend that cannot run."""

    task: Task
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""
    unavailable: str = ""

    @property
    def failed(self) -> bool:
        passed = self.verdicts and all(verdict.passed for verdict in self.verdicts)
        return not passed and not self.unavailable

    @property
    def ratio(self) -> float:
        return max((verdict.ratio for verdict in self.verdicts), default=0.0)

    def text(self, device: str) -> str:
        """One line; for a failure more, with the command that repeats it."""
        if self.unavailable:
            return f"unavailable  {self.task}: {self.unavailable}"
        if not self.failed:
            return f"pass {self.ratio:7.2f} {self.task}"
        reasons = [str(verdict) for verdict in self.verdicts if not verdict.passed]
        lines = [
            f"FAIL {self.ratio:7.2f} {self.task}",
            self.error,
            *reasons,
            self.task.command(device),
        ]
        return "\n    ".join(line for line in lines if line)


def plan(given: argparse.Namespace) -> list[list[Task]]:
    """The tasks in groups that share compiled kernels, the longest groups first."""
    groups = []
    axes = (enumerate(given.dtypes), enumerate(given.terms), enumerate(given.ranks))
    for (at_dtype, dtype), (at_terms, terms), (at_rank, r) in product(*axes):
        turn = at_dtype + at_terms + at_rank
        ops = [op for op in given.ops or OPS if op != "mixed" or dtype in ("bfloat16", "float16")]
        turning = [op for op in ops if op in _taking_turns(given)]
        shapes = given.shapes or SHAPES[given.device]
        if not given.shapes and not given.exhaustive:
            shapes = [shapes[(turn + at_terms) % len(shapes)]]
        group = []
        for op, (T, N, M), backend in product(ops, shapes, given.backend or BACKENDS):
            if backend == "triton" and op in turning and op != turning[turn % len(turning)]:
                continue
            options = {"terms": terms, "r": r, "dtype": DTYPES[dtype], "seed": given.seed}
            group.append(Task(op, backend, Case(T=T, N=N, M=M, **options, **OPS[op])))
        if group:
            groups.append(group)
    return sorted(groups, key=lambda group: -expanded_rank(group[0].case.r, group[0].case.terms))


def _taking_turns(given: argparse.Namespace) -> tuple[str, ...]:
    return () if given.ops or given.exhaustive else TAKING_TURNS[given.device]


def coverage(given: argparse.Namespace) -> list[str]:
    """What is covered and what only sampled, in words."""
    lines = [
        f"{' and '.join(given.backend or BACKENDS)}: {', '.join(given.ops or OPS)}",
        f"terms {', '.join(given.terms)}; ranks {', '.join(map(str, given.ranks))}; "
        f"{', '.join(given.dtypes)}",
    ]
    if (turning := _taking_turns(given)) and "triton" in (given.backend or BACKENDS):
        lines.append(
            f"triton: at each terms, rank and dtype only one in turn of {', '.join(turning)} "
            "(--exhaustive: all)"
        )
    shapes = ", ".join("x".join(map(str, shape)) for shape in given.shapes or SHAPES[given.device])
    turn = "" if given.shapes or given.exhaustive else "one in turn of "
    return [*lines, f"tokens x in x out: {turn}{shapes}"]


def judge(task: Task, device: str) -> tuple[Verdict, ...]:
    """The verdicts on a task; a failure by a handful of values is judged again on more draws."""
    case, backend = task.case, task.backend
    verdicts = testing.check(case, backend, device)
    if case.dtype == torch.float64:
        single = testing.check(replace(case, dtype=torch.float32), "reference", device)
        ulps = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps * FLOAT64_ALLOWANCE
        return tuple(
            replace(v, reference_max=s.reference_max * ulps, reference_rms=s.reference_rms * ulps)
            for v, s in zip(verdicts, single, strict=True)
        )
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if any(v.count < testing.POOLED_COEFFICIENTS and not v.notes for v in failed):
        pooled = MORE_DRAWS * testing.draws(case)
        verdicts = testing.check(case, backend, device, pooled=pooled)
    return tuple(verdicts)


# A GPU error leaves the process without a working context: what follows there says nothing.
_broken = ""


def _run(group: Sequence[Task], device: str) -> list[Result]:
    global _broken
    results = []
    for task in group:
        dtypes = (task.case.dtype, task.case.factor_dtype)
        if reason := unavailable(task.backend, torch.device(device), dtypes):
            results.append(Result(task, unavailable=reason))
            continue
        if _broken:
            error = f"not run, an earlier case broke the process: {_broken}"
            results.append(Result(task, error=error))
            continue
        try:
            with testing.poisoned_memory():
                results.append(Result(task, judge(task, device)))
        except Exception as raised:  # Whatever it is, it is reported and the exit status is 1.
            message = str(raised).strip() or "no message"
            error = f"{type(raised).__name__}: {message.splitlines()[0]}"
            results.append(Result(task, error=error))
            if "CUDA error" in message or "HIP error" in message:
                _broken = error
    return results


def _one_thread() -> None:
    """The tensors are small: more threads would wait for each other."""
    torch.set_num_threads(1)


def measure(groups: Sequence[list[Task]], device: str, jobs: int) -> Iterator[list[Result]]:
    """Run every group in one of ``jobs`` processes, or in this one if that is 0.

    The processes are spawned, so that a kernel that crashes takes one of them and not the report.
    """
    if jobs == 0:
        yield from (_run(group, device) for group in groups)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(groups)), spawn, initializer=_one_thread)
    try:
        pending = {pool.submit(_run, group, device): group for group in groups}
        for future in as_completed(pending):
            try:
                yield future.result()
            except BrokenProcessPool:
                error = "not run, or cut off: one of the processes died"
                yield [Result(task, error=error) for task in pending[future]]
    except BaseException:
        # Interrupted: nobody wants to wait for what is under way.
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(device: str) -> int:
    jobs = min(MAX_JOBS, os.cpu_count() or 1)
    if device == "cuda":
        jobs = min(jobs, torch.cuda.mem_get_info()[0] // BYTES_PER_JOB)
    return max(1, jobs)


def summary(results: Sequence[Result]) -> list[str]:
    """How many cases were judged, failed and could not run, by op and backend and altogether."""
    parts: dict[str, list[Result]] = {}
    for result in results:
        parts.setdefault(f"{result.task.op} {result.task.backend}", []).append(result)
    lines = []
    for name, own in [*sorted(parts.items()), ("all", results)]:
        judged = [result for result in own if not result.unavailable]
        lines.append(
            f"{name}: {len(judged)} cases, {sum(len(r.verdicts) for r in judged)} outputs, "
            f"{sum(r.failed for r in judged)} failed, {len(own) - len(judged)} unavailable; "
            f"largest ratio {max((r.ratio for r in judged), default=0.0):.2f}"
        )
    return lines


def verify(given: argparse.Namespace) -> int:
    """Run the command; its exit status."""
    found = torch.cuda.is_available()
    if given.device == "cuda" and not found:
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    given.device = device = given.device or ("cuda" if found else "cpu")
    groups = plan(given)
    if not groups:
        raise ValueError("--ops mixed is about bfloat16 and float16; --dtypes has neither")
    if device == "cpu":
        # Triton reads it when it is imported: here at the first launch, in new processes anyway.
        os.environ["TRITON_INTERPRET"] = "1"
    jobs = _jobs(device) if given.jobs is None else given.jobs
    about = describe.installation()
    versions = about["versions"]
    print(
        f"pera_kernels {about['pera_kernels']}, torch {versions['torch']}, triton "
        f"{versions['triton'] or 'not installed'}; {about['device']}, {max(jobs, 1)} process(es)"
    )
    print(*coverage(given), sep="\n")
    print(
        f"ratio: error / ({testing.FACTOR:g} x the reference's + {testing.FLOOR_ULPS_MAX:g} ulps of"
        f" the largest value for max, {testing.FLOOR_ULPS_RMS:g} ulp of the rms value for rms); "
        "at most 1 passes\n",
        flush=True,
    )
    start, results, interrupted = time.perf_counter(), [], False
    # A time limit's SIGTERM is an interruption too: what was measured is still summed up.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for some in measure(groups, device, jobs):
            results += some
            for result in some:
                if result.failed or not given.failures:
                    print(result.text(device), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, handler)
    print("", *summary(results), f"{time.perf_counter() - start:.0f} s", sep="\n")
    if interrupted:
        print(f"interrupted: {sum(map(len, groups)) - len(results)} cases were not run")
        return 130
    # A backend that was named and cannot run is no pass.
    missing = given.backend and any(result.unavailable for result in results)
    return int(bool(missing or any(result.failed for result in results)))
