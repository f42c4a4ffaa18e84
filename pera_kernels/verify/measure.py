"""Run the tasks, in this process or in several, and judge each by the numeric rule."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch

from pera_kernels.terms import coefficient_count
from pera_kernels.testing import POOLED_COEFFICIENTS, Case, Verdict, check, draws
from pera_kernels.verify.plan import Task, groups

__all__ = ["Row", "in_order", "measure"]

# Nothing here is more exact than float64, so its reference is taken to err as the float32 one does,
# in its own ulps, times this: both sides of the comparison carry such an error, summed in other
# orders. A mistake is many powers of ten larger.
FLOAT64_ALLOWANCE = 16.0
# The ratio of two errors of a few numbers exceeds the bound by chance about once in a hundred:
# then this many more pools of draws have a say.
MORE_POOLS = 4


@dataclass(frozen=True)
class Row:
    """One task on one backend: its verdicts, or why there are none."""

    task: Task
    backend: str
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""
    unavailable: str = ""
    draws: int = 1
    seconds: float = 0.0

    @property
    def status(self) -> str:
        if self.unavailable:
            return "unavailable"
        passed = self.verdicts and not self.error and all(v.passed for v in self.verdicts)
        return "pass" if passed else "FAIL"

    @property
    def worst(self) -> Verdict | None:
        """The output that failed, or came nearest to it."""
        return max(self.verdicts, key=lambda v: (not v.passed, v.ratio), default=None)


def _check(case: Case, backend: str, device: str) -> list[Verdict]:
    verdicts = check(case, backend, device)
    if case.dtype != torch.float64:
        return verdicts
    single = check(replace(case, dtype=torch.float32), "reference", device)
    ulps = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps * FLOAT64_ALLOWANCE
    return [
        replace(v, reference_max=s.reference_max * ulps, reference_rms=s.reference_rms * ulps)
        for v, s in zip(verdicts, single, strict=True)
    ]


def _few(case: Case, name: str) -> bool:
    """Whether an output has so few values, all draws together, that chance could fail it."""
    count = coefficient_count(case.r, case.terms)
    rows = case.M if case.op == "delta_weight" else case.T
    size = {
        "y": rows * (case.N if case.op == "delta_weight" else case.M),
        "dx": case.T * case.N,
        "dA": case.r * case.N,
        "dB": case.M * case.r,
        "dh": count,
    }
    return size[name] * draws(case) < POOLED_COEFFICIENTS


def _pooled(pools: Sequence[Verdict], draws_each: int) -> Verdict:
    """One verdict on several equal pools of draws."""

    def rms(name: str) -> float:
        return math.sqrt(sum(getattr(v, name) ** 2 for v in pools) / len(pools))

    at, worst = max(enumerate(pools), key=lambda pair: _nan_is_worst(pair[1].max_error))
    index = worst.worst_index
    return replace(
        worst,
        rms_error=rms("rms_error"),
        reference_max=max(v.reference_max for v in pools),
        reference_rms=rms("reference_rms"),
        floor_max=max(v.floor_max for v in pools),
        floor_rms=rms("floor_rms"),
        worst_index=(index[0] + at * draws_each, *index[1:]) if index else index,
        notes=tuple(dict.fromkeys(note for v in pools for note in v.notes)),
    )


def _nan_is_worst(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _judge(case: Case, backend: str, device: str) -> tuple[tuple[Verdict, ...], int]:
    """The verdicts and the number of draws. A failure by a handful of values is judged again."""
    verdicts, each = _check(case, backend, device), draws(case)
    if not any(not v.passed and _few(case, v.name) for v in verdicts):
        return tuple(verdicts), each
    pools = [verdicts]
    for more in range(1, MORE_POOLS + 1):
        # The draws of a case are 1000 apart: these are draws it has not had.
        again = replace(case, seed=case.seed + 1000 * each * more)
        pools.append(_check(again, backend, device))
    pooled = tuple(_pooled(of_one, each) for of_one in zip(*pools, strict=True))
    return pooled, each * len(pools)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN: what nobody wrote is not mistaken for an earlier result."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# A CUDA error leaves the process without a working context: what follows there says nothing.
_broken = ""


def _run(task: Task, backend: str, device: str) -> Row:
    global _broken
    reason = task.reason(backend, device)
    if reason is not None:
        return Row(task, backend, unavailable=reason)
    if _broken:
        return Row(task, backend, error=f"not run, an earlier case broke the process: {_broken}")
    start = time.perf_counter()
    verdicts: tuple[Verdict, ...] = ()
    error, used_draws = "", 1
    try:
        with _poisoned():
            verdicts, used_draws = _judge(task.case, backend, device)
    except Exception as exception:  # Any: the row says so, and the exit status is 1.
        message = str(exception).strip() or "no message"
        error = f"{type(exception).__name__}: {message.splitlines()[0]}"
        if "CUDA error" in message or "HIP error" in message:
            _broken = error
    seconds = time.perf_counter() - start
    return Row(task, backend, verdicts, error, draws=used_draws, seconds=seconds)


def _run_group(group: Sequence[Task], device: str) -> list[Row]:
    return [_run(task, backend, device) for task in group for backend in task.backends]


def _one_thread() -> None:
    """The tensors are small: more threads would wait for each other."""
    torch.set_num_threads(1)


def measure(tasks: Sequence[Task], device: str, jobs: int) -> Iterator[list[Row]]:
    """Every task on each of its backends; yields the rows of a group of tasks as it is done.

    Processes are spawned, so that a kernel that crashes takes one of them and not the report.
    ``jobs=0`` runs in this process.
    """
    work = groups(tasks)
    if jobs == 0:
        before = torch.get_num_threads()
        try:
            _one_thread()
            for group in work:
                yield _run_group(group, device)
        finally:
            torch.set_num_threads(before)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(jobs, len(work)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_one_thread,
    )
    try:
        pending = {pool.submit(_run_group, group, device): group for group in work}
        for future in as_completed(pending):
            yield _result(future, pending[future])
    except BaseException:
        # Interrupted: nobody wants to wait for what is under way.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        pool.shutdown()
        raise
    pool.shutdown()


def _result(future: Future[list[Row]], group: Sequence[Task]) -> list[Row]:
    try:
        return future.result()
    except BrokenProcessPool:
        died = "not run, or cut off: one of the processes died"
        return [Row(task, b, error=died) for task in group for b in task.backends]


def in_order(rows: Sequence[Row], tasks: Sequence[Task]) -> list[Row]:
    """The rows in the order of the tasks."""
    place = {(task.op, task.case): at for at, task in enumerate(tasks)}
    return sorted(rows, key=lambda row: place[row.task.op, row.task.case])
