"""The table, the plot and the JSON of one job; as a program, the table of an earlier one."""

import json
import math
import sys
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pera_kernels.cli.arguments import Parser
from tools import documents

COLUMNS = [
    "method",
    "rank",
    "parameters",
    "training",
    "held out",
    "equals LoRA",
    "share",
    "step ms",
    "peak MiB",
    "merged Δ",
]
Results = dict[str, Any]
Metrics = dict[str, Any]


def write_results(results: Results, path: Path) -> None:
    """Writes `results` in one piece: `path` is the old or the new file, never a part of one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite(results), indent=1) + "\n")
    partial.replace(path)


def finite(value: Any) -> Any:
    """`value` with every number that JSON has no word for (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table_rows(results: Results) -> list[list[str]]:
    """One row of texts per method, in the order of `COLUMNS`."""
    rows = []
    lora = [run["metrics"] for run in results["methods"] if run["metrics"]["terms"] == "linear"]
    for run in results["methods"]:
        metrics = run["metrics"]
        label = run["label"] if run["status"] == "finished" else f"{run['label']} ({run['status']})"
        memory = metrics.get("peak_memory_bytes")
        linear = metrics["terms"] == "linear"
        rows.append(
            [
                label,
                str(metrics["rank"]),
                f"{metrics['trainable_parameters']:,}",
                number(metrics.get("training_bits_per_byte"), ".4f"),
                number(metrics.get("held_out_bits_per_byte"), ".4f"),
                "" if linear else number(equal_rank(lora, metrics), ".1f"),
                "none" if linear else number(metrics.get("quadratic_share"), ".1%"),
                number(metrics.get("step_ms"), ".1f"),
                number(memory and memory / 2**20, ".0f"),
                number(metrics.get("merged_logit_difference"), ".1e"),
            ]
        )
    return rows


def equal_rank(lora: Sequence[Metrics], metrics: Metrics) -> float | None:
    """The rank at which LoRA has the same held-out loss, by straight lines between the ranks that
    were trained; None outside of them.
    """
    loss = "held_out_bits_per_byte"
    points = sorted((own["rank"], own[loss]) for own in lora if loss in own)
    return None if loss not in metrics else crossing(points, metrics[loss])


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where lines through the points (rank, loss) fall to the level; None if it is above the first
    or below all. A rank that is no better than a smaller one is left out.
    """
    kept = list(points[:1])
    for point in points[1:]:
        if point[1] < kept[-1][1]:
            kept.append(point)
    for (left, above), (right, below) in pairwise(kept):
        if below <= level <= above:
            return left + (above - level) / (above - below) * (right - left)
    return None


def number(value: float | None, form: str) -> str:
    """`value` in the given format, a dash for one that was never measured."""
    return "–" if value is None else format(value, form)


def notes(results: Results) -> list[str]:
    """What a reader of the table must know, one sentence or two per entry."""
    settings, base, where = results["settings"], results["base"], results["environment"]
    before = number(base["metrics"].get("held_out_bits_per_byte"), ".4f")
    finished = [run["metrics"] for run in results["methods"] if run["status"] == "finished"]
    changes = [
        abs(metrics["merged_held_out_bits_per_byte"] - metrics["held_out_bits_per_byte"])
        for metrics in finished
    ]
    change = number(max(changes, default=None), ".1e")
    on_cuda = where["device"] == "cuda"
    rule = "by the default rule" if settings["lr_h"] is None else f"{settings['lr_h']:g}"
    memory = "CUDA memory allocated" if on_cuda else "resident memory of the whole process so far"
    return [
        f"Losses in bits per byte. Base model before adaptation: {before} held out, "
        f"{base['metrics']['parameters']:,} frozen parameters.",
        f"{settings['steps']} steps of {settings['batch']} windows, lr {settings['lr']:g}, lr of h "
        f"{rule}, seed {settings['seed']}: one seed, so read small differences as noise.",
        "Equals LoRA: the rank at which straight lines between the LoRAs' held-out losses reach "
        "this one, without a LoRA that is no better than a smaller one; a dash where none does.",
        "Share: mean of ‖ΔW_quad‖/‖BA‖ over the adapted layers. Step: median. "
        f"Peak: {memory}. Merged Δ: the largest difference that merge() makes to a logit, relative "
        f"to the largest logit; to the held-out bits per byte, at most {change}.",
        f"{where['device_name']}, CPU threads: {where['cpu_threads']}, Python {where['python']}, "
        f"torch {where['torch']}, triton {where['triton']}, pera_kernels {where['pera_kernels']}, "
        f"commit {where['commit']}.",
    ]


def rich_table(results: Results) -> Table:
    """The table for a terminal."""
    table = Table(title=f"Adaptation to English documentation ({results['status']})")
    for column in COLUMNS:
        is_name = column == "method"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in table_rows(results):
        table.add_row(*row)
    return table


def markdown_table(results: Results) -> str:
    """The table and its notes as GitHub markdown."""
    table = documents.table(COLUMNS, table_rows(results))
    return "\n".join([table, "", *(f"- {note}" for note in notes(results))])


def print_report(results: Results) -> None:
    """Prints the table and its notes."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(rich_table(results))
    for note in notes(results):
        console.print(note, highlight=False)


def plot_losses(results: Results, path: Path) -> None:
    """Training curves (moving average) and, beside them, held-out points past the first third."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (training, held_out) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    window = max(1, results["settings"]["steps"] // 20)
    runs = results["methods"] or [results["base"]]
    # Curves may lie on each other: different dashes let the lower ones show.
    for run, dashes in zip(runs, cycle(["-", "--", "-.", ":"]), strict=False):
        style = {"linestyle": dashes, "label": run["label"]}
        smoothed = moving_average(run["loss"], window)
        training.plot(range(window, window + len(smoothed)), smoothed, **style)
        late = [point for point in run["held_out"] if 3 * point[0] >= len(run["loss"])]
        held_out.plot([step for step, _ in late], [bits for _, bits in late], marker="o", **style)
    training.set_title(f"Training, moving average of {window}")
    held_out.set_title("Held out, after the first third")
    for axes in (training, held_out):
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.3)
    figure.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def moving_average(values: list[float], window: int) -> list[float]:
    """Means of every `window` values in a row."""
    ends = range(window, len(values) + 1)
    return [sum(values[end - window : end]) / window for end in ends]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tools.finetune.report",
        description="Print the table of an earlier job from its results.json.",
    )
    parser.add_argument("results", type=Path, help="a results.json that the job wrote")
    parser.add_argument("--markdown", action="store_true", help="print a GitHub-markdown table")
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        if options.markdown:
            print(markdown_table(results))
        else:
            print_report(results)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {options.results}: {error}")
    except (AttributeError, KeyError, TypeError) as error:
        parser.error(f"{options.results} is no result of tools.finetune: {error!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
