"""Sums of partial results, in a fixed order: splits without atomics."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import blocks, launch
from .tile_math import round_to

__all__ = ["Sum", "sum_partials"]


@triton.jit
def sum_tile(
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
    """A block of out = Σ_p partial[p], in float32 and in a fixed order. partial is contiguous
    (parts, numel); the rows of out, of ``width`` elements, lie ``stride_out`` apart.
    """
    offs = block.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs < numel
    acc = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        partial = tl.load(
            partial_ptr + offs_p[:, None] * numel + offs[None, :],
            mask=(offs_p < parts)[:, None] & mask[None, :],
            other=0.0,
        )
        acc += tl.sum(partial.to(tl.float32), axis=0)
    at = offs // width * stride_out + offs % width
    tl.store(out_ptr + at, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(
    partial_0_ptr,
    out_0_ptr,
    parts_0,
    numel_0,
    width_0,
    stride_out_0,
    partial_1_ptr,
    out_1_ptr,
    parts_1,
    numel_1,
    width_1,
    stride_out_1,
    partial_2_ptr,
    out_2_ptr,
    parts_2,
    numel_2,
    width_2,
    stride_out_2,
    JOBS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Up to three independent sums of partial results in one launch; see ``sum_tile``."""
    block = tl.program_id(0)
    job = tl.program_id(1)
    if job == 0:
        if block < tl.cdiv(numel_0, BLOCK_S):
            sum_tile(
                block,
                partial_0_ptr,
                out_0_ptr,
                parts_0,
                numel_0,
                width_0,
                stride_out_0,
                BLOCK_P,
                BLOCK_S,
            )
    if JOBS > 1:
        if job == 1:
            if block < tl.cdiv(numel_1, BLOCK_S):
                sum_tile(
                    block,
                    partial_1_ptr,
                    out_1_ptr,
                    parts_1,
                    numel_1,
                    width_1,
                    stride_out_1,
                    BLOCK_P,
                    BLOCK_S,
                )
    if JOBS > 2:
        if job == 2:
            if block < tl.cdiv(numel_2, BLOCK_S):
                sum_tile(
                    block,
                    partial_2_ptr,
                    out_2_ptr,
                    parts_2,
                    numel_2,
                    width_2,
                    stride_out_2,
                    BLOCK_P,
                    BLOCK_S,
                )


SUM_BLOCKS = {"BLOCK_P": 16, "BLOCK_S": 128}
SUMS = 3


@dataclass(frozen=True)
class Sum:
    """A pending out = partial.sum(0): partial ``(parts, ...)`` float32, out of rows ``width``."""

    partial: torch.Tensor
    out: torch.Tensor
    width: int
    stride: int

    @property
    def numel(self) -> int:
        return self.partial.stride(0)


def sum_arguments(suffix: str, job: Sum | None) -> dict[str, object]:
    return {
        f"partial{suffix}_ptr": None if job is None else job.partial,
        f"out{suffix}_ptr": None if job is None else job.out,
        f"parts{suffix}": None if job is None else job.partial.shape[0],
        f"numel{suffix}": None if job is None else job.numel,
        f"width{suffix}": None if job is None else job.width,
        f"stride_out{suffix}": None if job is None else job.stride,
    }


def sum_partials(sums: Sequence[Sum]) -> None:
    """Every sum in a fixed order, three in a launch."""
    for start in range(0, len(sums), SUMS):
        some = sums[start : start + SUMS]
        arguments: dict[str, object] = {}
        for number, job in itertools.zip_longest(range(SUMS), some):
            arguments |= sum_arguments(f"_{number}", job)
        launch(
            sum_partials_kernel,
            (max(blocks(job.numel, SUM_BLOCKS["BLOCK_S"]) for job in some), len(some)),
            **arguments,
            JOBS=len(some),
            **SUM_BLOCKS,
        )
