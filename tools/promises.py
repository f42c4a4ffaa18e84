"""The generated parts of tests/README.md, from the files in tests/results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "RESULTS"]

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "results"
NOT_MEASURED = "not measured"


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _faults(test: str) -> list[dict[str, Any]]:
    """The latest row of every test of this name."""
    latest = {row["test"]: row for row in _rows("faults.jsonl") if f"::{test}" in row["test"]}
    return list(latest.values())


def kills() -> str:
    if not (rows := _faults("test_killed_during_a_save")):
        return NOT_MEASURED
    row = rows[-1]
    return (
        f"{row['kills']} kills: {row['old']} times the one checkpoint, {row['new']} times the other"
        f" (in {row['between']} beside another readable configuration, with a warning)"
    )


def corruptions() -> str:
    if not (rows := _faults("test_200_random_corruptions")):
        return NOT_MEASURED
    row = rows[-1]
    return (
        f"{row['corruptions']} corruptions: {row['refused']} refused, {row['loaded_exactly']} "
        "loaded exactly"
    )


def hostile() -> str:
    if not (rows := _faults("test_hostile_files")):
        return NOT_MEASURED
    return f"{rows[-1]['refused']} of {rows[-1]['hostile_files']} refused within 2 GiB"


def out_of_memory() -> str:
    if not (rows := _faults("test_out_of_memory")):
        return NOT_MEASURED
    return f"at each of {sum(row['operations'] for row in rows):,} operations in {len(rows)} cases"


def properties() -> str:
    if not (rows := _rows("properties.jsonl")):
        return NOT_MEASURED
    row = rows[-1]
    worst = max(row["worst_ratio"].values())
    return (
        f"{row['cases']:,} random cases, {row['failures']} of {len(row['by_check'])} checks ended "
        f"early at a failure; worst error {worst} of what is allowed"
    )


def mutants() -> str:
    if not (rows := _rows("mutations.jsonl")):
        return NOT_MEASURED
    states = Counter(row["status"] for row in rows)
    return f"{len(rows)} mutants: " + ", ".join(f"{n} {state}" for state, n in states.items())


PROMISES: tuple[tuple[str, str, Callable[[], str] | str], ...] = (
    (
        "Outputs and gradients: maximum and RMS error at most twice those of the reference in the "
        "same dtype, plus a few ulps; for any shape, rank, stride, dtype, scale",
        "`test_properties.py`, `test_numerics.py`, `test_regressions.py`; "
        "`python -m pera_kernels verify`",
        properties,
    ),
    ("The same bits in every run and in every thread", "`test_determinism.py`", "100 runs"),
    (
        "No uninitialised memory is read, nothing outside the outputs is written, inputs are never "
        "modified",
        "`test_guarded_memory.py`",
        "canaries on both sides of every input",
    ),
    ("Addresses past 2³¹ elements", "`test_guarded_memory.py`", "in the interpreter"),
    (
        "Bad input: an error that names the argument, nothing changed",
        "`test_bad_input.py`, `test_checkpoint.py`, `test_peft.py`, `test_command_line.py`",
        "",
    ),
    (
        "A save that is killed leaves the old checkpoint or the new one",
        "`test_faults.py::test_killed_during_a_save_at_50_points`",
        kills,
    ),
    (
        "A damaged file is refused, or loads exactly",
        "`test_faults.py::test_200_random_corruptions_are_refused_or_load_exactly`",
        corruptions,
    ),
    (
        "A hostile file does not exhaust memory",
        "`test_faults.py::test_hostile_files_do_not_exhaust_memory`",
        hostile,
    ),
    (
        "Loading runs no code",
        "`test_checkpoint.py::test_a_pickle_with_code_does_not_run`",
        "",
    ),
    (
        "Out of memory anywhere leaves layers usable and models as they were",
        "`test_faults.py::test_out_of_memory_leaves_the_module_usable`, "
        "`test_faults.py::test_a_change_that_fails_leaves_the_state_as_it_was`",
        out_of_memory,
    ),
    (
        "A Triton cache that is damaged or cannot be written is survived",
        "`test_faults.py::test_a_bad_triton_cache_is_survived`",
        "",
    ),
    ("The suite notices a broken line", "`python -m tools.mutate`", mutants),
)


def promises() -> str:
    lines = ["| promise | test | last figure |", "|---|---|---|"]
    for promise, test, figure in PROMISES:
        told = figure() if callable(figure) else figure
        lines.append(f"| {promise} | {test} | {told} |")
    return "\n".join(lines)


def mutations() -> str:
    rows = _rows("mutations.jsonl")
    if not rows:
        return "Not measured."
    lines = ["| mutant | file | what it breaks | killed by |", "|---|---|---|---|"]
    for row in rows:
        by = row.get("killed_by") or row["status"]
        name = by.rpartition("/")[2]
        lines.append(f"| {row['name']} | {Path(row['file']).name} | {row['breaks']} | `{name}` |")
    return "\n".join(lines)


def compatibility() -> str:
    rows = _rows("compat.jsonl")
    if not rows:
        return "Not measured."
    head = ["python", "torch", "triton", "numpy", "result"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        counts = f"{row['passed']} passed" if row.get("passed") else ""
        if row.get("skipped"):
            counts += f", {row['skipped']} skipped"
        result = ", ".join(part for part in (row["status"], counts, row.get("reason")) if part)
        cells = [row.get(key) or "" for key in head[:-1]]
        lines.append(f"| {' | '.join(map(str, cells))} | {result} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "promises": promises,
    "mutations": mutations,
    "compatibility": compatibility,
}
