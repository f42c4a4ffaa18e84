"""Tables and plots from the committed rows.

python -m benchmarks.report            rewrite the plots and the generated parts of the pages
python -m benchmarks.report --check    exit status 1 if a part of a page would change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from tools.documents import drawing, render, table, write

from . import kept, rows
from .contenders import FROZEN
from .decoder import TARGETS
from .layers import CONTENDERS

__all__ = ["PARTS", "PARTS_HERE", "documents", "latest", "load", "write_plots"]

AXES = ["device", "terms", "r", "T", "n", "m", "dtype", "dropout"]
# What the tables and the plots by tokens show.
SHOWN = "terms == 'full' and r == 16 and dropout == 0"
NOT_MEASURED = "Not measured on a GPU yet."
PLOTS = (
    ("ratio-by-tokens", "T", "ratio_to_frozen", "time / frozen layer's"),
    ("ratio-by-rank", "r", "ratio_to_frozen", "time / frozen layer's"),
    ("memory-by-tokens", "T", "peak_mib", "peak MiB"),
)


def latest(frame: pd.DataFrame) -> pd.DataFrame:
    """The last timed row of every contender and phase of a case, unless it failed since."""
    frame = frame.reset_index(drop=True)
    cell = [*AXES, "contender"]
    position = pd.Series(frame.index, index=frame.index)
    failures = position.where(frame.status == "failed").groupby([frame[k] for k in cell])
    valid = position > failures.transform("max").fillna(-1)
    timed = frame[valid & (frame.status == "timed")]
    return timed.drop_duplicates([*cell, "phase"], keep="last")


def load(pattern: str) -> list[pd.DataFrame]:
    """The latest rows of every device that the matching files name."""
    found = [row for path in sorted(rows.RESULTS.glob(pattern)) for row in rows.read(path)]
    if not found:
        return []
    frame = latest(pd.DataFrame(found))
    # No row of a CPU has these.
    columns = frame.columns.union(["eager_ms", "eager_ratio_to_frozen"], sort=False)
    frame = frame.reindex(columns=columns)
    return [own for _, own in frame.groupby("device", sort=False)]


def markdown(frame: pd.DataFrame, text_columns: int = 1) -> str:
    return table(list(frame.columns), frame.fillna("").itertuples(index=False), text_columns)


def conditions(frame: pd.DataFrame) -> str:
    """Where, with what and when these rows were measured."""
    each = (", ".join(map(str, frame[key].unique())) for key in ("device", "torch", "commit"))
    days = sorted({date[:10] for date in frame.date})
    where = "{}, torch {}, commit {}".format(*each)
    return f"{where}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def shown(frame: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The rows of the shape that has most of them, the larger shape of equals."""
    frame = frame.query(f"{SHOWN} and phase == '{phase}'")
    if frame.empty:
        return frame
    n, m = frame.groupby(["n", "m"]).size().sort_values(kind="stable").index[-1]
    return frame.query(f"n == {n} and m == {m}")


def _cells(frame: pd.DataFrame) -> list[str]:
    """Ratio and milliseconds; where there are eager times, those behind them."""
    cells = []
    for row in frame.itertuples():
        cell = f"{row.ratio_to_frozen:.2f} ({row.median_ms:.3g})"
        if pd.notna(row.eager_ms):
            cell += f", eager {row.eager_ratio_to_frozen:.2f} ({row.eager_ms:.3g})"
        cells.append(cell)
    return cells


def _eager(frame: pd.DataFrame) -> str:
    """What a caption says of them."""
    if frame.eager_ms.isna().all():
        return ""
    return " Times are of CUDA graphs; eager: of the same calls, issued one by one."


def across(frame: pd.DataFrame, index: str, cells: Sequence[str]) -> str:
    """One line for each value of ``index``, dtypes and tokens across."""
    frame = frame.assign(cell=cells, column=frame.dtype + ", T=" + frame["T"].astype(str))
    order = frame.assign(dtype=frame.dtype.map(list(rows.DTYPES).index)).sort_values(["dtype", "T"])
    table = frame.pivot(index=index, columns="column", values="cell")
    return markdown(table.loc[frame[index].unique(), order.column.unique()].reset_index())


