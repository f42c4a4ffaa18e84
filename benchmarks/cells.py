"""The committed rows as cells: for each contender in each phase of each case, the latest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import results
from .contenders import CONTENDERS

__all__ = ["RESULTS", "Case", "Cells", "label", "load"]

RESULTS = Path(__file__).parent / "results"
AXES = ("terms", "r", "T", "n", "m", "dtype", "dropout")


@dataclass(frozen=True)
class Case:
    """The axes of a row."""

    terms: str
    r: int
    T: int
    n: int
    m: int
    dtype: str
    dropout: float

    def __str__(self) -> str:
        text = f"T={self.T}, {self.n}→{self.m}, r={self.r}, {self.dtype}"
        text += "" if self.terms == "full" else f", {self.terms}"
        return text if self.dropout == 0.0 else f"{text}, dropout {self.dropout:g}"


class Cells:
    """Rows by (case, contender, phase), of one device; the last one appended counts."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows: dict[tuple[Case, str, str], dict[str, Any]] = {}
        for row in rows:
            self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        case = Case(*(row[axis] for axis in AXES))
        if row["status"] != "timed":
            # It failed the gate since: what it was timed at before no longer counts.
            for key in [k for k in self._rows if k[:2] == (case, row["contender"])]:
                del self._rows[key]
            return
        key = case, row["contender"], row["phase"]
        before = self._rows.get(key)
        # Where the frozen layer was timed both ways in one run, the replayed one is shown.
        if before is None or not (before["graph"] and before["date"] == row["date"]):
            self._rows[key] = row

    def __bool__(self) -> bool:
        return bool(self._rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from self._rows.values()

    def cases(self, matches: Callable[[Case], bool] = lambda case: True) -> list[Case]:
        found = dict.fromkeys(case for case, _, _ in self._rows if matches(case))
        return sorted(found, key=lambda c: (c.dtype != "float32", c.dtype, c.n, c.m, c.r, c.T))

    def find(self, case: Case, contender: str, phase: str) -> dict[str, Any] | None:
        return self._rows.get((case, contender, phase))

    def value(self, case: Case, contender: str, phase: str, key: str) -> Any:
        row = self.find(case, contender, phase)
        return None if row is None else row[key]

    def contenders(self, cases: Iterable[Case], phase: str) -> list[str]:
        """Those that have a row for one of the cases, in the order of the suite."""
        cases = list(cases)
        names = [contender.name for contender in CONTENDERS]
        return [n for n in names if any((case, n, phase) in self._rows for case in cases)]


def load(pattern: str, folder: Path = RESULTS) -> list[Cells]:
    """The cells of every device that the matching files name, in the order of the files."""
    devices: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(pattern)):
        for row in results.read(path):
            devices.setdefault(row["device"], []).append(row)
    return [cells for rows in devices.values() if (cells := Cells(rows))]


def label(rows: Iterable[dict[str, Any]]) -> str:
    """Where, with what and when these rows were measured."""
    rows = list(rows)

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{each('device')}, torch {each('torch')}, commit {each('commit')}, {when}"
