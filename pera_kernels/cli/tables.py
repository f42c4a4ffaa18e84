"""Tables for people."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["median", "progress", "shown", "table"]


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; a column of numbers is set to the right."""
    rich = _rich()
    drawn = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        numeric = all(isinstance(row[number], (int, float, type(None))) for row in rows)
        justify = "right" if numeric else "left"
        # In a narrow terminal names are folded, and numbers stay whole.
        least = 16 if number == 0 else None
        drawn.add_column(name, justify=justify, no_wrap=numeric, overflow="fold", min_width=least)
    for row in rows:
        drawn.add_row(*(rich.markup.escape(shown(cell)) for cell in row))
    # Where nobody sets a width, as in a pipe, nothing is folded.
    width = None if sys.stdout.isatty() else 200
    rich.console.Console(width=width).print(drawn)


def median(values: Iterable[object]) -> float | None:
    """The median of the numbers among ``values`` that are finite; None where there is none."""
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return statistics.median(finite) if finite else None


def shown(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def progress(items: Any, what: str) -> Any:
    """``items`` with a bar on the standard error, where that is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise _missing("tqdm") from error
    return tqdm(items, desc=what, disable=None)


def _rich() -> Any:
    try:
        import rich
        import rich.box
        import rich.console
        import rich.markup
        import rich.table
    except ImportError as error:
        raise _missing("rich") from error
    return rich


def _missing(package: str) -> ImportError:
    return ImportError(
        f'this needs the {package} package: pip install "pera_kernels[cli]", or use --json'
    )
