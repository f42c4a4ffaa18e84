"""A cost of a compiled kernel on a problem where nothing can be timed: a model, not a measurement.

In cycles of one multiprocessor, with B thread blocks of W warps over P multiprocessors and
b = ceil(B / P) blocks for the busiest of them, the cost is

    max(memory, max(issue, transfer, matrix) * max(1, HIDING / resident))

    issue     b W S / 4            S instructions per warp, one per cycle and scheduler
    transfer  b W D / 64           D bytes per warp between the L2 and the multiprocessor
    matrix    b W F / rate         F multiply-adds per warp on the matrix units
    memory    compulsory bytes at the DRAM's speed: no tile does without it
    resident  warps that registers and shared memory allow at once, of those there are;
              fewer than HIDING = 8 do not hide each other's latencies

S, D and F follow from the machine code: per multiply-add those of the main loop, times the
multiply-adds of all its passes, and once what lies outside it. So accesses narrower than 16 bytes,
address arithmetic and expansions formed on chip all count by the instructions they take. It knows
nothing of latencies, bank conflicts, or how well loads and products overlap: a pipeline costs
instructions and seems to bring nothing, so only tiles with the stages of the present one are
compared. Kernels limited by what it does not know are ranked wrongly. That is why a table is
changed only where a tile issues clearly fewer instructions, and why a GPU's timings replace what
this ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .offline import Chip, Compiled, Recorded
from .sass import Code

__all__ = ["MATRIX_RATE", "Cost", "cost", "memory_cycles"]

# Dense half-precision multiply-adds per cycle and multiprocessor (CUDA programming guide).
MATRIX_RATE = {"sm_80": 1024, "sm_89": 512, "sm_90": 2048}
MOST_WARPS = {"sm_80": 64, "sm_89": 48, "sm_90": 64}
# DRAM bytes per clock cycle of A100 (80 GB), L40 and H200, from their data sheets.
DRAM_BYTES_PER_CYCLE = {"sm_80": 1446, "sm_89": 347, "sm_90": 2735}
SCHEDULERS = 4
L2_BYTES_PER_CYCLE = 64
REGISTERS = 65536
WARP = 32
HIDING = 8


@dataclass(frozen=True)
class Cost:
    """Modelled cycles, and the instruction slots they take, of one launch on a multiprocessor."""

    cycles: float
    slots: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cycles + other.cycles, self.slots + other.slots)


def _products(kernel: str, sizes: dict[str, Any]) -> int:
    """Multiply-adds of one thread block in its main loop, of masked lanes and rows too."""

    def covered(size: int, block: int) -> int:
        return math.ceil(size / block) * block

    if kernel == "project_kernel":
        width = min(sizes["n_per_split"], covered(sizes["N"], sizes["BLOCK_N"]))
        return int(sizes["BLOCK_T"] * sizes["PIECES"] * sizes["BLOCK_K"] * width)
    if kernel == "contract_kernel":
        depth = min(sizes["t_per_split"], covered(sizes["T"], sizes["BLOCK_T"]))
        return int(sizes["BLOCK_N"] * sizes["PIECES"] * sizes["BLOCK_K"] * depth)
    lanes = covered(sizes["lanes"], sizes["BLOCK_K"])
    if kernel == "accumulate_kernel":
        return int(sizes["BLOCK_T"] * sizes["BLOCK_M"] * lanes)
    return int(sizes["BLOCK_M"] * sizes["BLOCK_N"] * lanes)


def cost(made: Recorded, compiled: Compiled, chip: Chip) -> Cost:
    """The model above for one launch."""
    assert compiled.code is not None
    code, sizes = compiled.code, made.sizes
    warps = sizes.get("num_warps", 4)
    passes = 0.0
    if code.loop.products:
        passes = _products(made.launch.kernel, sizes) / warps / code.loop.products
    blocks = math.ceil(math.prod(made.grid) / chip.processors)
    share = blocks * warps
    slots = share * _total(code, passes, "instructions") / SCHEDULERS
    transfer = share * _total(code, passes, "bytes") / L2_BYTES_PER_CYCLE
    matrix = share * _total(code, passes, "matrix") / MATRIX_RATE[chip.arch]
    resident = min(share, _resident_warps(compiled, chip, warps))
    return Cost(max(slots, transfer, matrix) * max(1.0, HIDING / resident), slots)


def memory_cycles(nbytes: int, chip: Chip) -> float:
    """The least that so many compulsory bytes take."""
    return nbytes / DRAM_BYTES_PER_CYCLE[chip.arch]


def _total(code: Code, passes: float, what: str) -> float:
    return float(passes * getattr(code.loop, what) + getattr(code.rest, what))


def _resident_warps(compiled: Compiled, chip: Chip, warps: int) -> int:
    """Warps of whole blocks that fit a multiprocessor."""
    registers = math.ceil(max(compiled.registers, 1) / 8) * 8 * WARP * warps
    by_registers = REGISTERS // registers
    # The driver takes 1 KiB of each block's share.
    by_shared = chip.shared_limit // (compiled.shared_bytes + 1024)
    return max(1, min(by_registers, by_shared, MOST_WARPS[chip.arch] // warps)) * warps
