"""Rows of results: kept as JSON lines, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["table", "write"]


def write(path: Path, rows: Sequence[Mapping[str, object]], key: str = "name") -> None:
    """JSON lines; a row takes the place of the one of its name, others stay."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = {json.loads(line)[key]: line for line in old if line}
    kept |= {row[key]: json.dumps(row, ensure_ascii=False) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(kept.values()) + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    cells = [list(columns), *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