def ratios(frame: pd.DataFrame, phase: str) -> str:
    """Ratio to the frozen layer and median of every contender."""
    frame = shown(frame, phase)
    if frame.empty:
        return ""
    order = frame.contender.map(list(CONTENDERS).index)
    frame = frame.loc[order.sort_values(kind="stable").index]
    what = {"both": "Forward + backward", "eval": "Evaluation without gradients"}[phase]
    first = frame.iloc[0]
    return (
        f"{across(frame, 'contender', _cells(frame))}\n\n{what}, {first.n}→{first.m}, r=16: ratio "
        f"to the frozen linear layer in the same rounds (median ms in brackets).{_eager(frame)} "
        f"{conditions(frame)}."
    )


def _layers(pattern: str, phases: Sequence[str], absent: str) -> str:
    tables = [ratios(own, phase) for own in load(pattern) for phase in phases]
    return "\n\n".join(filter(None, tables)) or absent


def kernels() -> str:
    """Microseconds of every kernel, and the share of the roofline."""
    parts = []
    for own in load("gpu*.jsonl"):
        frame = own.query("phase == 'kernel' and r == 16 and terms == 'full' and n == 4096")
        if not frame.empty:
            frame = frame.assign(kernel=frame.contender.str.removeprefix("kernel:"))
            cells = [
                f"{1e3 * r.median_ms:.1f} ({r.roofline_share:.0%})"
                + f", eager {1e3 * r.eager_ms:.1f}" * pd.notna(r.eager_ms)
                for r in frame.itertuples()
            ]
            caption = "4096→4096, r=16: microseconds (share of the roofline in brackets)."
            caption += f"{_eager(frame)} {conditions(frame)}."
            parts.append(f"{across(frame, 'kernel', cells)}\n\n{caption}")
    return "\n\n".join(parts) or NOT_MEASURED


def decoder() -> str:
    """A table for each layer and dtype: contenders down."""
    parts = []
    keys = ["half", "size", "n", "m", "r"]
    for own in load("decoder-*.jsonl"):
        # A note goes on behind a semicolon where a layer could not be captured.
        own = own.assign(half=own.dtype.str.partition("+")[0], size=own.note.str.partition(";")[0])
        own["adapters"] = own.dtype.str.rpartition("+")[2].where(own.contender != FROZEN, "-")
        for (dtype, size, n, m, r), frame in own.groupby(keys, sort=False):
            frame = frame.assign(cell=_cells(frame)).set_index(["contender", "adapters", "phase"])
            step = frame.xs("step", level="phase")
            table = frame.cell.unstack("phase").loc[step.index]
            table = table.set_axis(["forward + backward", "training step"], axis=1)
            table["peak of a step, MiB"] = step.peak_mib.map("{:.1f}".format)
            table["kept for the backward, MiB"] = step.saved_mib.map("{:.1f}".format)
            caption = (
                f"hidden {n}, intermediate {m}, {size}; adapters on {', '.join(TARGETS)}, r={r}, "
                f"{dtype}: ratio to the frozen layer (median ms in brackets).{_eager(frame)} A "
                f"training step is forward, backward and AdamW on the adapters. "
                f"{conditions(frame)}."
            )
            parts.append(f"{markdown(table.reset_index(), 2)}\n\n{caption}")
    return "\n\n".join(parts) or "Not measured."


def host() -> str:
    """Microseconds of an eager forward and backward on the host."""
    parts = []
    for own in load("host.jsonl"):
        first = own.iloc[0]
        cells = [f"{1e3 * ms:.0f}" for ms in own.median_ms]
        table = own.assign(cell=cells).pivot(index="contender", columns="dtype", values="cell")
        names = [name for name in CONTENDERS if name in set(own.contender)]
        caption = (
            f"Microseconds of forward + backward, {first.n}→{first.m}, T={first['T']}, "
            f"r={first.r}, triton {first.triton}. {conditions(own)}."
        )
        parts.append(f"{markdown(table.loc[names].reset_index())}\n\n{caption}")
    return "\n\n".join(parts) or "Not measured."


