"""Sums of partial results, in a fixed order: splits without atomics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import blocks, launch
from .tile_math import round_to

__all__ = ["Sum", "sum_partials"]

# Elements of partial results that a program reads at once, and of how many results at most.
ELEMENTS, MOST_PARTS = 2048, 64


@triton.jit
def _sum_tile(
    block,
    partial_ptr,
    out_ptr,
    parts,
    numel,
    width,
    stride_out,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A block of out = Σ_p partial[p], in float32 and in a fixed order, if it has so many: what is
    left of ``block`` behind them. partial is contiguous (parts, numel); the rows of out, of
    ``width`` elements, lie ``stride_out`` apart.
    """
    count = tl.cdiv(numel, BLOCK_S)
    if (block >= 0) & (block < count):
        offs = block.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = offs < numel
        acc = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
        for start in range(0, parts, BLOCK_P):
            offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
            acc += tl.load(
                partial_ptr + offs_p[:, None] * numel + offs[None, :],
                mask=(offs_p < parts)[:, None] & mask[None, :],
                other=0.0,
            )
        at = offs // width * stride_out + offs % width
        total = round_to(tl.sum(acc, axis=0), out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, total, mask=mask)
    return block - count


@triton.jit
def sum_tiles(block, sums, SUM_BLOCKS: tl.constexpr):
    """The block of that number, counted through all blocks of all sums."""
    for number in tl.static_range(len(sums)):
        # Triton 3.4 unpacks no tuple of constants.
        block = _sum_tile(block, *sums[number], SUM_BLOCKS[number][0], SUM_BLOCKS[number][1])


@triton.jit
def sum_partials_kernel(sums, SUM_BLOCKS: tl.constexpr):
    """Independent sums of partial results in one launch; see ``_sum_tile``."""
    sum_tiles(tl.program_id(0), sums, SUM_BLOCKS)


@dataclass(frozen=True)
class Sum:
    """A pending out = partial.sum(0): partial ``(parts, ...)`` float32, out of rows ``width``."""

    partial: torch.Tensor
    out: torch.Tensor
    width: int
    stride: int


def sum_arguments(sums: Sequence[Sum]) -> tuple[int, dict[str, object]]:
    """How many blocks the sums have, and what a kernel with :func:`sum_tiles` is told of them."""
    count, jobs, sum_blocks = 0, [], []
    for own in sums:
        parts, numel = own.partial.shape[0], own.partial.stride(0)
        block_p = min(1 << (parts - 1).bit_length(), MOST_PARTS)
        block_s = ELEMENTS // block_p
        count += blocks(numel, block_s)
        jobs.append((own.partial, own.out, parts, numel, own.width, own.stride))
        sum_blocks.append((block_p, block_s))
    return count, {"sums": tuple(jobs), "SUM_BLOCKS": tuple(sum_blocks)}


def sum_partials(sums: Sequence[Sum]) -> None:
    """Every sum in a fixed order, in one launch."""
    if sums:
        count, arguments = sum_arguments(sums)
        launch(sum_partials_kernel, (count,), **arguments)
