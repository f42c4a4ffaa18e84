"""Tile sizes per kernel and dtype class, and how work is split when there are too few tiles.

One generic table is known to compile without spills on every architecture the project checks
(``python -m tools.compile_report``). Nothing is searched at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["TILES", "Tile", "processor_count", "tile_for"]


@dataclass(frozen=True)
class Tile:
    """Block sizes along tokens, features and expanded rank, and the launch's warps and stages.

    For ``compose`` the token axis is that of the out features.
    """

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Keyed by (kernel, dtype class). "half" is bfloat16 and float16, "single" is float32.
TILES: dict[tuple[str, str], Tile] = {
    ("project", "half"): Tile(64, 64, 64, 4, 3),
    ("project", "single"): Tile(32, 32, 32, 4, 2),
    ("accumulate", "half"): Tile(64, 64, 32, 4, 3),
    ("accumulate", "single"): Tile(32, 32, 32, 4, 2),
    ("contract", "half"): Tile(64, 64, 64, 4, 3),
    ("contract", "single"): Tile(32, 32, 32, 4, 2),
    ("compose", "half"): Tile(64, 64, 32, 4, 2),
    ("compose", "single"): Tile(32, 32, 32, 4, 2),
}

# Smallest extent of a tl.dot operand.
MIN_BLOCK = 16


def dtype_class(dtype: torch.dtype) -> str:
    return "single" if dtype == torch.float32 else "half"


def tile_for(kernel: str, dtype: torch.dtype) -> Tile:
    """The tile of ``kernel`` ("project", "accumulate", "contract", "compose") for operands in
    ``dtype``.
    """
    return TILES[kernel, dtype_class(dtype)]


def shrink(block: int, size: int) -> int:
    """The smallest power-of-two block, at least ``MIN_BLOCK``, that covers ``size``; at most
    ``block``.
    """
    return min(block, max(MIN_BLOCK, 1 << (size - 1).bit_length()))


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
