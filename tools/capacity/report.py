"""docs/capacity.md and its plots, from the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from pera_kernels.cli.worth import FITTED, numbers, worth
from pera_kernels.terms import Terms, coefficient_count

from ..documents import GREY, ROOT, drawing, render, table
from ..rows import read
from .fit import spectrum

FOLDER = ROOT / "benchmarks" / "results" / "capacity"
ROWS = FOLDER / "rows.jsonl"
PAGE = ROOT / "docs" / "capacity.md"
SPECTRA = ("0", "0.25", "0.5", "0.75", "1", "gaussian")
# The terms that have panels of plots and all other tables.
PANELS: tuple[Terms, ...] = ("full", "square")
CELL = ["terms", "m", "n", "r", "spectrum"]
# The size that the plot and the table of coefficients show.
SHOWN = 256
# A worth that is less is not worth a formula.
LEAST = 0.02


def load(path: Path = ROWS) -> pd.DataFrame:
    """Every row; "again" are those with twice the steps of others of their cell."""
    rows = pd.DataFrame(read(path))
    rows["again"] = rows.steps > rows.groupby(CELL).steps.transform("min")
    return rows


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over targets, what the formula is of and what it says; "grid"
    are the cells that it was made from.
    """
    found = rows[~rows.again].groupby(CELL, sort=False)
    frame = found.worth.agg(["mean", "std"]).join(found[["share"]].mean()).reset_index()
    spectra = [spectrum(own.spectrum, min(own.m, own.n)) for own in frame.itertuples()]
    both = list(zip(spectra, frame.itertuples(), strict=True))
    frame["numbers"] = [numbers(sigma, own.r, (own.m * own.n) ** 0.5) for sigma, own in both]
    frame["said"] = [worth(sigma, own.r, own.terms, (own.m, own.n)) for sigma, own in both]
    frame["grid"] = (frame.m == frame.n) & (frame.n <= 512) & frame.spectrum.isin(SPECTRA)
    return frame


def label(name: str) -> str:
    return name if name.isalpha() else "flat" if name == "0" else f"k^−{name}"


def measured(mean: float, deviation: float) -> str:
    """Of one target there is no deviation."""
    shown = f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"
    return "< 0.05" if mean < 0.05 else shown


def worths(frame: pd.DataFrame, terms: Terms) -> str:
    """Worth by size and rank, down, and spectrum, across."""
    lines = []
    for (n, r), own in frame[frame.grid & (frame.terms == terms)].groupby(["n", "r"]):
        by = own.set_index("spectrum")
        shown = [measured(by["mean"][name], by["std"][name]) for name in SPECTRA]
        lines.append([n, r, *shown, f"{coefficient_count(r, terms) / (2 * n):.3f}"])
    return table(("n", "r", *map(label, SPECTRA), "parameters of h"), lines, 0)


def converged(rows: pd.DataFrame) -> str:
    """What twice the steps change, and what a random start does instead, by spectrum."""
    both = rows[~rows.again].merge(rows[rows.again], on=[*CELL, "seed"], suffixes=("", "_again"))
    both["change"] = both.worth_again - both.worth
    started = rows[~rows.again & (rows.worths.map(len) == 3)].copy()
    started["random"] = [own[2] - max(own[:2]) for own in started.worths]
    lines = []
    for name in SPECTRA:
        own, random = both[both.spectrum == name], started[started.spectrum == name].random
        changed = (own.change.mean(), own.change.abs().max())
        relative = (own.change.sum() / own.worth.sum(), random.mean())
        shown = zip((*changed, *relative), ("+.2f", ".2f", "+.1%", "+.2f"), strict=True)
        lines.append([label(name), len(own), *(format(*pair) for pair in shown)])
    head = ("singular values", "fits", "twice the steps: mean", "largest", "of the worth")
    return table((*head, "a random start instead"), lines)


def coefficients(rows: pd.DataFrame) -> str:
    """At the best fit: the quadratic share by rank, and |h| in two units."""
    lines = []
    chosen = rows[~rows.again & (rows.m == SHOWN) & (rows.n == SHOWN)]
    for terms in PANELS:
        for name in SPECTRA:
            own = chosen[(chosen.terms == terms) & (chosen.spectrum == name)]
            units = []
            for unit in ("h_layer", "h_pair"):
                high_ranks = own[own.r >= 16][unit].tolist()
                low, middle, high = np.exp(np.log(np.array(high_ranks)).mean(0))
                units.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            by_rank = own.groupby("r").share.mean()
            lines.append([terms, label(name), *(f"{share:.2f}" for share in by_rank), *units])
    ranks = [f"share, r={r}" for r in (4, 8, 16, 32)]
    units = ["\\|h\\| in a unit for the layer", "in a unit for the pair"]
    return table(("terms", "singular values", *ranks, *units), lines, 2)


def fitted(frame: pd.DataFrame) -> np.ndarray:
    """The weights of the formula for these cells."""
    wanted = np.log(frame["mean"] / frame.r)
    return np.linalg.lstsq(np.array(frame.numbers.tolist()), wanted, rcond=None)[0]


def chosen(frame: pd.DataFrame, terms: Terms) -> pd.DataFrame:
    """The cells that the formula of these terms is made from."""
    return frame[frame.grid & (frame.terms == terms) & (frame["mean"] >= LEAST)]


def off(errors: Sequence[float]) -> str:
    """By which factor a formula is off whose logarithms have these errors."""
    return f"{math.exp(float(np.sqrt(np.mean(np.square(errors))))):.2f}"


