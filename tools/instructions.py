"""Machine instructions of a kernel compiled for NVIDIA: of its main loop, and of the rest.

Read from the listing (SASS) that the disassembler in Triton's wheel makes of a cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Count", "count", "cuobjdump"]

# "        /*0a30*/                   LDG.E.128 R4, [R2.64] ;"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.x]*)([^;]*);")
LOADS = ("LDG", "LDGSTS")
WARP = 32


@dataclass(frozen=True)
class Count:
    """Of one warp: instructions, multiply-adds on matrix units and elsewhere, bytes moved between
    global memory and the multiprocessor, and loads with how many were narrower than 16 bytes.
    """

    instructions: int = 0
    matrix: int = 0
    scalar: int = 0
    bytes: int = 0
    loads: int = 0
    narrow_loads: int = 0


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool in Triton's wheel says about a cubin: ``-sass`` or ``-res-usage``."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), option, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count(listing: str) -> tuple[Count, Count]:
    """The loop with the most multiply-adds, one pass through its body, and everything outside it.

    A loop is what a backward branch encloses; of nested ones with the same products the innermost.
    """
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(listing)]
    if not code:
        raise ValueError("the listing has no instructions")
    loops = [(0, -1)]
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))

    def body(loop: tuple[int, int]) -> list[str]:
        return [opcode for address, opcode, _ in code if loop[0] <= address <= loop[1]]

    def products_then_shortness(loop: tuple[int, int]) -> tuple[int, int]:
        own = _count(body(loop))
        return own.matrix + own.scalar, -own.instructions

    main = max(loops, key=products_then_shortness)
    rest = [opcode for address, opcode, _ in code if not main[0] <= address <= main[1]]
    return _count(body(main)), _count(rest)


def _count(opcodes: Sequence[str]) -> Count:
    instructions = matrix = scalar = moved = loads = narrow = 0
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        # Padding behind the end of a kernel is never issued.
        if name == "NOP":
            continue
        instructions += 1
        if name == "HMMA":
            # "16816" is 16 x 8 x 16.
            matrix += 16 * 8 * int(modifiers[0][3:])
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


def _width(modifiers: Sequence[str]) -> int:
    """Bytes that one thread moves."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[name] for name in modifiers if name in widths), 4)
