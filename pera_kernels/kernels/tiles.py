"""Tile sizes per kernel, dtype class and GPU, and how work is split when there are too few tiles.

The tables are the files in ``tiles/``: one generic, known to compile without spills on every
architecture the project checks (``python -m tools.compile_report``), and one for each architecture
with entries of its own. ``python -m tools.tune`` writes them; each says what it rests on. Nothing
is searched at run time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["TABLES", "Tile", "architecture", "load_table", "processor_count", "tile_for"]

TABLES = Path(__file__).parent / "tiles"
GENERIC = "generic"

# Kernel variants with a tile of their own; "_expanded" ones read an expansion from memory.
KERNELS = (
    "expand",
    "project",
    "project_expanded",
    "accumulate",
    "contract",
    "compose",
)
# "half" is bfloat16 and float16, "mixed" the same over float32 factors (where it differs from
# "half"), "single" float32.
CLASSES = ("half", "mixed", "single")


@dataclass(frozen=True)
class Tile:
    """Block sizes along tokens, features and expanded rank, and the launch's warps and stages.

    For ``compose`` the token axis is that of the out features; ``expand`` has none. A program holds
    at most ``pieces`` accumulators of ``block_k`` lanes.
    """

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    pieces: int = 1

    def options(self) -> dict[str, int]:
        """Launch options. On NVIDIA the register limit is stated to be the hardware's own: left to
        itself the assembler spills a few bytes to fit one more block on a multiprocessor.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if torch.version.hip else {**options, "maxnreg": 255}


# Smallest extent of a tl.dot operand.
MIN_BLOCK = 16


@lru_cache(maxsize=32)
def architecture(device: torch.device) -> str:
    """The name of the GPU's table, such as ``"sm_90"``; ``"generic"`` where it has none.

    That is also for smaller chips of a generation: they have less shared memory.
    """
    if device.type != "cuda":
        return GENERIC
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = str(properties.gcnArchName).partition(":")[0]
        return name if (TABLES / f"{name}.json").exists() else "gfx942"
    name = f"sm_{properties.major}{properties.minor}"
    return name if (TABLES / f"{name}.json").exists() else GENERIC


@lru_cache(maxsize=32)
def load_table(name: str) -> dict[tuple[str, str], Tile]:
    """A table by (kernel, dtype class), over the generic one."""
    own: dict[str, Any] = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    tiles = {
        (kernel, kind): Tile(**values)
        for kernel, kinds in own["tiles"].items()
        for kind, values in kinds.items()
    }
    return tiles if name == GENERIC else {**load_table(GENERIC), **tiles}


@lru_cache(maxsize=1024)
def tile_for(
    kernel: str, device: torch.device, dtype: torch.dtype, factor_dtype: torch.dtype
) -> Tile:
    """The tile of a kernel for operands in ``dtype``, expanded from factors in ``factor_dtype``."""
    table = load_table(architecture(device))
    if dtype == torch.float32:
        return table[kernel, "single"]
    if factor_dtype == torch.float32 and (kernel, "mixed") in table:
        return table[kernel, "mixed"]
    return table[kernel, "half"]


def shrink(block: int, size: int) -> int:
    """The smallest power-of-two block, at least ``MIN_BLOCK``, that covers ``size``; at most
    ``block``.
    """
    return min(block, max(MIN_BLOCK, 1 << (size - 1).bit_length()))


def narrow(block: int, size: int, wanted: int) -> int:
    """``block``, halved down to 32 while fewer than ``wanted`` of them cover ``size``."""
    while block > 32 and -(-size // block) < wanted:
        block //= 2
    return block


def pieces(lanes: int, block_k: int, most: int) -> int:
    """How many accumulators of ``block_k`` lanes a program holds: all if ``most`` of them cover
    ``lanes``, so that its input is read once. Otherwise two, for the fewest registers.
    """
    blocks = -(-lanes // block_k)
    return blocks if blocks <= most else min(most, 2)


@lru_cache(maxsize=32)
def processor_count(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; a small stand-in for the CPU interpreter."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(size: int, wanted: int, granule: int) -> tuple[int, int]:
    """Cut ``size`` into at most ``wanted`` equal parts, each a multiple of ``granule``: (parts,
    part).
    """
    blocks = max(1, -(-size // granule))
    per_part = -(-blocks // max(1, min(wanted, blocks)))
    return -(-blocks // per_part), per_part * granule
