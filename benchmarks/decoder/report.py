"""Rows of the decoder layer: how they are made, read in a terminal, and set as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pera_kernels.verify.numerics import Case

from .. import work
from ..gate import Judgement
from ..layers import FROZEN
from ..results import DTYPES, Host, Row, default_file, read
from ..timing import Timing
from .adapters import Contender
from .layer import TARGETS, Problem

__all__ = ["default_out", "dtype_name", "failed_row", "flops", "table", "terminal", "timed_row"]


def default_out(device: torch.device) -> Path:
    """One file per kind of device, beside those of the layers."""
    return default_file(device).with_name(f"decoder-{default_file(device).name}")


def dtype_name(contender: Contender, problem: Problem) -> str:
    pair = (problem.dtype, contender.adapter_dtype or problem.dtype)
    return next(name for name, dtypes in DTYPES.items() if dtypes == pair)


def conditions(problem: Problem) -> str:
    """What a row's own keys do not say."""
    text = (
        f"batch {problem.batch} x sequence {problem.sequence}, "
        f"{problem.heads} heads, {problem.kv_heads} key-value heads"
    )
    return text + ", activation checkpointing" * problem.checkpointing


def flops(contender: Contender, problem: Problem) -> float:
    """Of forward and backward: the seven projections (``benchmarks.work``) and causal attention.

    Attention is two products of (T, sequence) by head in the forward and four in the backward, of
    which the mask leaves half. A forward that checkpointing repeats does not count.
    """
    hidden, kv = problem.hidden, problem.hidden // problem.heads * problem.kv_heads
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, problem.intermediate),
        "up_proj": (hidden, problem.intermediate),
        "down_proj": (problem.intermediate, hidden),
    }
    total = (2 + 4) * 2 * problem.T * problem.sequence * hidden / 2
    for name, (N, M) in sizes.items():
        plan = contender.plan if name in TARGETS else "dense"
        case = Case(terms=contender.terms or "full", r=problem.r, T=problem.T, N=N, M=M)
        total += work.of(plan, case, "both").flops
    return total


def timed_row(
    contender: Contender,
    problem: Problem,
    host: Host,
    phase: str,
    timing: Timing,
    *,
    ratio: float,
    peak: float,
    saved: float,
    launches: int | None,
    error_ratio: float | None,
) -> Row:
    """``peak`` and ``saved`` in MiB, times from ``timing`` in milliseconds."""
    low, high = timing.spread
    return _row(
        contender,
        problem,
        host,
        phase=phase,
        median_ms=timing.median,
        p20_ms=low,
        p80_ms=high,
        ratio_to_frozen=ratio,
        peak_mib=peak,
        saved_mib=saved,
        tflops=flops(contender, problem) / (timing.median * 1e9),
        launches=launches,
        error_ratio=error_ratio,
        rounds=len(timing.samples),
        note=conditions(problem),
    )


def failed_row(contender: Contender, problem: Problem, host: Host, judged: Judgement) -> Row:
    """For one that failed the gate; the reason stands behind the conditions in its note."""
    return _row(
        contender,
        problem,
        host,
        phase="gate",
        error_ratio=judged.error_ratio,
        status="failed",
        note=f"{conditions(problem)}: {judged.failure}",
    )


