"""`python -m tools.ablation`: run what has no row yet, then write the tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pera_kernels.cli.arguments import Parser
from tools import rows
from tools.ablation import rates, report, timing
from tools.ablation.runs import CHOICE_SEED, Row, remaining, train
from tools.ablation.task import Task
from tools.ablation.topics import Topics
from tools.ablation.verses import Verses
from tools.finetune.__main__ import whole_number

TASKS: dict[str, Callable[[Path], Task]] = {"topics": Topics, "verses": Verses}
EXAMPLES = """
examples:
  python -m tools.ablation --task topics               # about two hours on one CPU core
  python -m tools.ablation --task verses --ranks 16    # in a second terminal
  python -m tools.ablation --rates                     # rules for the learning rate of h
  python -m tools.ablation --report                    # tables and plots of the rows there are
  python -m tools.ablation --steps 5 --seeds 2 --out quick
"""


def seeds(text: str) -> int:
    """A number of seeds that the intervals have a quantile for."""
    count = whole_number(2)(text)
    if count > 10:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 10")
    return count


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m tools.ablation",
        description="Compare LoRA and PERA's terms on two tasks. Learning rates are chosen for\n"
        "each method by the validation loss of one seed; other seeds give the results. Every run\n"
        "is a line of a file: what has a line is not run again, so an interrupted command goes\n"
        "on where it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), action="append", help="one of them (default: both)")
    ranks = "ranks to compare at (default: 16 4)"
    add("--ranks", type=whole_number(1), nargs="+", default=[16, 4], metavar="R", help=ranks)
    add("--seeds", type=seeds, default=5, help="runs of each method, 2 to 10 (default: 5)")
    add("--steps", type=whole_number(1), help="steps of a run (default: the task's)")
    add("--threads", type=whole_number(1), default=1, help="CPU threads (default: 1)")
    add("--out", type=Path, default=report.RESULTS, help="folder of the rows and plots")
    kind = parser.add_mutually_exclusive_group().add_argument
    kind("--report", action="store_true", help="run nothing, draw what there is")
    kind("--rates", action="store_true", help="try rules for the learning rate of h")
    kind("--time", action="store_true", help="time a step of each method, on an idle computer")
    return parser


def read_all(folder: Path) -> list[Row]:
    """The rows of all tasks."""
    return [row for name in TASKS for row in rows.read(folder / f"{name}.jsonl")]


def compare(task: Task, ranks: Sequence[int], seeds: int, steps: int | None, out: Path) -> None:
    """Run what the task's file has no row of.

    Raises:
        RowsError: its rows are of another number of steps.
    """
    file, steps = out / f"{task.name}.jsonl", steps or task.steps
    if others := {row["steps"] for row in rows.read(file)} - {steps}:
        raise rows.RowsError(f"{file} has runs of {others.pop()} steps, these have {steps}")
    while trial := next(remaining(task, rows.read(file), ranks, seeds), None):
        rows.append(file, train(task, trial, steps))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 where a task's packages are missing, 2 for bad options, 130 after an
    interrupt.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    out: Path = options.out
    own = ("task", "ranks", "seeds", "steps")
    if options.rates and any(getattr(options, n) != parser.get_default(n) for n in own):
        parser.error(
            "argument --rates: its settings are fixed: no --task, --ranks, --seeds, --steps"
        )
    try:
        torch.set_num_threads(options.threads)
        if options.rates:
            rates.measure(out)
        elif not options.report:
            for name in options.task or TASKS:
                task = TASKS[name](out / "cache")
                if max(options.ranks) >= task.width:
                    parser.error(f"argument --ranks: layers of {name} are {task.width} wide")
                if options.time:
                    timing.measure(task, options.ranks, out / "times.jsonl")
                else:
                    compare(task, options.ranks, options.seeds, options.steps, out)
        if any(row["seed"] != CHOICE_SEED for row in read_all(out)):
            report.write(out)
        elif options.report:
            parser.error(f"argument --out: {out} has no results yet")
    except ImportError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except (OSError, rows.RowsError) as error:
        parser.error(f"argument --out: {error}")
    except KeyboardInterrupt:
        print(f"\nInterrupted: {out} has what was run; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
