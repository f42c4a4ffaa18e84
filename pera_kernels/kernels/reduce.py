import triton
import triton.language as tl

from .common import round_to


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    out_ptr,
    parts,
    numel,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = Σ_p partial[p], over contiguous (parts, numel), in float32 and in a fixed order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        partial = tl.load(
            partial_ptr + offs_p[:, None] * numel + offs[None, :],
            mask=(offs_p < parts)[:, None] & mask[None, :],
            other=0.0,
        )
        acc += tl.sum(partial.to(tl.float32), axis=0)
    tl.store(out_ptr + offs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)
