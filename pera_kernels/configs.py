"""Tile sizes per kernel and dtype class, and how work is split when there are too few tiles.

One generic table is known to compile without spills on every architecture the project checks
(``python -m tools.compile_report``). Nothing is searched at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["GENERIC", "HIP", "Tile", "processor_count", "tile_for"]


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

    def options(self) -> dict[str, int]:
        """Launch options. On NVIDIA the register limit is stated to be the hardware's own: left to
        itself the assembler spills a few bytes to fit one more block on a multiprocessor.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if torch.version.hip else {**options, "maxnreg": 255}


# Keyed by (kernel, dtype class of the operands). "half" is bfloat16 and float16, "mixed" the same
# over float32 factors (where it differs from "half"), "single" float32.
GENERIC: dict[tuple[str, str], Tile] = {
    ("project", "half"): Tile(128, 64, 64, 8, 2),
    ("project", "mixed"): Tile(64, 64, 64, 8, 2),
    ("project", "single"): Tile(32, 16, 32, 4, 2),
    ("accumulate", "half"): Tile(64, 64, 32, 4, 3),
    ("accumulate", "single"): Tile(32, 32, 16, 4, 2),
    # Its expanded-rank block is the rows of the product: 64 of them are one wgmma on Hopper.
    ("contract", "half"): Tile(64, 64, 64, 8, 2),
    ("contract", "single"): Tile(32, 32, 32, 8, 2),
    # The same kernel with its left side expanded on chip from a factor.
    ("contract_factor", "half"): Tile(32, 64, 64, 8, 2),
    ("contract_factor", "single"): Tile(32, 32, 32, 8, 2),
    ("compose", "half"): Tile(64, 64, 32, 4, 2),
    ("compose", "mixed"): Tile(64, 64, 32, 8, 2),
    ("compose", "single"): Tile(32, 32, 32, 4, 2),
}

# AMD: 64 KiB of shared memory and wavefronts of 64, so fewer warps and stages.
HIP: dict[tuple[str, str], Tile] = {
    **GENERIC,
    ("project", "half"): Tile(64, 64, 64, 4, 2),
    ("project", "mixed"): Tile(64, 64, 64, 4, 2),
    ("contract", "half"): Tile(64, 64, 64, 4, 2),
    ("contract_factor", "half"): Tile(64, 64, 64, 4, 2),
}

# Smallest extent of a tl.dot operand.
MIN_BLOCK = 16


def tile_for(kernel: str, dtype: torch.dtype, factor_dtype: torch.dtype) -> Tile:
    """The tile of a kernel for operands in ``dtype``, expanded from factors in ``factor_dtype``."""
    table = HIP if torch.version.hip else GENERIC
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
