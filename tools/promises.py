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


def _recorded(test: str, gpu: bool = False) -> list[dict[str, Any]]:
    """The latest row of every test, and case of a test, of this name."""
    rows = [row for row in _rows("promises.jsonl") if (row["device"] != "cpu") == gpu]
    latest = {row["test"]: row for row in rows if test in row["test"].partition("[")[0]}
    return list(latest.values())


def _figures(test: str, told: Callable[[list[dict[str, Any]]], str], gpu: bool = False) -> str:
    rows = _recorded(test, gpu)
    return told(rows) if rows else NOT_MEASURED


def last(test: str, text: str) -> Callable[[], str]:
    """The figures of the latest run of one test, put into words."""
    return lambda: _figures(test, lambda rows: text.format(**rows[-1]))


def out_of_memory() -> str:
    return _figures(
        "::test_out_of_memory",
        lambda rows: (
            f"at each of {sum(row['operations'] for row in rows):,} operations in {len(rows)} cases"
        ),
    )


def caches() -> str:
    return _figures(
        "::test_a_bad_triton_cache",
        lambda rows: f"{sum(row['faults'] for row in rows)} faults survived",
    )


def bits() -> str:
    def told(rows: list[dict[str, Any]]) -> str:
        return f"{sum(row['runs'] for row in rows):,} runs of {len(rows)} problems"

    cpu = _figures("::test_a_hundred_runs_on_the_torch", told)
    interpreted = _figures("::test_runs_of_the_interpreted", told)
    gpu = _figures("::test_a_hundred_runs_on_a_gpu", told, gpu=True)
    return f"`torch` on a CPU: {cpu}; interpreted kernels: {interpreted}; on a GPU: {gpu}"


def threads() -> str:
    def calls(rows: list[dict[str, Any]]) -> str:
        total = sum(row["threads"] * row["calls"] for row in rows)
        return f"{total:,} calls from {rows[-1]['threads']} threads at once"

    def streams(rows: list[dict[str, Any]]) -> str:
        return f"{sum(row['streams'] * row['calls'] for row in rows):,} calls"

    def graphs(rows: list[dict[str, Any]]) -> str:
        return f"{sum(row['replays'] for row in rows):,} replays"

    return (
        f"{_figures('::test_eight_threads', calls)}; two streams: "
        f"{_figures('::test_two_streams', streams, gpu=True)}; captured graphs: "
        f"{_figures('::test_every_replay', graphs, gpu=True)}"
    )


def addresses() -> str:
    def told(rows: list[dict[str, Any]]) -> str:
        return f"{max(row['elements'] for row in rows):,} elements a tensor"

    return (
        "in the interpreter, by strides over little storage; on a GPU: "
        f"{_figures('::test_more_than_2_31_elements', told, gpu=True)}"
    )


def passed(*files: str) -> Callable[[], str]:
    """How many tests of these files passed, failed and were skipped."""

    def told() -> str:
        counts: Counter[str] = Counter()
        for file in files:
            for row in _recorded(file):
                if "::" not in row["test"]:
                    counts.update({key: row[key] for key in ("passed", "failed", "skipped")})
        shown = [f"{counts[key]:,} {key}" for key in ("passed", "failed", "skipped") if counts[key]]
        return ", ".join(shown) or NOT_MEASURED

    return told


def _random_cases(kind: str) -> tuple[str, dict[str, Any]] | None:
    """How the last long run ended on the checks of this kind, and its row."""
    if not (rows := _rows("properties.jsonl")):
        return None
    row = rows[-1]
    checks = {name: n for name, n in row["by_check"].items() if name.endswith(kind)}
    failed = [name for name in checks if name in row["failed"]]
    told = f"{sum(checks.values()):,} random cases, "
    return told + (f"failed: {', '.join(failed)}" if failed else "no failure"), row


def properties() -> str:
    if (found := _random_cases("rule")) is None:
        return NOT_MEASURED
    told, row = found
    return f"{told}; worst error {max(row['worst_ratio'].values())} of what is allowed"


def infinities() -> str:
    found = _random_cases("not finite")
    return NOT_MEASURED if found is None else found[0]


def mutants() -> str:
    if not (rows := _rows("mutations.jsonl")):
        return NOT_MEASURED
    states = Counter(row["status"] for row in rows)
    return f"{len(rows)} mutants: " + ", ".join(f"{n} {state}" for state, n in states.items())


