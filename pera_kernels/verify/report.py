"""The table, the summary, the failures in words, and the JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from pera_kernels.verify.measure import Row
from pera_kernels.verify.plan import OPS

__all__ = ["failures", "overview", "payload", "summary", "table"]

SHOWN_FAILURES = 20
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

# Heading, alignment, and how dear a column is: the dearest go first where the terminal is narrow.
COLUMNS = (
    ("op", "<", 0),
    ("terms", "<", 0),
    ("r", ">", 0),
    ("dtype", "<", 0),
    ("backend", "<", 0),
    ("shape", "<", 3),
    ("out", "<", 0),
    ("max", ">", 0),
    ("(ref)", ">", 2),
    ("rms", ">", 1),
    ("(ref)", ">", 2),
    ("ratio", ">", 0),
    ("", "<", 0),
    ("at", "<", 4),
    ("got", ">", 5),
    ("truth", ">", 5),
)


def _error(value: float) -> str:
    """Two digits, and no padding in the exponent: 1.2e-3."""
    text = f"{value:.1e}"
    return text.replace("e-0", "e-").replace("e+0", "e+") if value else "0"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e+")


def _at(index: tuple[int, ...], draws: int) -> str:
    """The index of an element; before a colon the draw, where several are pooled."""
    if not index:
        return "-"
    inside = ",".join(map(str, index[1:]))
    return f"{index[0]}:{inside}" if draws > 1 else inside


def _cells(row: Row) -> list[str]:
    task = row.task
    case = task.case
    cells = [task.op, case.terms, str(case.r), SHORT[task.dtype], row.backend, task.shape]
    worst = row.worst
    if worst is None:
        verdict = "n/a" if row.unavailable else row.status
        return [*cells, "-", "-", "-", "-", "-", "-", verdict, "-", "-", "-"]
    return [
        *cells,
        worst.name,
        _error(worst.max_error),
        _error(worst.reference_max),
        _error(worst.rms_error),
        _error(worst.reference_rms),
        _ratio(worst.ratio),
        row.status,
        _at(worst.worst_index, row.draws),
        f"{worst.worst_got:.5g}",
        f"{worst.worst_truth:.5g}",
    ]


def _severity(row: Row) -> tuple[bool, float]:
    return row.status == "FAIL", row.worst.ratio if row.worst else -1.0


def worst_per_key(rows: Iterable[Row]) -> list[Row]:
    """One row per op, terms, rank, dtype and backend: that of the shape that did worst."""
    found: dict[Any, Row] = {}
    for row in rows:
        case = row.task.case
        key = (row.task.op, case.dtype, case.terms, case.r, row.backend)
        if key not in found or _severity(row) > _severity(found[key]):
            found[key] = row
    return list(found.values())


def _format(
    headings: Sequence[tuple[str, str, int]], lines: list[list[str]], width: int | None
) -> list[str]:
    """Aligned columns; of those that are more than ``width`` the dearest are left out."""
    sizes = [
        max(len(text) for text in column)
        for column in zip([heading for heading, _, _ in headings], *lines, strict=True)
    ]
    kept = list(range(len(headings)))
    while width is not None and sum(sizes[at] + 1 for at in kept) - 1 > width:
        dearest = max(headings[at][2] for at in kept)
        if dearest == 0:
            break
        kept = [at for at in kept if headings[at][2] < dearest]

    def line(texts: Sequence[str]) -> str:
        return " ".join(f"{texts[at]:{headings[at][1]}{sizes[at]}}" for at in kept).rstrip()

    return [line([heading for heading, _, _ in headings]), *map(line, lines)]


def table(rows: Sequence[Row], width: int | None = None) -> list[str]:
    return _format(COLUMNS, [_cells(row) for row in worst_per_key(rows)], width)


def overview(rows: Sequence[Row]) -> list[str]:
    """Per op, dtype and backend: how many, how many failed, the largest ratio."""
    parts: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.task.op, row.task.dtype, row.backend), []).append(row)
    place: dict[tuple[str, str], int] = {}
    for op, dtype, _ in parts:
        place.setdefault((op, dtype), len(place))
    lines = []
    for op, dtype, backend in sorted(parts, key=lambda key: (place[key[:2]], key[2] != "triton")):
        part = parts[op, dtype, backend]
        judged = [row for row in part if not row.unavailable]
        ratios = [v.ratio for row in judged for v in row.verdicts]
        lines.append(
            [
                op,
                SHORT[dtype],
                backend,
                str(len(judged)),
                str(sum(len(row.verdicts) for row in judged)),
                str(sum(row.status == "FAIL" for row in judged)),
                _ratio(max(ratios)) if ratios else "-",
            ]
        )
    names = ("op", "dtype", "backend", "cases", "outputs", "failed", "largest ratio")
    return _format([(n, "<" if at < 3 else ">", 0) for at, n in enumerate(names)], lines, None)


def describe(row: Row) -> str:
    task = row.task
    return (
        f"{task.op} {task.case.terms} r={task.case.r} {SHORT[task.dtype]} {row.backend} "
        f"{task.shape}"
    )


def _again(row: Row, device: str) -> str:
    task = row.task
    return (
        f"python -m pera_kernels verify --device {device} --backend {row.backend} --ops {task.op} "
        f"--terms {task.case.terms} --ranks {task.case.r} --dtypes {task.dtype} "
        f"--shapes {task.shape} --seed {task.case.seed}"
    )


def failures(rows: Sequence[Row], device: str) -> list[str]:
    """Each failure in words, with the command that runs it alone; then why anything did not run."""
    failed = [row for row in rows if row.status == "FAIL"]
    lines = []
    for row in failed[:SHOWN_FAILURES]:
        lines += ["", f"FAIL {describe(row)}"]
        lines += [f"  {row.error}"] if row.error else []
        lines += [f"  {verdict}" for verdict in row.verdicts if not verdict.passed]
        lines += [f"  again: {_again(row, device)}"]
    if len(failed) > SHOWN_FAILURES:
        lines += ["", f"and {len(failed) - SHOWN_FAILURES} more failures; --json has all of them"]
    reasons = {(row.backend, row.unavailable): 0 for row in rows if row.unavailable}
    for row in rows:
        if row.unavailable:
            reasons[row.backend, row.unavailable] += 1
    for (backend, reason), count in reasons.items():
        lines += ["", f"n/a: {backend} could not run {_count(count, 'case')}: {reason}"]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if not row.unavailable]
    failed = [row for row in judged if row.status == "FAIL"]
    outputs = sum(len(row.verdicts) for row in judged)
    bad = sum(not verdict.passed for row in judged for verdict in row.verdicts)
    errors = sum(bool(row.error) for row in judged)
    text = f"{_count(len(judged), 'case')}, {_count(outputs, 'output')}, {len(failed)} failed"
    if failed:
        text += f" ({_count(bad, 'output')}, {_count(errors, 'error')})"
    if len(judged) < len(rows):
        text += f", {_count(len(rows) - len(judged), 'case')} could not run"
    measured = [row for row in judged if row.verdicts]
    if measured:
        row = max(measured, key=lambda row: max(v.ratio for v in row.verdicts))
        verdict = max(row.verdicts, key=lambda v: v.ratio)
        text += f"; largest ratio {_ratio(verdict.ratio)}: {verdict.name} of {describe(row)}"
    return text


def payload(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, for ``--json``: what was not finite stands as a string."""
    return _finite({**about, "rows": [_as_json(row) for row in rows]})


def _as_json(row: Row) -> dict[str, Any]:
    case = row.task.case
    return {
        "op": row.task.op,
        "options": {key: str(value) for key, value in OPS[row.task.op].items()},
        "terms": case.terms,
        "r": case.r,
        "T": case.T,
        "N": case.N,
        "M": case.M,
        "dtype": row.task.dtype,
        "backend": row.backend,
        "seed": case.seed,
        "draws": row.draws,
        "scale": case.scale,
        "status": row.status,
        "error": row.error,
        "unavailable": row.unavailable,
        "seconds": round(row.seconds, 4),
        "outputs": [
            {**asdict(verdict), "ratio": verdict.ratio, "passed": verdict.passed}
            for verdict in row.verdicts
        ],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
