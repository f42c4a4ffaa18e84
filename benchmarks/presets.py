"""Which cases a preset times: grids, one after the other, the most important first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pera_kernels.terms import TERMS
from pera_kernels.verify.numerics import Case

from .results import DTYPES
from .timing import PHASES

__all__ = ["AXES", "DEFAULT", "PRESETS", "Grid", "Planned", "Preset", "plan"]

# torch.compile takes about ten seconds for every case: some grids do without.
COMPILED = ("reference-compiled",)


@dataclass(frozen=True)
class Grid:
    """All combinations of these; ``shapes`` are (in, out) features, ``without`` left-out names."""

    T: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...] = (16,)
    terms: tuple[str, ...] = ("full",)
    dropout: tuple[float, ...] = (0.0,)
    phases: tuple[str, ...] = PHASES
    without: tuple[str, ...] = ()


AXES = ("T", "shapes", "dtypes", "ranks", "terms", "dropout", "phases")


@dataclass(frozen=True)
class Preset:
    """Grids by the type of device, how often everybody has a turn, and a limit in seconds."""

    grids: Mapping[str, tuple[Grid, ...]]
    rounds: int
    budget: int | None = None


@dataclass(frozen=True)
class Planned:
    """One case, which of its phases are timed, and whom the preset leaves out."""

    case: Case
    phases: tuple[str, ...]
    without: tuple[str, ...]


_SQUARE = ((4096, 4096),)
_BF16 = ("bfloat16",)

_GPU_TARGETS = (
    Grid((4096, 16384, 512, 64), _SQUARE, _BF16),
    Grid((1, 16), _SQUARE, _BF16, without=COMPILED),
    Grid((16384,), _SQUARE, _BF16, terms=("square",), phases=("forward", "both")),
    Grid((16384,), _SQUARE, _BF16, ranks=(32,), phases=("forward", "both")),
)
_GPU_SPREAD = tuple(
    Grid(T, shapes, dtypes, ranks, terms, dropout, ("both",), COMPILED)
    for T, shapes, dtypes, ranks, terms, dropout in (
        ((2048,), ((4096, 14336), (14336, 4096)), _BF16, (16,), ("full",), (0.0,)),
        ((4096,), _SQUARE, _BF16, (4, 8, 64), ("full",), (0.0,)),
        ((4096,), _SQUARE, ("bfloat16+float32",), (16,), ("full",), (0.0,)),
        ((4096,), _SQUARE, _BF16, (16,), ("full",), (0.05,)),
        ((4096,), _SQUARE, _BF16, (16,), ("linear", "cross"), (0.0,)),
        ((512,), _SQUARE, ("float32",), (16,), ("full",), (0.0,)),
        ((4096,), ((8192, 8192),), _BF16, (16,), ("full",), (0.0,)),
    )
)
_CPU_TARGETS = Grid(
    T=(64, 1, 512, 2048),
    shapes=((1024, 1024), (2048, 2048)),
    dtypes=("float32", "bfloat16"),
    ranks=(16, 8, 32),
    phases=("both", "eval"),
)
_EVERYTHING = Grid(
    T=(1, 16, 64, 512, 2048, 4096, 16384, 65536),
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)),
    dtypes=("bfloat16", "float32", "float16", "bfloat16+float32"),
    ranks=(16, 8, 32, 4, 64),
    terms=TERMS,
    dropout=(0.0, 0.05),
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        {
            "cpu": (
                Grid((64,), ((512, 512),), ("float32", "bfloat16")),
                Grid((1, 512), ((512, 512),), ("float32",), without=COMPILED),
                Grid((64,), ((512, 512),), ("float32",), ranks=(4, 32), without=COMPILED),
            ),
            "cuda": (Grid((512,), _SQUARE, _BF16),),
        },
        rounds=10,
        budget=110,
    ),
    "gpu": Preset({"cuda": (*_GPU_TARGETS, *_GPU_SPREAD)}, rounds=20, budget=345),
    "targets": Preset({"cpu": (_CPU_TARGETS,), "cuda": _GPU_TARGETS}, rounds=20),
    "grid": Preset({"cpu": (_EVERYTHING,), "cuda": (_EVERYTHING,)}, rounds=20),
}
DEFAULT = {"cpu": "quick", "cuda": "gpu"}


def plan(grids: Iterable[Grid], asked: Mapping[str, Any]) -> list[Planned]:
    """The cases of the grids, each once, with the axes of ``asked`` in place of their own."""
    planned: dict[Case, Planned] = {}
    for grid in grids:
        grid = replace(grid, **asked)
        for case in _cases(grid):
            planned.setdefault(case, Planned(case, grid.phases, grid.without))
    return list(planned.values())


def _cases(grid: Grid) -> Iterable[Case]:
    axes = (grid.terms, grid.dropout, grid.ranks, grid.dtypes, grid.shapes, grid.T)
    for terms, dropout, r, dtype, (n, m), T in itertools.product(*axes):
        yield Case(
            terms=terms,  # type: ignore[arg-type]
            r=r,
            T=T,
            N=n,
            M=m,
            dtype=DTYPES[dtype][0],
            adapter_dtype=DTYPES[dtype][1],
            dropout_p=dropout,
            scale=1.0,
        )
