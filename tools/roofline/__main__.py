"""Write benchmarks/roofline.md and its CSV, and what both READMEs say of the cost.

    python -m tools.roofline              from today's launches; a few seconds
    python -m tools.roofline --compile    before that, compile what the file of this Triton lacks
    python -m tools.roofline --check      change nothing; exit status 1 if a file would change

The compiler's part is kept in benchmarks/compiled; the newest Triton's is shown.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pera_kernels.kernels import interpreting
from pera_kernels.kernels.launch import Launch
from pera_kernels.terms import Terms, lane_count

from ..documents import ROOT, render, table, write
from ..problems import Job
from .facts import Facts, compile_missing, fact_of, newest, read
from .model import CARDS, FEATURES, LAUNCH_US, Card, Layer, Step, job_of, layer

BENCHMARKS = ROOT / "benchmarks"
COMPILED = BENCHMARKS / "compiled"
PAGE, GRID, README = BENCHMARKS / "roofline.md", BENCHMARKS / "roofline.csv", ROOT / "README.md"
# The rows of the headline as they were before the kernels were brought near the roofline.
BEFORE, CHANGES = BENCHMARKS / "roofline-before.csv", BENCHMARKS / "README.md"

TOKENS = (1, 16, 64, 512, 4096, 16384, 65536)
ADAPTERS: tuple[tuple[Terms, int], ...] = tuple(
    (terms, r) for terms in ("full", "square") for r in (4, 16, 32, 64)
)
# What every card is shown with; the CSV has the rest.
HEADLINE: tuple[Terms, int] = ("full", 16)
SHOWN_TOKENS = 16384
TARGET = 1.05
# What is summed over the launches of a kernel.
SUMMED = ("issued_gflop", "mb", "barriers", "model_us")
# The columns of the CSV, and the heads of those that the page shows.
COLUMNS = {
    "card": "",
    "terms": "",
    "r": "",
    "T": "",
    "step": "step",
    "grid": "grid",
    "live_gflop": "GFLOP live",
    "issued_gflop": "issued",
    "mb": "MB",
    "floor_us": "floor, µs",
    "model_us": "model, µs",
    "resident": "CTAs per SM",
    "waves": "waves",
    "registers": "registers",
    "spills": "spilt, B",
    "shared": "shared, B",
    "tensor_core": "MMA",
    "barriers": "barriers",
    "note": "note",
}


def on(card: Card, terms: Terms, r: int, T: int, variant: str = "layer") -> Layer:
    return layer(card.arch, card.processors, job_of(terms, r, T, variant))


def not_kept(terms: Terms, r: int, T: int) -> float:
    """Megabytes of u ``(T, lanes)`` in bfloat16, which keep="x" does not keep."""
    return 2 * T * lane_count(r, terms) / 1e6


def launches() -> Iterator[tuple[Launch, Job, str]]:
    """Everything that the page is about, as often as it is launched."""
    for card, (terms, r), T in itertools.product(CARDS, ADAPTERS, TOKENS):
        for step in on(card, terms, r, T).steps:
            if step.launch is not None:
                yield step.launch, job_of(terms, r, T), card.arch


def described(card: Card, step: Step, facts: Facts) -> dict[str, Any]:
    """The columns of one step; those of the compiler only where it was this that it compiled."""
    row: dict[str, Any] = {
        "step": step.name.removesuffix("_kernel"),
        "live_gflop": f"{step.live / 1e9:.4g}",
        "issued_gflop": f"{step.issued / 1e9:.4g}",
        "mb": f"{step.moved / 1e6:.4g}",
        "floor_us": f"{card.floor(step.live, step.moved):.4g}",
        "model_us": f"{card.model(step):.4g}",
    }
    if step.launch is None:
        return {**row, "note": "PyTorch"}
    row["grid"] = "×".join(map(str, step.launch.grid))
    fact = fact_of(facts, card.arch, step.launch)
    if fact is None:
        return {**row, "note": "not what was compiled"}
    warps = step.launch.arguments.get("num_warps", 4)
    resident = card.resident(warps, fact.registers, fact.shared)
    known = {name: value for name, value in asdict(fact).items() if name in COLUMNS}
    row = {**row, **known, "resident": resident, "note": fact.problem}
    if resident:
        row["waves"] = f"{step.programs / (card.processors * resident):.3g}"
    return row


def csv_of(facts: Facts) -> str:
    """Every step of every case on every card."""
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    lines.writeheader()
    for card, (terms, r), T in itertools.product(CARDS, ADAPTERS, TOKENS):
        case = {"card": card.name, "terms": terms, "r": r, "T": T}
        for step in on(card, terms, r, T).steps:
            lines.writerow({**case, **described(card, step, facts)})
    return text.getvalue()


def measured() -> dict[tuple[str, str, int, int], float]:
    """Ratios to the frozen layer by card, terms, rank and tokens: the latest rows of a GPU."""
    case = {
        **{"contender": "auto", "phase": "both", "dtype": "bfloat16+float32", "status": "timed"},
        **{"n": FEATURES, "m": FEATURES, "dropout": 0.0},
    }
    found = {}
    for path in sorted((BENCHMARKS / "results").glob("gpu*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if all(row.get(name) == value for name, value in case.items()):
                for card in (card for card in CARDS if card.name in row["device"]):
                    name = (card.name, row["terms"], row["r"], row["T"])
                    found[name] = row["ratio_to_frozen"]
    return found


def cards() -> str:
    head = ("card", "products, TFLOP/s", "copies, TB/s", "multiprocessors", "rates are from")
    lines = [(c.name, f"{c.tflops:g}", f"{c.tbps:.1f}", c.processors, c.source) for c in CARDS]
    launch = f"A launch costs {LAUNCH_US} µs beside its work."
    return f"{table(head, lines, len(head))}\n\n{launch}"


def headline(card: Card) -> str:
    floors = ("floor", f"target, {TARGET} × floor", "floors of launches")
    models = ("model", 'model, keep="x"', "not kept then, MB")
    head = ("T", "frozen, µs", *floors, *models, "measured")
    known, lines = measured(), []
    for T in TOKENS:
        own = on(card, *HEADLINE, T)
        ratios = (own.floor(card), TARGET * own.floor(card), own.floor_of_steps(card))
        kept_x = on(card, *HEADLINE, T, "layer that keeps x").model(card)
        shown = [f"{ratio:.2f}" for ratio in (*ratios, own.model(card), kept_x)]
        shown.append(f"{not_kept(*HEADLINE, T):.3g}")
        ratio = known.get((card.name, *HEADLINE, T))
        last = "not measured" if ratio is None else f"{ratio:.2f}"
        lines.append([T, f"{own.frozen_model(card):.0f}", *shown, last])
    return table(head, lines, 0)


def adapters(card: Card) -> str:
    lines = []
    for terms, r in ADAPTERS:
        layers = [on(card, terms, r, T) for T in TOKENS]
        cells = [f"{own.model(card):.2f} ({own.floor(card):.2f})" for own in layers]
        lines.append([terms, r, *cells])
    return table(("terms", "r", *(f"T={T}" for T in TOKENS)), lines)


def steps(card: Card, facts: Facts) -> str:
    shown = {name: head for name, head in COLUMNS.items() if head}
    rows = [described(card, step, facts) for step in on(card, *HEADLINE, SHOWN_TOKENS).steps]
    return table([*shown.values()], [[row.get(name, "") for name in shown] for row in rows])


def of_card(card: Card, facts: Facts, version: str) -> str:
    """What the page says of one card."""
    terms, r = HEADLINE
    return "\n\n".join(
        (
            f'Ratios at r={r}, terms="{terms}":',
            headline(card),
            "Model (floor) of all adapters:",
            adapters(card),
            f'The steps of r={r}, terms="{terms}", T={SHOWN_TOKENS}; Triton {version}:',
            steps(card, facts),
        )
    )


def sentence() -> str:
    """What README.md says of the cost."""
    terms, r = HEADLINE
    ratios = {card: on(card, terms, r, SHOWN_TOKENS) for card in CARDS if card.arch == "sm_90"}
    said = " and ".join(f"{own.model(card):.2f} on {card.name}" for card, own in ratios.items())
    floors = sorted({f"{own.floor(card):.2f}" for card, own in ratios.items()})
    text = (
        "By a [model](benchmarks/roofline.md), not a measurement: if every launch of today ran at "
        f"the card's rates, forward + backward (r={r}, {FEATURES}→{FEATURES}, bfloat16, "
        f"{SHOWN_TOKENS} tokens) would cost {said} times the frozen layer's. The formula allows no "
        f"less than {' to '.join(floors)}."
    )
    return textwrap.fill(text, 106, break_on_hyphens=False)


def _totals(text: str, card: Card, T: int) -> dict[str, Counter[str]]:
    """By kernel, sums over the launches of one case of the headline, from rows as of the CSV."""
    terms, r = HEADLINE
    case = {"card": card.name, "terms": terms, "r": str(r), "T": str(T)}
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in csv.DictReader(io.StringIO(text)):
        if row | case == row:
            own = found["base product" if row["note"] == "PyTorch" else row["step"]]
            numbers = {name: float(row[name] or 0) for name in SUMMED}
            own.update({"launches": 1, **numbers})  # type: ignore[arg-type]
    return found


def _arrow(before: float, after: float) -> str:
    return " → ".join(dict.fromkeys(f"{number:.4g}" for number in (before, after)))


def changes(before: str, after: str) -> str:
    """Kernels of the headline before and after, and the ratios of the whole layer."""
    shown = [card for card in CARDS if card.arch == "sm_90"]
    totals = [[_totals(text, card, SHOWN_TOKENS) for text in (before, after)] for card in shown]
    lines = []
    for step in totals[0][1]:
        cells = [_arrow(*(own[step][name] for own in totals[0])) for name in ("launches", *SUMMED)]
        times = [_arrow(*(own[step]["model_us"] for own in both)) for both in totals[1:]]
        lines.append([step, *cells, *times])
    head = ("step", "launches", "GFLOP issued", "MB", "barriers", *(f"µs, {c.name}" for c in shown))
    tokens = sorted({int(row["T"]) for row in csv.DictReader(io.StringIO(before))})
    ratios = []
    for card in CARDS:
        cells = []
        for T in tokens:
            own, both = on(card, *HEADLINE, T), []
            for text in (before, after):
                microseconds = sum(sums["model_us"] for sums in _totals(text, card, T).values())
                both.append(f"{microseconds / own.frozen_model(card):.2f}")
            cells.append(f"{' → '.join(both)} ({own.floor_of_steps(card):.2f})")
        ratios.append([card.name, *cells])
    return "\n\n".join(
        (
            table(head, lines),
            f"All launches of a step at {SHOWN_TOKENS} tokens together. The whole layer, as a "
            "ratio to the frozen one (in brackets the floors of today's launches):",
            table(("card", *(f"T={T}" for T in tokens)), ratios),
        )
    )


def documents() -> dict[Path, str]:
    """What each file should read, by its path."""
    path = newest(COMPILED)
    facts, version = read(path), path.stem.removeprefix("triton-")
    parts = {"cards": cards}
    parts |= {card.name: partial(of_card, card, facts, version) for card in CARDS}
    grid = csv_of(facts)
    return {
        CHANGES: render(
            CHANGES.read_text(), {"changes": partial(changes, BEFORE.read_text(), grid)}, "README"
        ),
        PAGE: render(PAGE.read_text(), parts, PAGE.name),
        GRID: grid,
        README: render(README.read_text(), {"model": sentence}, README.name),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--compile", action="store_true", help="first compile what today's launches need")
    add("--jobs", type=int, default=1, help="compile in so many processes (1)")
    add("--check", action="store_true", help="change nothing, say what would")
    given = parser.parse_args(argv)
    if interpreting():
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not what is compiled")
    if given.compile:
        import triton

        path = COMPILED / f"triton-{triton.__version__}.jsonl"
        compile_missing(path, launches(), given.jobs)
    return write(documents(), "tools.roofline", check=given.check)


if __name__ == "__main__":
    sys.exit(main())
