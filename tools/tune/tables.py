"""Tile tables and rows of results as files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pera_kernels import configs
from pera_kernels.configs import Tile

__all__ = ["append_rows", "read_rows", "show_tile", "sources", "write_table"]

REST = " The rest: "


def sources() -> str:
    """A digest of what is timed: the kernels and their launchers, whatever the commit."""
    package = configs.TABLES.parent
    files = [*sorted((package / "kernels").glob("*.py")), package / "launch.py"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def show_tile(tile: Tile) -> str:
    """``tokens x features x lanes``, warps, stages, pieces."""
    return (
        f"{tile.block_t}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages} "
        f"p{tile.pieces}"
    )


def write_table(name: str, tiles: Mapping[tuple[str, str], Tile], basis: str, folder: Path) -> Path:
    """Put ``tiles`` into the table of an architecture, over what the shipped one has, at once: a
    reader sees the old file or the new one. ``basis`` says what these tiles rest on; that of the
    entries which stay is kept behind it.
    """
    shipped, path = configs.TABLES / f"{name}.json", folder / f"{name}.json"
    table: dict[str, Any] = {"architecture": name, "basis": "", "tiles": {}}
    if shipped.exists():
        table = json.loads(shipped.read_text(encoding="utf-8"))
    entries: dict[str, Any] = table["tiles"]
    stay = [
        (kernel, kind)
        for kernel, kinds in entries.items()
        for kind in kinds
        if (kernel, kind) not in tiles
    ]
    for (kernel, kind), tile in tiles.items():
        entries.setdefault(kernel, {})[kind] = asdict(tile)
    changed = ", ".join(f"{kernel} {kind}" for kernel, kind in sorted(tiles))
    before = str(table["basis"]).rpartition(REST)[2]
    table["basis"] = f"{basis}: {changed}." + (REST + before if stay and before else "")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table, indent=1) + "\n"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".table-") as scratch:
        # An ordinary file, with the permissions that the umask gives.
        new = Path(scratch) / path.name
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    return path


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
