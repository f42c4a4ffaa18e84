"""Tables and plots of the ablation, from its rows; the parts of docs/ablation.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from pera_kernels.cli import worth as capacity
from tools import documents, rows
from tools.ablation import plots
from tools.ablation.runs import CHOICE_SEED, FULL, LABELS
from tools.finetune.report import crossing

__all__ = ["RESULTS", "difference", "pages", "results", "worth", "write"]

RESULTS = documents.ROOT / "benchmarks" / "results" / "ablation"
PAGE, README = documents.ROOT / "docs" / "ablation.md", documents.ROOT / "README.md"
TASKS = ("topics", "verses")
PERA = ("full", "full_default", "square", "cross")
# 97.5 % quantiles of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def results(folder: Path, task: str) -> pd.DataFrame:
    """The runs that count, a line each: those at the rates that were chosen, on another seed.

    Where more rates were tried later, the last choice counts.
    """
    frame = pd.DataFrame(rows.read(folder / f"{task}.jsonl"))
    if not len(frame):
        return frame
    frame = frame[frame["seed"] != CHOICE_SEED]
    last = frame.groupby(["method", "r"])[["lr", "multiple"]].transform("last")
    return frame[(frame["lr"] == last["lr"]) & (frame["multiple"] == last["multiple"])]


def mean(values: pd.Series, digits: int = 4) -> str:
    """Mean ± standard error; a dash where a run has none."""
    if values.isna().any():
        return "diverged"
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.sem():.{digits}f}"


def difference(runs: pd.DataFrame, method: str, r: int, loss: str) -> tuple[float, float]:
    """The mean of LoRA's loss less the method's, seed by seed at one rank, and the half width of
    its 95 % interval (Student's t), over seeds that both have; NaN where one of the runs diverged.
    """
    by_method = runs[runs["r"] == r].set_index(["method", "seed"])[loss]
    lora, own = by_method["lora"], by_method[method]
    seeds = lora.index.intersection(own.index)
    gains = lora[seeds] - own[seeds]
    half = STUDENT[len(gains) - 2] * gains.sem() if len(gains) > 1 else math.nan
    return float(gains.mean(skipna=False)), float(half)


def shown(gain: float, half: float) -> str:
    """A difference with its interval."""
    return "diverged" if math.isnan(gain) else f"{gain:+.4f} ± {half:.4f}"


def worth(runs: pd.DataFrame, method: str, r: int, loss: str) -> tuple[float | None, ...]:
    """How many more ranks of LoRA gain as much, and as much as the ends of the gain's interval: by
    straight lines through 0 at rank r and the LoRAs of at most 2r whose gain is above its own
    interval. None below 0 or without such a LoRA; infinite beyond the largest.
    """
    lines = [(float(r), 0.0)]
    lora = runs[(runs["r"] == r) & runs["method"].str.startswith("lora_") & (runs["rank"] <= 2 * r)]
    for key, own in sorted(lora.groupby("method"), key=lambda part: part[1]["rank"].iloc[0]):
        gain, half = difference(runs, key, r, loss)
        if gain > half:
            lines.append((float(own["rank"].iloc[0]), -gain))
    gain, half = difference(runs, method, r, loss)
    beyond = math.inf if len(lines) > 1 else None

    def ranks(reached: float) -> float | None:
        if reached > -min(loss for _, loss in lines):
            return beyond
        found = crossing(lines, -reached)
        return None if found is None else found - r

    return ranks(gain), ranks(gain - half), ranks(gain + half)


def table(folder: Path, task: str) -> str:
    """One line for each method and rank."""
    runs = results(folder, task)
    if not len(runs):
        return "Not run yet."
    times = step_times(folder, task)
    head = ["method", "rank", "parameters", "lr, h", "seeds", "training", "test"]
    head += ["better than LoRA r, test", "training", "share", "step, ms"]
    lines = []
    for r, key in itertools.product(sorted(runs["r"].unique()), LABELS):
        own = runs[(runs["method"] == key) & (runs["r"] == r)]
        if not len(own):
            continue
        first = own.iloc[0]
        share = own["shares"].map(lambda shares: shares[-1] if shares else math.nan).mean()
        gains = ["", ""]
        if key not in ("lora", FULL.key):
            gains = [shown(*difference(runs, key, r, loss)) for loss in ("test", "training")]
        lines.append(
            [
                LABELS[key],
                first["rank"] or "all",
                f"{first['parameters']:,}",
                f"{first['lr']:g}" + (f", {first['multiple']:g} ×" if key in PERA else ""),
                len(own),
                mean(own["training"]),
                mean(own["test"]),
                *gains,
                "" if math.isnan(share) else f"{share:.0%}",
                f"{times[key, r]:.0f}" if (key, r) in times else "",
            ]
        )
    return documents.table(head, lines)


def worths(folder: Path) -> str:
    """What the products are worth in LoRA ranks."""
    lines = []
    for task in TASKS:
        runs = results(folder, task)
        for r in sorted(runs["r"].unique()) if len(runs) else []:
            for key in PERA:
                own = runs[(runs["r"] == r) & (runs["method"] == key)]
                if not len(own):
                    continue
                found = [in_ranks(*worth(runs, key, r, loss)) for loss in ("training", "test")]
                lines.append([task, LABELS[key], r, *found, predicted(runs, key, r)])
    head = ["task", "method", "r", "by training loss", "by test loss", "by the spectrum"]
    return documents.table(head, lines, 2)


def in_ranks(ranks: float | None, least: float | None, most: float | None) -> str:
    """A worth with its interval, which begins at nothing and may have no end."""
    if ranks is None:
        return "–"
    told = (
        "more" if value == math.inf else f"{value or 0.0:.1f}" for value in (ranks, least, most)
    )
    return "{} ({} to {})".format(*told)


def predicted(runs: pd.DataFrame, method: str, r: int) -> str:
    """What docs/capacity.md's formula makes of full fine-tuning's update: the layers' median."""
    full = runs[runs["method"] == FULL.key]
    if not len(full):
        return ""
    run, terms = full.iloc[0], method.removesuffix("_default")
    layers = zip(run["spectra"], run["shapes"], strict=True)
    ranks = median(
        capacity.worth(sigma, int(r), terms, tuple(shape))  # type: ignore[arg-type]
        for sigma, shape in layers
    )
    return f"{ranks:.1f}"


def rates(folder: Path) -> str:
    """Validation loss and final share for each rule of h's rate, a column for each setting."""
    frame = pd.DataFrame(rows.read(folder / "rates.jsonl"))
    if not len(frame):
        return "Not run yet."
    settings = list(dict.fromkeys(frame["setting"]))
    lines = []
    for rule in dict.fromkeys(frame["rule"]):
        cells: list[Any] = [rule]
        for setting in settings:
            own = frame[(frame["rule"] == rule) & (frame["setting"] == setting)]
            if not len(own):
                cells.append("")
                continue
            run = own.iloc[0]
            share = f" ({run['shares'][-1]:.1%})" if run["shares"] else ""
            lowest = frame[frame["setting"] == setting]["validation"].min()
            loss = f"{run['validation']:.4f}" if run["validation"] is not None else "diverged"
            cells.append((f"**{loss}**" if run["validation"] == lowest else loss) + share)
        lines.append(cells)
    grown = frame[frame["rule"] == "default"].set_index("setting")["B_in_lr"]
    cells = [f"{grown[setting]:.1f}" if setting in grown else "" for setting in settings]
    return documents.table(["rule", *settings], [*lines, ["rms(B) / lr, default", *cells]])


def summary(folder: Path) -> str:
    """README's table: full PERA against LoRA, and LoRA with half as many ranks more."""
    lines = []
    for task in TASKS:
        runs = results(folder, task)
        times = step_times(folder, task)
        for r, key in itertools.product(
            sorted(runs["r"].unique()) if len(runs) else [],
            ("full", "full_default", "lora_half_more"),
        ):
            own = runs[(runs["r"] == r) & (runs["method"] == key)]
            base = runs[(runs["r"] == r) & (runs["method"] == "lora")]
            if not len(own):
                continue
            more = own["parameters"].iloc[0] / base["parameters"].iloc[0] - 1
            timed = (key, r) in times and ("lora", r) in times
            time = times[key, r] / times["lora", r] if timed else None
            lines.append(
                [
                    f"{task}, r = {r}",
                    LABELS[key],
                    shown(*difference(runs, key, r, "test")),
                    f"{more:+.1%}",
                    "" if time is None else f"{time:.2f} ×",
                ]
            )
    head = ["task", "method", "loss below LoRA's, test", "parameters", "step, CPU"]
    return documents.table(head, lines, 2) if lines else "Not run yet."


def step_times(folder: Path, task: str) -> dict[tuple[str, int], float]:
    """Milliseconds of a step by method and rank; the last measurement counts."""
    found = [row for row in rows.read(folder / "times.jsonl") if row["task"] == task]
    times = {(row["method"], row["r"]): row["step_ms"] for row in found}
    return {**times, **{("full_default", r): ms for (key, r), ms in times.items() if key == "full"}}


def parts(folder: Path) -> dict[str, Callable[[], str]]:
    tables = {task: partial(table, folder, task) for task in TASKS}
    return {**tables, "worth": partial(worths, folder), "rates": partial(rates, folder)}


def pages(folder: Path) -> dict[Path, str]:
    """docs/ablation.md and README.md with their tables made again."""
    readme = {"ablation": partial(summary, folder)}
    return {
        PAGE: documents.render(PAGE.read_text(), parts(folder), PAGE.name),
        README: documents.render(README.read_text(), readme, README.name),
    }


def write(folder: Path) -> None:
    """Draw the plots and print the tables; those of the committed rows go into the page."""
    for task in TASKS:
        plots.draw(results(folder, task), folder, task)
    if folder.resolve() == RESULTS:
        documents.write(pages(folder), "tools.ablation --report", check=False)
    else:
        print("\n\n".join(make() for make in parts(folder).values()))
