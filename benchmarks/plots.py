"""The plots beside the rows, as SVG that reads on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from io import StringIO
from typing import Any

from .cells import Case, Cells
from .layers import FROZEN
from .tables import SHOWN, shown_cases

__all__ = ["PLOTS"]

# Mid-tones with contrast on white and on near-black alike; our own calls have the strong ones.
INK = "#7d8590"
COLOURS = {
    "frozen": "#7d8590",
    "merged": "#9a8c5a",
    "reference": "#b07aa1",
    "reference-compiled": "#8a63d2",
    "peft-lora": "#d98a1f",
    "peft-lora-amp": "#a86a12",
    "released": "#d1605e",
    "released-amp": "#a8403e",
    "auto": "#2f81f7",
    "torch": "#2f81f7",
    "triton": "#2f81f7",
    "torch-composed": "#3fa34d",
    "triton-composed": "#3fa34d",
}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.transparent": True,
    # The same rows give the same file.
    "svg.hashsalt": "pera_kernels",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# A backend named on its own draws what "auto" draws where both were timed.
STAND_INS = {"torch": "auto", "triton": "auto"}


def _svg(panels: int, draw: Callable[[Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1,
            panels,
            figsize=(1.2 + 3.8 * panels, 3.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        draw(axes[0])
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    # Trailing blanks would be noise in a difference between two versions.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _names(cells: Cells, cases: Iterable[Case], phase: str) -> list[str]:
    names = cells.contenders(cases, phase)
    return [n for n in names if n != FROZEN and STAND_INS.get(n) not in names]


def _lines(
    axis: Any, cells: Cells, cases: list[Case], phase: str, x: str, key: str
) -> dict[str, Any]:
    """One line for each contender over the cases; the handles by name."""
    handles = {}
    for name in _names(cells, cases, phase):
        points = [
            (getattr(case, x), value)
            for case in cases
            if (value := cells.value(case, name, phase, key)) is not None
        ]
        if points:
            strong = name in ("auto", *STAND_INS)
            handles[name] = axis.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                markersize=4,
                linewidth=2.4 if strong else 1.4,
                color=COLOURS[name],
                linestyle="--" if name.endswith("-amp") else "-",
                zorder=3 if strong else 2,
                label=name,
            )[0]
    axis.grid(axis="y")
    return handles


def _log_ticks(axis: Any, values: Iterable[float], base: int) -> None:
    from matplotlib.ticker import NullLocator

    ticks = sorted(set(values))
    axis.set_xscale("log", base=base)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _ratio_axis(axis: Any) -> None:
    """Logarithmic, with plain numbers: at T = 1 some take ten times as long as the frozen layer."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.axhline(1.0, color=INK, linewidth=1, linestyle=":")


def _legend(axis: Any, handles: dict[str, Any]) -> None:
    axis.figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", fontsize=8, handlelength=2.4
    )


def _over(cells: Cells, cases: list[Case], x: str, key: str, title: str, unit: str) -> str | None:
    """A panel for each dtype: ``key`` of forward + backward over the axis ``x``."""
    cases = [c for c in cases if any(cells.value(c, n, "both", key) for n in COLOURS)]
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    if len({getattr(case, x) for case in cases}) < 2:
        return None

    def draw(axes: Any) -> None:
        handles: dict[str, Any] = {}
        for axis, dtype in zip(axes, dtypes, strict=True):
            mine = [case for case in cases if case.dtype == dtype]
            handles |= _lines(axis, cells, mine, "both", x, key)
            _log_ticks(axis, (getattr(case, x) for case in mine), 2 if x == "r" else 10)
            axis.set_title(f"{dtype}, {title}")
            axis.set_xlabel({"T": "tokens T", "r": "rank r"}[x])
            if key == "ratio_to_frozen":
                _ratio_axis(axis)
            else:
                axis.set_yscale("log")
        axes[0].set_ylabel(unit)
        _legend(axes[-1], handles)

    return _svg(len(dtypes), draw)


def ratio_by_T(cells: Cells) -> str | None:
    """Forward + backward over the frozen layer's, by tokens."""
    cases = shown_cases(cells)
    title = f"{cases[0].n}→{cases[0].m}, r={SHOWN['r']}" if cases else ""
    return _over(cells, cases, "T", "ratio_to_frozen", title, "time / frozen layer's, fwd + bwd")


def memory(cells: Cells) -> str | None:
    """Peak of one forward + backward, by tokens."""
    cases = shown_cases(cells)
    title = f"{cases[0].n}→{cases[0].m}, r={SHOWN['r']}" if cases else ""
    return _over(cells, cases, "T", "peak_mib", title, "peak MiB of forward + backward")


def ratio_by_rank(cells: Cells) -> str | None:
    """Forward + backward over the frozen layer's, by rank, at the T with the most ranks."""

    def comparable(case: Case) -> bool:
        plain = (case.terms, case.dropout) == (SHOWN["terms"], SHOWN["dropout"])
        return plain and "+" not in case.dtype

    measured = [c for c in cells.cases(comparable) if cells.find(c, FROZEN, "both")]
    groups: dict[tuple[int, int, int], list[Case]] = {}
    for case in measured:
        groups.setdefault((case.T, case.n, case.m), []).append(case)
    if not groups:
        return None
    # The most ranks; of equals the case where neither launches nor the base product are all.
    best = max(groups, key=lambda size: (len(groups[size]), -abs(math.log(size[0] / 512)), size))
    title = f"T={best[0]}, {best[1]}→{best[2]}"
    unit = "time / frozen layer's, fwd + bwd"
    return _over(cells, groups[best], "r", "ratio_to_frozen", title, unit)


def roofline(cells: Cells) -> str | None:
    """What the formulas achieved under the ceilings of the same run, forward + backward."""
    cases = shown_cases(cells)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    rows = [
        (case, row)
        for case in cases
        for name in [FROZEN, *_names(cells, cases, "both")]
        if (row := cells.find(case, name, "both")) and row["ceiling_tflops"]
    ]
    dtypes = [dtype for dtype in dtypes if any(case.dtype == dtype for case, _ in rows)]
    if not dtypes:
        return None

    def draw(axes: Any) -> None:
        handles: dict[str, Any] = {}
        for axis, dtype in zip(axes, dtypes, strict=True):
            mine = [row for case, row in rows if case.dtype == dtype]
            intensities = [row["tflops"] * 1e3 / row["gbps"] for row in mine]
            top = max(row["ceiling_tflops"] for row in mine)
            slope = max(row["ceiling_gbps"] for row in mine) / 1e3
            low, high = min(intensities) / 2, max(max(intensities), top / slope) * 2
            roof = [low, top / slope, high]
            axis.plot(roof, [min(top, slope * x) for x in roof], color=INK, linewidth=1.2)
            for name in dict.fromkeys(row["contender"] for row in mine):
                own = [
                    (x, r["tflops"])
                    for x, r in zip(intensities, mine, strict=True)
                    if r["contender"] == name
                ]
                handles[name] = axis.scatter(
                    *zip(*own, strict=True), color=COLOURS[name], s=18, zorder=3
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{dtype}, {cases[0].n}→{cases[0].m}, r={SHOWN['r']}")
            axis.set_xlabel("FLOP per compulsory byte")
            axis.grid()
        axes[0].set_ylabel("TFLOP/s of the own formula")
        _legend(axes[-1], handles)

    return _svg(len(dtypes), draw)


PLOTS: dict[str, Callable[[Cells], str | None]] = {
    "ratio-by-tokens": ratio_by_T,
    "ratio-by-rank": ratio_by_rank,
    "memory": memory,
    "roofline": roofline,
}