MEMORY = "test_guarded_memory.py"
BAD_INPUT = tuple(f"test_{name}.py" for name in ("bad_input", "checkpoint", "peft", "command_line"))

PROMISES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    (
        "Outputs and gradients: maximum and RMS error at most twice those of the reference in the "
        "same dtype, plus a few ulps; for any shape, rank, stride, dtype, scale",
        "`test_properties.py`, `test_numerics.py`, `test_regressions.py`; "
        "`python -m pera_kernels verify`",
        properties,
    ),
    (
        "Infinities and NaN: what is not finite in the float64 truth is never finite, and what is "
        "finite there stays finite, but for the exceptions that `check_spread` lists",
        "`test_properties.py` (`random_problems.py::check_spread`)",
        infinities,
    ),
    ("The same bits in every run", "`test_determinism.py`", bits),
    (
        "The same bits in every thread, stream and captured graph",
        "`test_determinism.py::test_eight_threads_*`, `::test_two_streams_*`, "
        "`::test_every_replay_*`",
        threads,
    ),
    (
        "No uninitialised memory is read, nothing outside the outputs is written, inputs are never "
        "modified: canaries on both sides of every input, fresh memory full of NaN",
        f"`{MEMORY}`",
        passed(MEMORY),
    ),
    ("Addresses past 2³¹ elements", f"`{MEMORY}`", addresses),
    (
        "Bad input: an error that names the argument, nothing changed",
        ", ".join(f"`{file}`" for file in BAD_INPUT),
        passed(*BAD_INPUT),
    ),
    (
        "A save that is killed leaves the old checkpoint or the new one",
        "`test_faults.py::test_killed_during_a_save_at_50_points`",
        last(
            "::test_killed_during_a_save",
            "{kills} kills: {old} times the one checkpoint, {new} times the other (in {between} "
            "beside another readable configuration, with a warning)",
        ),
    ),
    (
        "A damaged file is refused, or loads exactly",
        "`test_faults.py::test_200_random_corruptions_are_refused_or_load_exactly`",
        last(
            "::test_200_random_corruptions",
            "{corruptions} corruptions: {refused} refused, {loaded_exactly} loaded exactly",
        ),
    ),
    (
        "A hostile file does not exhaust memory",
        "`test_faults.py::test_hostile_files_do_not_exhaust_memory`",
        last("::test_hostile_files", "{refused} of {hostile_files} refused within {gib} GiB"),
    ),
    (
        "Loading runs no code",
        "`test_checkpoint.py::test_a_pickle_with_code_does_not_run`",
        last("::test_a_pickle_with_code", "{refused} hostile pickles refused, none ran"),
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
        caches,
    ),
    ("The suite notices a broken line", "`python -m tools.mutate`", mutants),
)


def promises() -> str:
    lines = ["| promise | test | last figure |", "|---|---|---|"]
    for promise, test, figure in PROMISES:
        lines.append(f"| {promise} | {test} | {figure()} |")
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
    head = ["name", "python", "torch", "triton", "numpy", "checks", "result"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        counts = f"{row['passed']} passed" if row.get("passed") else ""
        if row.get("skipped"):
            counts += f", {row['skipped']} skipped"
        result = ", ".join(part for part in (row["status"], counts, row.get("reason")) if part)
        cells = [row.get(key) or "" for key in head[:-1]]
        lines.append(f"| {' | '.join(map(str, cells))} | {result} |")
    return "\n".join(lines)


CHECKED = {
    "contents": "the package and nothing else",
    "installed": "built, installed and used outside the checkout",
    "licence": "licences of all dependencies are permissive (MPL-2.0 in extras only)",
    "advisories": "known vulnerabilities of all dependencies, by pip-audit",
}


def supply_chain() -> str:
    rows = _rows("supply_chain.jsonl")
    if not rows:
        return "Not measured."
    lines = ["| check | of | result |", "|---|---|---|"]
    for check, words in CHECKED.items():
        own = [row for row in rows if row["check"] == check]
        states = Counter(row["status"] for row in own)
        result = ", ".join(f"{n} {state}" for state, n in states.items())
        lines.append(f"| {words} | {', '.join(row['name'] for row in own)} | {result} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "promises": promises,
    "mutations": mutations,
    "compatibility": compatibility,
    "supply chain": supply_chain,
}