def left_out(frame: pd.DataFrame, by: list[str]) -> str:
    """The same where what is predicted had no part in the fit: all cells of a kind in turn."""
    errors: list[float] = []
    for _, own in frame.groupby(by):
        weights = fitted(frame.drop(own.index))
        for cell in own.itertuples():
            found = cell.r * math.exp(weights @ cell.numbers)
            bound = coefficient_count(cell.r, cell.terms)
            errors.append(math.log(min(found, bound) / own["mean"][cell.Index]))
    return off(errors)


def formula(frame: pd.DataFrame) -> str:
    """How far the formula is off: in its own cells, and where it had to guess."""
    lines = []
    for terms in FITTED:
        own, all_of = chosen(frame, terms), frame[frame.terms == terms]
        other = all_of[~all_of.grid & (all_of["mean"] >= LEAST)]
        errors = [np.log(found.said / found["mean"]) for found in (own, other)]
        left = [left_out(own, by) for by in (["n", "r", "spectrum"], ["spectrum"], ["n"], ["r"])]
        little = all_of[all_of["mean"] < LEAST].said.max()
        others = off(errors[1]) if len(other) else ""
        lines.append([terms, len(own), off(errors[0]), *left, others, f"{little:.2f}"])
    kinds = ("a cell", "a spectrum", "an n", "an r")
    head = ("terms", "cells", "off by a factor of", *(f"without {kind}" for kind in kinds))
    return table((*head, "other matrices", f"at most said where it is below {LEAST}"), lines)


def others(frame: pd.DataFrame) -> str:
    """Matrices that the formula was not made from, measured and by the formula."""
    lines = []
    for cell, own in frame[~frame.grid].groupby(["spectrum", "m", "n", "r"], sort=False):
        by, (name, m, n, r) = own.set_index("terms"), cell
        shown = [
            f"{by[column][terms]:.2f}" if terms in by.index else ""
            for terms in PANELS
            for column in ("mean", "said")
        ]
        lines.append([label(name), f"{m} × {n}", r, *shown])
    head = ("singular values", "M × N", "r", "full", "by the formula", "square", "by the formula")
    return table(head, lines, 2)


def weights(frame: pd.DataFrame) -> str:
    """The weights, as `pera_kernels/cli/worth.py` must have them."""
    lines = []
    for terms in FITTED:
        lines.append([terms, *(f"{weight:.2f}" for weight in fitted(chosen(frame, terms)))])
    return table(("terms", "1", "log strong", "log(1 + e^−2 / strong)", "log near"), lines)


def plot(frame: pd.DataFrame, path: Path, panel: Callable[..., None], unit: str) -> None:
    """A panel for all products and one for squares, a colour for each spectrum."""
    with drawing(path, ncols=2, figsize=(10, 4.5), sharey=True) as axes:
        for axis, terms in zip(axes[0], PANELS, strict=True):
            axis.set(xscale="log", yscale="log", title=terms)
            axis.grid(alpha=0.2)
            panel(axis, frame[frame.terms == terms], terms)
        axes[0, 0].set_ylabel(unit)
        names = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*names, loc="outside right upper", frameon=False)


def worth_by_rank(axis: Any, own: pd.DataFrame, terms: Terms) -> None:
    """Lines with the deviation between targets."""
    own, ranks = own[own.grid & (own.n == SHOWN)], [4, 8, 16, 32]
    for number, name in enumerate(SPECTRA):
        line = own[own.spectrum == name]
        style = {"marker": "o", "ms": 4, "capsize": 3, "color": f"C{number}"}
        axis.errorbar(line.r, line["mean"], line["std"], label=label(name), **style)
    cost = [coefficient_count(r, terms) / (2 * SHOWN) for r in ranks]
    axis.plot(ranks, cost, "--", color=GREY, label="parameters of h")
    axis.set(xlabel="rank", ylim=(1e-3, 300))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, ranks)


def measured_by_formula(axis: Any, own: pd.DataFrame, terms: Terms) -> None:
    """A dot for each cell."""
    own = own[own["mean"] >= LEAST]
    for number, name in enumerate(SPECTRA):
        dots = own[own.grid & (own.spectrum == name)]
        axis.plot(dots.said, dots["mean"], "o", ms=4, color=f"C{number}", label=label(name))
    rest = own[~own.grid]
    axis.plot(rest.said, rest["mean"], "x", ms=6, color=GREY, label="other matrices")
    axis.plot([LEAST, 150], [LEAST, 150], color=GREY, lw=0.8)
    axis.set(xlabel="worth by the formula, ranks")


def documents() -> dict[Path, str]:
    """The page with its generated parts as the rows have them."""
    rows = load()
    frame = cells(rows)
    parts = {
        **{f"worth, {terms}": partial(worths, frame, terms) for terms in FITTED},
        "converged": partial(converged, rows),
        "coefficients": partial(coefficients, rows),
        "formula": partial(formula, frame),
        "others": partial(others, frame),
        "weights": partial(weights, frame),
    }
    return {PAGE: render(PAGE.read_text(), parts, PAGE.name)}


def draw(folder: Path = FOLDER) -> None:
    """The plots of the page."""
    frame = cells(load())
    plot(frame, folder / "worth.svg", worth_by_rank, f"worth, ranks ({SHOWN} × {SHOWN})")
    plot(frame, folder / "formula.svg", measured_by_formula, "worth as measured, ranks")
