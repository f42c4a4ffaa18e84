"""Plots of the ablation: curves, losses by rank, singular values of what was learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pera_kernels as pk
from tools.ablation.runs import LABELS
from tools.documents import drawing

__all__ = ["draw"]

COLOURS = {"lora": "C0", "full": "C3", "square": "C1", "cross": "C2", "full_fine_tuning": "0.4"}


def draw(runs: pd.DataFrame, folder: Path, task: str) -> None:
    """``TASK-curves.svg``, ``TASK-ranks.svg`` and ``TASK-spectra.svg``, where there are runs."""
    # A run that diverged has no whole curve; the table names it.
    runs = runs[runs["test"].notna()] if len(runs) else runs
    if not len(runs):
        return
    present = sorted(runs.loc[runs["method"].isin(COLOURS) & (runs["r"] > 0), "r"].unique())
    if present:
        size, name = (5.5 * len(present), 7), f"{task}-curves.svg"
        with drawing(folder / name, nrows=2, ncols=len(present), figsize=size) as axes:
            curves(axes, runs, task, present)
        with drawing(folder / f"{task}-ranks.svg", ncols=2, figsize=(11, 4)) as (axes,):
            ranks(axes, runs, task)
    if "spectra" in runs and runs["spectra"].notna().any():
        with drawing(folder / f"{task}-spectra.svg", figsize=(7, 4.5)) as ((axis,),):
            spectra(axis, runs, task)


def curves(axes, runs, task, present):  # type: ignore[no-untyped-def]
    """Training losses and, seed by seed, how far below LoRA's: mean and standard error."""
    for (above, below), r in zip(axes.T, present, strict=True):
        own = runs[runs["r"] == r].set_index("seed").sort_index()
        by_method = {key: own[own["method"] == key] for key in COLOURS}
        lora = by_method["lora"]["curve"]
        for key, part in by_method.items():
            if not len(part):
                continue
            losses = np.array(part["curve"].tolist())
            steps = (np.arange(losses.shape[1]) + 0.5) * part["steps"].iloc[0] / losses.shape[1]
            band(above, steps, losses, key)
            seeds = lora.index.intersection(part.index)
            if key != "lora" and len(seeds):
                gains = [np.subtract(lora[seed], part["curve"][seed]) for seed in seeds]
                band(below, steps, np.array(gains), key)
        above.set(title=f"{task}, rank {r}", ylabel="training loss", xlabel="step")
        below.set(ylabel="LoRA's loss less the method's", xlabel="step")
        below.axhline(0, color=COLOURS["lora"], linewidth=1)
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].legend()


def band(axis, steps, values, key):  # type: ignore[no-untyped-def]
    """Mean over the runs, and a band of one standard error."""
    mean = values.mean(0)
    axis.plot(steps, mean, color=COLOURS[key], label=LABELS[key])
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        axis.fill_between(steps, mean - error, mean + error, color=COLOURS[key], alpha=0.2)


def ranks(axes, runs, task):  # type: ignore[no-untyped-def]
    """Losses by the adapter's rank (the paper's Figure 3): LoRA at every rank that was trained."""
    for axis, loss in zip(axes, ("training", "test"), strict=True):
        for key in ("lora", "full", "square", "cross"):
            lora = runs["method"].str.startswith("lora")
            own = runs[lora if key == "lora" else runs["method"] == key].groupby("rank")[loss]
            axis.errorbar(
                own.mean().index,
                own.mean(),
                own.sem(),
                color=COLOURS[key],
                label=LABELS[key],
                marker="o",
                capsize=3,
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(title=f"{task}: {loss} loss", xlabel="rank of the adapter")
        axis.grid(alpha=0.3)
    axes[0].legend()


def spectra(axis, runs, task):  # type: ignore[no-untyped-def]
    """Singular values of the learned updates, every layer and their median; of random factors too,
    as an update before training would have if B and h were not zero.
    """
    kept = runs[runs["spectra"].notna()]
    for _, run in kept.iterrows():
        layers = [np.array(sigma) / sigma[0] for sigma in run["spectra"]]
        shortest = min(map(len, layers))
        for sigma in layers:
            axis.plot(np.arange(1, len(sigma) + 1), sigma, color=COLOURS[run["method"]], alpha=0.08)
        median = np.median([sigma[:shortest] for sigma in layers], axis=0)
        label = LABELS[run["method"]] + (f", rank {run['rank']}" if run["rank"] else "")
        axis.plot(np.arange(1, shortest + 1), median, color=COLOURS[run["method"]], label=label)
    for terms, colour in (("linear", COLOURS["lora"]), ("full", COLOURS["full"])):
        sigma = of_random_factors(terms)
        axis.plot(np.arange(1, len(sigma) + 1), sigma, color=colour, linestyle=":")
    axis.plot([], [], color="0.2", linestyle=":", label="random factors, rank 16 (K = 152)")
    axis.set(
        xscale="log",
        yscale="log",
        ylim=(1e-3, 1.2),
        xlabel="k",
        ylabel="σ_k / σ_1",
        title=f"{task}: singular values of what was learned",
    )
    axis.grid(alpha=0.3)
    axis.legend()


def of_random_factors(terms, r=16, width=512):  # type: ignore[no-untyped-def]
    """σ_k / σ_1 above rounding, products and BA being of one size."""
    torch.manual_seed(0)
    layer = pk.PeraLinear(width, width, r, terms=terms, dtype=torch.float64)
    for parameter in pk.adapter_parameters(layer):
        torch.nn.init.normal_(parameter)
    if layer.pera_h is not None:
        with torch.no_grad():
            layer.pera_h /= layer.quadratic_share()
    sigma = torch.linalg.svdvals(layer.delta_weight().detach())
    return (sigma[sigma > 1e-9 * sigma[0]] / sigma[0]).numpy()