def plot_links() -> str:
    files = sorted((rows.RESULTS / "plots").glob("*.svg"))
    links = [f"![{path.stem.replace('-', ' ')}](results/plots/{path.name})" for path in files]
    return "\n\n".join(links) or "No plots yet."


def write_plots(folder: Path) -> None:
    """An SVG for each kind of device and plot that the rows allow."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("cpu", "gpu"):
        for number, own in enumerate(load(f"{kind}*.jsonl")):
            for name, x, y, unit in PLOTS:
                stem = kind + f"-{number + 1}" * bool(number)
                plot(own, x, y, unit, folder / f"{stem}-{name}.svg")


def plot(frame: pd.DataFrame, x: str, y: str, unit: str, path: Path) -> None:
    """A panel for each dtype, a line for each contender over tokens or rank."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    base = shown(frame, "both")
    if base.empty:
        return
    n, m = base.n.iloc[0], base.m.iloc[0]
    frame = frame.query(
        f"phase == 'both' and terms == 'full' and dropout == 0 and n=={n} and m=={m}"
    )
    # The other axis stays fixed: the usual rank, or the tokens with the most ranks.
    fixed = frame.groupby("T").r.nunique().idxmax() if x == "r" else 16
    frame = frame[frame["T" if x == "r" else "r"] == fixed]
    if frame[x].nunique() < 2:
        return
    present = [name for name in CONTENDERS if name != FROZEN and name in set(frame.contender)]
    dtypes = list(frame.dtype.unique())
    with drawing(path, ncols=len(dtypes), figsize=(10, 4), sharey=True) as axes:
        for axis, dtype in zip(axes[0], dtypes, strict=True):
            # An absent contender is an empty column, so that every panel has the same legend.
            lines = frame[frame.dtype == dtype].pivot(index=x, columns="contender", values=y)
            for number, (name, points) in enumerate(lines.reindex(columns=present).items()):
                width = 2.4 if name == "auto" else 1.2
                axis.plot(points, marker="o", ms=3, lw=width, color=f"C{number}", label=name)
            axis.set(xscale="log", yscale="log", xlabel="tokens" if x == "T" else "rank")
            axis.set_title(f"{dtype}\n{n}→{m}, {'r' if x == 'T' else 'T'}={fixed}")
            axis.set_xticks(lines.index, [str(value) for value in lines.index])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(axis="y", alpha=0.2)
        axes[0][0].set_ylabel(f"{unit}, forward + backward")
        told = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(*told, loc="outside right upper")


gpu_layers = partial(_layers, "gpu*.jsonl", ("both",), NOT_MEASURED)
PARTS: dict[str, Callable[[], str]] = {"gpu benchmarks": gpu_layers}
# Those of benchmarks/README.md.
PARTS_HERE: dict[str, Callable[[], str]] = {
    "cpu benchmarks": partial(_layers, "cpu*.jsonl", ("both", "eval"), "Not measured."),
    "gpu benchmarks": partial(_layers, "gpu*.jsonl", ("both", "eval"), NOT_MEASURED),
    "gpu kernels": kernels,
    "decoder layer": decoder,
    "host": host,
    "plots": plot_links,
}


def documents() -> dict[Path, str]:
    """What each page should read, by its path."""
    parts = {
        rows.ROOT / "README.md": PARTS,
        rows.ROOT / "benchmarks" / "README.md": PARTS_HERE,
        rows.ROOT / "docs" / "memory.md": {"kept": kept.markdown},
    }
    return {path: render(path.read_text(), own, path.name) for path, own in parts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    given = parser.parse_args(arguments)
    if not given.check:
        write_plots(rows.RESULTS / "plots")
    return write(documents(), "benchmarks.report", check=given.check)


if __name__ == "__main__":
    sys.exit(main())
