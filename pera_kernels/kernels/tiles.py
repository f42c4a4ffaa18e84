"""Tile sizes per kernel, dtype class and GPU, and how work is split when there are too few tiles.

The tables are the files in ``tiles/``: one generic, known to compile without spills on every
architecture the project checks (``python -m tools.compile_report``), and one for each architecture
with entries of its own. ``python -m tools.tune`` writes them; each says what it rests on. Nothing
is searched at run time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "TABLES",
    "Choices",
    "Tile",
    "architecture",
    "choices",
    "load_table",
    "phi_in_memory",
    "processor_count",
    "projection",
    "reached",
    "tile_for",
]

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
    at most ``pieces`` accumulators of ``block_k`` lanes. Where there are too few programs, splits
    make up to ``programs`` of them for each multiprocessor.
    """

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    pieces: int = 1
    programs: int = 1
    maxnreg: int = 255

    def options(self) -> dict[str, int]:
        """Launch options. On NVIDIA the register limit is stated even if it is the hardware's own:
        left to itself the assembler spills a few bytes to fit one more block on a multiprocessor.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if torch.version.hip else {**options, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Choices:
    """From where on a call is computed another way; None is never.

    With more than ``products`` = T · N · lanes to a multiprocessor φ is put in memory before a
    projection. From so many tokens on the update is written first and the base product is added to
    it (``base_last``), a projection with φ in memory is left to the GPU's library
    (``library_projection``), and the update is (``library_update``).
    """

    products: int = 20_000_000
    base_last: int | None = 2048
    library_projection: int | None = None
    library_update: int | None = None


def reached(tokens: int | None, x: torch.Tensor) -> bool:
    """Whether x ``(T, N)`` has as many tokens as a choice asks for."""
    return tokens is not None and tokens <= x.shape[0]


class Projection(NamedTuple):
    """How a projection is cut: ``programs`` times ``splits`` of them, each with the accumulators
    ``pieces``, (first lane, lanes), together ``block_k`` lanes of one factor.
    """

    block_t: int
    block_k: int
    pieces: tuple[tuple[int, int], ...]
    programs: int
    splits: int
    n_per_split: int


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


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8")))


@lru_cache(maxsize=32)
def load_choices(name: str) -> Choices:
    """What a table overrides, over what the generic one does."""
    return Choices(**{**_read(GENERIC).get("choices", {}), **_read(name).get("choices", {})})


def choices(device: torch.device) -> Choices:
    return load_choices(architecture(device))


def phi_in_memory(x: torch.Tensor, lanes: int) -> bool:
    """Whether φ is put in memory before a projection of x ``(T, N)``; else each of its programs
    forms the φ it needs on chip.

    Desk estimate: forming φ for a block of 128 tokens costs a GPU of 132 multiprocessors 0.25 µs at
    r=16, N=4096 (160 lanes); reading it from memory costs part of a launch. There 4,028 tokens are
    the limit: with fewer, a projection that is not split leaves half of the GPU idle.
    """
    T, N = x.shape
    return T * N * lanes > choices(x.device).products * processor_count(x.device)


@lru_cache(maxsize=32)
def load_table(name: str) -> dict[tuple[str, str], Tile]:
    """A table by (kernel, dtype class), over the generic one."""
    tiles = {
        (kernel, kind): Tile(**values)
        for kernel, kinds in _read(name)["tiles"].items()
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


@lru_cache(maxsize=32)
def processor_count(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; a small stand-in for the CPU interpreter."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(size: int, wanted: int, granule: int) -> tuple[int, int]:
    """Cut ``size`` into at most ``wanted`` equal parts, each a multiple of ``granule``: (parts,
    part).
    """
    blocks = max(1, -(-size // granule))
    per_part = -(-blocks // max(1, min(wanted, blocks)))
    return -(-blocks // per_part), per_part * granule


@lru_cache(maxsize=1024)
def projection(
    tile: Tile, T: int, N: int, lanes: int, size: int, members: int, processors: int, whole: bool
) -> Projection:
    """The cut of x ``(T, N)``, of ``size`` bytes a number, times φ of ``members`` factors of
    ``lanes`` lanes each.

    Lanes are cut so that accumulators hold them and, where splits are needed, so that the fewest
    bytes move: c blocks of lanes read x c times, and leave float32 sums of processors / c splits to
    be written and read. If sums are to be ``whole``, blocks of tokens are smaller instead, and more
    blocks of lanes read x. No lane is computed in vain where the blocks are equal.
    """
    block_t = shrink(tile.block_t, T)
    wanted = tile.programs * processors
    while whole and block_t > 64 and 2 * -(-T // block_t) * members <= wanted:
        block_t //= 2
    rows = -(-T // block_t) * members
    fewest_bytes = round(math.sqrt(8 * lanes * wanted / (rows * N * size)))
    filling = wanted // rows if whole else fewest_bytes
    cuts = max(-(-lanes // (tile.block_k * tile.pieces)), min(filling, lanes // MIN_BLOCK))
    block_k = -(-lanes // (cuts * MIN_BLOCK)) * MIN_BLOCK
    if block_t < 64:
        # All warps stand side by side along the lanes: one accumulator.
        block_k = min(tile.block_k, 1 << block_k.bit_length() - 1)
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < block_k:
        # Powers of two, the widest first.
        width = min(tile.block_k, 1 << (block_k - start).bit_length() - 1)
        pieces.append((start, width))
        start += width
    programs = rows * -(-lanes // block_k)
    splits, n_per_split = split(N, 1 if whole else wanted // programs, 2 * tile.block_n)
    return Projection(block_t, block_k, tuple(pieces), programs, splits, n_per_split)
