"""Which tiles are tried for a kernel: a grid without what cannot fit, nearest the present first."""

from __future__ import annotations

import itertools
import math

from pera_kernels.configs import Tile

__all__ = ["candidates"]

AXES = ("block_t", "block_n", "block_k", "num_warps", "num_stages", "pieces")

_ONE = (1,)
_GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "expand": ((16,), (64, 128, 256, 512), (8, 16, 32), (2, 4, 8), _ONE, _ONE),
    "project": ((32, 64, 128), (32, 64, 128), (32, 64), (4, 8), (2, 3, 4), (1, 2, 3, 4, 5)),
    "accumulate": ((32, 64, 128), (32, 64, 128, 256), (16, 32, 64), (4, 8), (1, 2, 3, 4), _ONE),
    "contract": ((32, 64, 128), (32, 64, 128), (32, 64), (4, 8), (2, 3, 4), (1, 2, 3, 4, 5)),
    "compose": ((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), _ONE),
}
# float32 products run on the ordinary units: smaller blocks, fewer accumulators.
_SINGLE: dict[str, tuple[tuple[int, ...], ...]] = {
    "project": ((16, 32, 64), (16, 32, 64), (16, 32, 64), (4, 8), (1, 2, 3), (1, 2)),
    "accumulate": ((16, 32, 64, 128), (32, 64, 128), (16, 32), (4, 8), (1, 2, 3), _ONE),
    "contract": ((16, 32, 64), (16, 32, 64), (16, 32, 64), (4, 8), (1, 2, 3), (1, 2)),
    "compose": ((32, 64, 128), (32, 64, 128), (16, 32), (4, 8), (1, 2, 3), _ONE),
}
# A thread has 255 registers; the rest of a kernel needs some of them.
MOST_ACCUMULATORS = 160
FEWEST_ACCUMULATORS = 4
WARP = 32


def candidates(
    kernel: str,
    kind: str,
    present: Tile,
    shared_limit: int,
    count: int,
    *,
    num_stages: int | None = None,
) -> list[Tile]:
    """The present tile, then at most ``count`` others in the order of their distance from it;
    those of ``num_stages`` alone, where it is given.
    """
    name = kernel.removesuffix("_expanded")
    grid = _SINGLE.get(name, _GRIDS[name]) if kind == "single" else _GRIDS[name]
    size = 4 if kind == "single" else 2
    found = [
        tile
        for tile in (
            Tile(**dict(zip(AXES, values, strict=True))) for values in itertools.product(*grid)
        )
        if tile != present
        and num_stages in (None, tile.num_stages)
        and _fits(name, tile, size, shared_limit)
    ]
    found.sort(key=lambda tile: (_distance(tile, present), _values(tile)))
    return [present, *found[:count]]


def _values(tile: Tile) -> tuple[int, ...]:
    return tuple(getattr(tile, axis) for axis in AXES)


def _distance(a: Tile, b: Tile) -> float:
    """Doublings of blocks and warps, steps of the others."""
    steps = 0.0
    for axis, mine, theirs in zip(AXES, _values(a), _values(b), strict=True):
        counted = axis in ("num_stages", "pieces")
        steps += abs(mine - theirs) if counted else abs(math.log2(mine / theirs))
    return steps


def _fits(name: str, tile: Tile, size: int, shared_limit: int) -> bool:
    """Whether accumulators fit the registers, and the operands of all stages the shared memory."""
    if name == "expand":
        return True
    t, n, k = tile.block_t, tile.block_n, tile.block_k
    # (accumulators, what one stage of the pipeline loads)
    accumulators, staged = {
        "project": (t * k * tile.pieces, t * n),
        "accumulate": (t * n, t * k + k * n),
        "contract": (n * k * tile.pieces, t * n + t * k * tile.pieces),
        "compose": (t * n, t * k + k * n),
    }[name]
    per_thread = accumulators / (WARP * tile.num_warps)
    buffers = max(1, tile.num_stages - 1)
    return (
        FEWEST_ACCUMULATORS <= per_thread <= MOST_ACCUMULATORS
        and buffers * staged * size <= shared_limit
    )
