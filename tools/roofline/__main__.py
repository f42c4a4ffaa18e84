"""Write benchmarks/roofline.md and its CSV, and what README.md says of the cost.

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
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pera_kernels.kernels import interpreting
from pera_kernels.kernels.launch import Launch
from pera_kernels.terms import Terms

from ..problems import Job
from .facts import Facts, compile_missing, fact_of, newest, read
from .model import CARDS, FEATURES, LAUNCH_US, Card, Layer, Step, job_of, layer

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
COMPILED = BENCHMARKS / "compiled"
PAGE, GRID, README = BENCHMARKS / "roofline.md", BENCHMARKS / "roofline.csv", ROOT / "README.md"

TOKENS = (1, 16, 64, 512, 4096, 16384, 65536)
ADAPTERS: tuple[tuple[Terms, int], ...] = tuple(
    (terms, r) for terms in ("full", "square") for r in (4, 16, 32, 64)
)
# What every card is shown with; the CSV has the rest.
HEADLINE: tuple[Terms, int] = ("full", 16)
SHOWN_TOKENS = 16384
TARGET = 1.05
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


def on(card: Card, terms: Terms, r: int, T: int) -> Layer:
    return layer(card.arch, card.processors, job_of(terms, r, T))


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


def table(head: Sequence[str], lines: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, rule, *lines))


def cards() -> str:
    head = ("card", "products, TFLOP/s", "copies, TB/s", "multiprocessors", "rates are from")
    lines = [(c.name, f"{c.tflops:g}", f"{c.tbps:.1f}", c.processors, c.source) for c in CARDS]
    launch = f"A launch costs {LAUNCH_US} µs beside its work."
    return f"{table(head, lines, len(head))}\n\n{launch}"


def headline(card: Card) -> str:
    head = ("T", "frozen, µs", "floor", f"target, {TARGET} × floor", "floors of launches", "model")
    known, lines = measured(), []
    for T in TOKENS:
        own = on(card, *HEADLINE, T)
        ratios = (own.floor(card), TARGET * own.floor(card), own.floor_of_steps(card))
        shown = [f"{ratio:.2f}" for ratio in (*ratios, own.model(card))]
        ratio = known.get((card.name, *HEADLINE, T))
        last = "not measured" if ratio is None else f"{ratio:.2f}"
        lines.append([T, f"{own.frozen_model(card):.0f}", *shown, last])
    return table((*head, "measured"), lines, 0)


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


def render(path: Path, parts: Mapping[str, Callable[[], str]]) -> str:
    """The document with its generated parts made again."""
    text = path.read_text()
    for name, generate in parts.items():
        pattern = re.compile(rf"(<!-- {name}: generated -->\n).*?(\n<!-- end -->)", re.DOTALL)
        before, *found = pattern.split(text)
        if len(found) != 3:
            raise ValueError(f"{path.name} must have exactly one part marked {name!r}")
        text = "".join((before, found[0], generate(), *found[1:]))
    return text


def documents() -> dict[Path, str]:
    """What each file should read, by its path."""
    path = newest(COMPILED)
    facts, version = read(path), path.stem.removeprefix("triton-")
    parts = {"cards": cards}
    parts |= {card.name: partial(of_card, card, facts, version) for card in CARDS}
    return {
        PAGE: render(PAGE, parts),
        GRID: csv_of(facts),
        README: render(README, {"model": sentence}),
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
    changed = {
        path: text
        for path, text in documents().items()
        if not path.exists() or path.read_text() != text
    }
    for path, text in changed.items():
        if given.check:
            print(f"{path.relative_to(ROOT)} is not of today's launches: run tools.roofline")
        else:
            path.write_text(text)
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
