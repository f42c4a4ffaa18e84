"""Result files: one JSON line for each run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["RowsError", "append", "read", "rounded"]


class RowsError(ValueError):
    """Rows that cannot be used."""


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which need not exist.

    Raises:
        RowsError: a line is not JSON, such as one whose writing was interrupted.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line:
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RowsError(
                f"{path}, line {number}, is not a row ({error}); without the line the run that it "
                "was of is done again"
            ) from error
    return found


def append(path: Path, *rows: dict[str, Any]) -> None:
    """Add rows in one piece; floats keep five significant digits, more would be noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write("".join(json.dumps(rounded(r), ensure_ascii=False) + "\n" for r in rows))


def rounded(value: Any) -> Any:
    """Floats with five digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
