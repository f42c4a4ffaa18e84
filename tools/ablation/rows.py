"""Result files: one JSON line for each run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tools.documents import ROOT

__all__ = ["RESULTS", "append", "read"]

RESULTS = ROOT / "benchmarks" / "results" / "ablation"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which need not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, floats with five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(rounded(row)) + "\n")


def rounded(value: Any) -> Any:
    """Floats with five digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
