"""Measure how much closer to a matrix PERA comes than LoRA of its rank, or write what was found.

python -m tools.capacity            what benchmarks/results/capacity/rows.jsonl lacks: all of it
                                    takes about 40 minutes of one core, and can be interrupted
python -m tools.capacity --report   docs/capacity.md and its plots, from the rows
python -m tools.capacity --check    exit status 1 if the page would change
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pera_kernels.cli.arguments import Parser
from pera_kernels.cli.tables import progress
from pera_kernels.terms import Terms

from .. import rows
from ..documents import write
from . import report
from .fit import Problem, fit

TERMS: tuple[Terms, ...] = ("full", "square", "cross")


def problems() -> Iterator[Problem]:
    """The grid, parts of it with twice the steps, and matrices that a formula is tried on."""
    grid = product((64, 128, 256, 512), (4, 8, 16, 32), report.SPECTRA, TERMS)
    for n, r, spectrum, terms in grid:
        if 8 * r > n:
            continue
        starts = (0.1, 0.5, math.inf) if n <= 128 else (0.1, 0.5) if n <= 256 else (0.1,)
        main = Problem(n, n, r, spectrum, terms, 3 if n <= 256 else 2 if r <= 16 else 1, starts)
        yield main
        if r in (8, 16) and (n <= 256 and terms != "cross" or terms == "full"):
            yield replace(main, seeds=2 if n <= 256 else 1, steps=2 * main.steps)
    other = [(256, 256, "exponential"), (256, 256, "spiked"), (384, 384, "0.45")]
    other += [(128, 512, "0.25"), (512, 128, "0.5"), (64, 256, "0.5"), (256, 512, "0.25")]
    for (m, n, spectrum), r, terms in product(other, (8, 16), TERMS[:2]):
        if 8 * r <= min(m, n):
            yield Problem(m, n, r, spectrum, terms, 2)
    for spectrum in ("gaussian", "0.25", "0.5"):
        yield Problem(1024, 1024, 16, spectrum, "full", 1, (0.1,))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*report.CELL, "steps"))


def measure(wanted: Sequence[Problem], path: Path) -> None:
    """Append the rows of every problem that the file has none of."""
    done = {key(row) for row in rows.read(path)}
    missing = [problem for problem in wanted if key(vars(problem)) not in done]
    for problem in progress(missing, "fits"):
        rows.append(path, *({**row, "torch": torch.__version__} for row in fit(problem)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tools.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind = parser.add_mutually_exclusive_group().add_argument
    kind("--out", type=Path, default=report.ROWS, metavar="FILE", help="where rows are appended")
    kind("--report", action="store_true", help="write the page and the plots")
    kind("--check", action="store_true", help="say if the page is out of date")
    given = parser.parse_args(arguments)
    try:
        if given.report or given.check:
            if not given.check:
                report.draw()
            return write(report.documents(), "tools.capacity --report", check=given.check)
        measure(list(problems()), given.out)
    except (OSError, rows.RowsError) as error:
        parser.error(f"argument --out: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
