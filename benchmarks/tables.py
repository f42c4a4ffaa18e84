"""The tables of the README and of benchmarks/README.md, from cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .cells import Case, Cells, label
from .layers import FROZEN

__all__ = ["NOT_MEASURED", "compact", "markdown", "model"]

NOT_MEASURED = "GPU: **not measured** (`tools/gpu_check.sh all OUT` gives the numbers in one call)."
# The rank, terms and dropout of the tables in the README.
SHOWN = {"r": 16, "terms": "full", "dropout": 0.0}
# Of a kernel that does nothing, on the GPUs of today; part of the model, not measured here.
LAUNCH_US = 2.5


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def shown_cases(cells: Cells, phase: str = "both") -> list[Case]:
    """The cases of the shape of which most are measured, the larger shape of equals."""
    cases = [
        case
        for case in cells.cases(lambda c: all(getattr(c, k) == v for k, v in SHOWN.items()))
        if cells.find(case, FROZEN, phase) and "+" not in case.dtype
    ]
    counts = Counter((case.n, case.m) for case in cases)
    if not counts:
        return []
    shape = max(counts, key=lambda shape: (counts[shape], shape))
    return [case for case in cases if (case.n, case.m) == shape]


def compact(cells: Cells, phase: str = "both") -> str:
    """Ratio to the frozen layer and median: contenders down, dtypes and T across."""
    cases = shown_cases(cells, phase)
    if not cases:
        return "Not measured."
    names = cells.contenders(cases, phase)
    head = ["contender", *(f"{case.dtype}, T={case.T}" for case in cases)]
    body = [
        [name, *(_ratio_and_time(cells.find(case, name, phase)) for case in cases)]
        for name in names
    ]
    rows = [r for name in names for case in cases if (r := cells.find(case, name, phase))]
    what = {"both": "Forward + backward", "eval": "Evaluation without gradients"}[phase]
    return (
        f"{markdown(head, body)}\n\n{what}, {cases[0].n}→{cases[0].m}, r={SHOWN['r']}: ratio to "
        "the frozen linear layer in the same rounds (median ms in brackets). "
        f"{label(rows)}."
    )


def _ratio_and_time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio_to_frozen"]
    time = f"{row['median_ms']:.3g} ms"
    return time if ratio is None else f"{ratio:.2f} ({row['median_ms']:.3g})"


def model(cells: Cells) -> str:
    """Ratio to the frozen layer of forward + backward, by the model and as measured: cases down,
    contenders across.
    """
    cases = shown_cases(cells)
    names = [n for n in cells.contenders(cases, "both") if n not in (FROZEN, "merged")]
    body = []
    for case in cases:
        found = [_model_and_measured(cells, case, name) for name in names]
        if any(found):
            body.append([f"{case.dtype}, T={case.T}", *found])
    if not body:
        return "No committed row carries the ceilings that the model needs."
    conditions = f"{cases[0].n}→{cases[0].m}, r={SHOWN['r']}, model / measured. "
    rows = [r for case in cases for name in names if (r := cells.find(case, name, "both"))]
    return f"{markdown(['case', *names], body)}\n\n{conditions}{label(rows)}."


def _model_and_measured(cells: Cells, case: Case, name: str) -> str:
    row, frozen = cells.find(case, name, "both"), cells.find(case, FROZEN, "both")
    if row is None or frozen is None:
        return ""
    time, floor = model_ms(row), model_ms(frozen)
    if time is None or floor is None:
        return ""
    return f"{time / floor:.2f} / {row['ratio_to_frozen']:.2f}"


def model_ms(row: dict[str, Any]) -> float | None:
    """Roofline time of the contender's own formula plus a time per launch, where it is known."""
    if row["roofline_share"] is None:
        return None
    return row["roofline_share"] * row["median_ms"] + (row["launches"] or 0) * LAUNCH_US / 1e3