def _row(contender: Contender, problem: Problem, host: Host, **measured: Any) -> Row:
    """n and m are the hidden and the intermediate size; what was not measured is None."""
    rounded: dict[str, Any] = {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in measured.items()
    }
    return Row(
        contender=contender.name,
        plan=contender.plan,
        # The frozen layer is that of whatever is compared with it.
        terms=contender.terms or "full",
        r=problem.r,
        T=problem.T,
        n=problem.hidden,
        m=problem.intermediate,
        dtype=dtype_name(contender, problem),
        dropout=problem.dropout,
        **rounded,
        **asdict(host),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _adapters(row: Row | dict[str, Any]) -> str:
    fields = row if isinstance(row, dict) else vars(row)
    return "-" if fields["contender"] == FROZEN else fields["dtype"].rpartition("+")[2]


def terminal(rows: list[Row], problem: Problem) -> str:
    """The rows of one problem, aligned, in at most 110 columns; what went wrong stands below."""
    dtype = str(problem.dtype).removeprefix("torch.")
    text = [
        f"hidden {problem.hidden}, intermediate {problem.intermediate}, {conditions(problem)}",
        f"{dtype}, adapters on {', '.join(TARGETS)}, r={problem.r}, dropout {problem.dropout:g}",
    ]
    head = ("median ms", "p20", "p80", "x frozen", "peak MiB", "saved MiB", "TFLOP/s", "launches")
    lines: list[tuple[str, ...]] = [("contender", "adapters", "phase", *head)]
    for row in rows:
        if row.status != "timed":
            continue
        cells = (
            _number(row.median_ms, 3),
            _number(row.p20_ms, 3),
            _number(row.p80_ms, 3),
            _number(row.ratio_to_frozen, 3),
            _number(row.peak_mib, 1),
            _number(row.saved_mib, 1),
            _number(row.tflops, 3),
            _number(row.launches, 0),
        )
        lines.append((row.contender, _adapters(row), row.phase, *cells))
    for name, adapters, phase, *numbers in lines:
        text.append(f"{name:<14}{adapters:<9}{phase:<5}" + "".join(f"{n:>10}" for n in numbers))
    text += [f"{row.contender} ({row.dtype}): {row.note}" for row in rows if row.status != "timed"]
    return "\n".join(text)


def _latest(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[Any, dict[str, Any]]]:
    """By conditions, contender and phase: the last row; one that failed drops what was timed."""
    found: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for row in rows:
        activations = row["dtype"].partition("+")[0]
        shape = tuple(row[key] for key in ("device", "n", "m", "r", "dropout"))
        group = found.setdefault((*shape, activations, row["note"].partition(": ")[0]), {})
        phases = group.setdefault((row["contender"], _adapters(row)), {})
        if row["status"] != "timed":
            phases.clear()
        else:
            phases.pop("gate", None)
        phases[row["phase"]] = row
    return found


def table(path: Path) -> str:
    """The rows of a file as Markdown, a table for each set of conditions; the latest rows win."""
    rows = read(path)
    if not rows:
        raise ValueError(f"{path.name} holds no row")
    return "\n\n".join(_markdown(key, group) for key, group in _latest(rows).items())


def _markdown(key: tuple[Any, ...], group: dict[Any, dict[str, Any]]) -> str:
    device, n, m, r, dropout, activations, note = key
    lines = [
        "| contender | adapters | training step, ms | x frozen | forward + backward, ms | x frozen "
        "| peak of a step, MiB | kept for the backward, MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    timed: list[dict[str, Any]] = []
    for (contender, adapters), phases in group.items():
        if "gate" in phases:
            lines.append(f"| {contender} | {adapters} | fails the gate, not timed |||||| ")
            continue
        timed += phases.values()
        step, both = (phases.get(phase, {}).get for phase in ("step", "both"))
        cells = (
            _number(step("median_ms"), 2),
            _number(step("ratio_to_frozen"), 3),
            _number(both("median_ms"), 2),
            _number(both("ratio_to_frozen"), 3),
            _number(step("peak_mib"), 1),
            _number(step("saved_mib"), 1),
        )
        lines.append(f"| {contender} | {adapters} | " + " | ".join(cells) + " |")
    versions = sorted({f"torch {row['torch']}, commit {row['commit']}" for row in timed})
    dates = sorted({row["date"][:10] for row in timed})
    caption = (
        f"One decoder layer, hidden {n}, intermediate {m}, {note}; adapters on "
        f"{', '.join(TARGETS)} at r={r}, {activations}, dropout {dropout:g}. Medians, ratios by "
        "rounds; a training step is forward, backward and AdamW on the adapters. "
        f"{device}, {'; '.join(versions)}, {', '.join(dates)}."
    )
    return "\n".join(lines) + "\n\n" + caption
