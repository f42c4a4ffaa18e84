"""`python -m tools.ablation`: run what has no row yet, then write the tables and plots."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.ablation import report
from tools.ablation.runs import Row, remaining, train
from tools.ablation.task import Task
from tools.ablation.topics import Topics
from tools.ablation.verses import Verses
from tools.finetune.__main__ import OneLineParser, whole_number

TASKS: dict[str, Callable[[Path], Task]] = {"topics": Topics, "verses": Verses}
EXAMPLES = """
examples:
  python -m tools.ablation --task topics               # about two hours on one CPU core
  python -m tools.ablation --task verses --ranks 16    # in a second terminal
  python -m tools.ablation --report                    # tables and plots of the rows there are
  python -m tools.ablation --steps 5 --seeds 2 --out quick
"""


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m tools.ablation",
        description="Compare LoRA and PERA's terms on two tasks. Learning rates are chosen for each\n"
        "method by the validation loss of one seed; other seeds give the results. Every run is\n"
        "a line of a file: what has a line is not run again, so an interrupted command goes on\n"
        "where it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), action="append", help="one of them (default: both)")
    ranks = "ranks to compare at (default: 16 4)"
    add("--ranks", type=whole_number(1), nargs="+", default=[16, 4], metavar="R", help=ranks)
    add("--seeds", type=whole_number(2), default=5, help="runs of each method (default: 5)")
    add("--steps", type=whole_number(1), help="steps of a run (default: the task's)")
    add("--threads", type=whole_number(1), default=1, help="CPU threads (default: 1)")
    add("--out", type=Path, default=report.RESULTS, help="folder of the rows, tables and plots")
    add("--report", action="store_true", help="run nothing")
    return parser


def read(folder: Path) -> list[Row]:
    """The rows of all tasks."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.open())
    return [json.loads(line) for line in lines]


def append(path: Path, row: Row) -> None:
    """Add a row, floats with five digits."""
    with path.open("a") as lines:
        lines.write(json.dumps(rounded(row)) + "\n")


def rounded(value: Any) -> Any:
    """Floats with five digits, and none where a run diverged."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 where a task's packages are missing, 2 for bad options, 130 after an
    interrupt.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not options.report:
            torch.set_num_threads(options.threads)
            for name in options.task or TASKS:
                task = TASKS[name](out / "cache")
                steps = options.steps or task.steps
                while trial := next(remaining(task, read(out), options.ranks, options.seeds), None):
                    append(out / f"{name}.jsonl", train(task, trial, steps))
        if not (rows := read(out)):
            parser.error(f"argument --report: {out} has no rows yet")
        report.write(rows, out)
    except ImportError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    except KeyboardInterrupt:
        print(f"\nInterrupted: {out} has what was run; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
