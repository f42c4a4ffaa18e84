"""What a compiled kernel's machine code says: instructions, products and bytes, of its main loop
and of the rest. NVIDIA's SASS, read by the disassembler in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Code", "Count", "disassemble", "read"]

# "        /*0a30*/                   LDG.E.128 R4, [R2.64] ;"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.x]*)([^;]*);")
LOADS = ("LDG", "LDGSTS")
WARP = 32


@dataclass(frozen=True)
class Count:
    """Per warp: instructions issued, multiply-adds on the matrix units and elsewhere, bytes moved
    between global memory and the multiprocessor, and how many loads were narrower than 16 bytes.
    """

    instructions: int = 0
    matrix: int = 0
    scalar: int = 0
    bytes: int = 0
    loads: int = 0
    narrow_loads: int = 0

    @property
    def products(self) -> int:
        return self.matrix + self.scalar


@dataclass(frozen=True)
class Code:
    """The loop with the most products, one pass through its body, and everything outside it."""

    loop: Count
    rest: Count


def disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(listing: str) -> Code:
    """Count a listing. A loop is what a backward branch encloses; of nested or several loops the
    main one is the innermost of those with the most products.
    """
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(listing)]
    if not code:
        raise ValueError("the listing has no instructions")
    best: tuple[int, int] = (0, -1)
    most, shortest = 0, 0
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if not opcode.startswith("BRA") or target is None or int(target[1], 16) >= address:
            continue
        bounds = int(target[1], 16), address
        body = [line for line in code if bounds[0] <= line[0] <= bounds[1]]
        products = _count(body).products
        if products > most or (products == most and products and len(body) < shortest):
            best, most, shortest = bounds, products, len(body)
    inside = [line for line in code if best[0] <= line[0] <= best[1]]
    outside = [line for line in code if not best[0] <= line[0] <= best[1]]
    return Code(_count(inside), _count(outside))


def _count(lines: Sequence[tuple[int, str, str]]) -> Count:
    instructions = matrix = scalar = moved = loads = narrow = 0
    for _, opcode, _ in lines:
        name, *modifiers = opcode.split(".")
        # Padding behind the end of a kernel is never issued.
        if name == "NOP":
            continue
        instructions += 1
        if name == "HMMA":
            matrix += _mma_products(modifiers[0])
        elif name == "HGMMA":
            rows, columns, depth = map(int, modifiers[0].split("x"))
            # One instruction of a group of four warps.
            matrix += rows * columns * depth // 4
        elif name == "FFMA":
            scalar += WARP
        elif name in (*LOADS, "STG"):
            width = _width(modifiers)
            moved += WARP * width
            if name in LOADS:
                loads += 1
                narrow += width < 16
    return Count(instructions, matrix, scalar, moved, loads, narrow)


def _mma_products(shape: str) -> int:
    """Multiply-adds of an ``HMMA``: "16816" is 16 x 8 x 16."""
    return 16 * 8 * int(shape[3:])


def _width(modifiers: Sequence[str]) -> int:
    """Bytes that one thread moves."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[name] for name in modifiers if name in widths), 4)
