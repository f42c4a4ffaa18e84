"""Arithmetic on tiles: products, rounding, sums into rows, and the bits of the dropout mask."""

import triton
import triton.language as tl

from ..dropout import MULTIPLY_1, MULTIPLY_2, ROW_STEP
from . import interpreting

_MULTIPLY_1 = tl.constexpr(MULTIPLY_1)
_MULTIPLY_2 = tl.constexpr(MULTIPLY_2)
_ROW_STEP = tl.constexpr(ROW_STEP)
_INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter takes bfloat16 for integers: it gets exact float32
    copies.
    """
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 rounded to nearest even in ``dtype``. The interpreter would truncate to bfloat16."""
    if _INTERPRETING and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def select_rows(rows, lanes, keep, x, acc):
    """acc[r] + Σ_k [rows[r] = lanes[k] and keep[k]] x[k], in float32, on the matrix units.

    x is the exact sum of three bfloat16 tiles and the 0/1 matrix is exact, so nothing is rounded
    but the float32 sums.
    """
    select = ((rows[:, None] == lanes[None, :]) & keep[None, :]).to(tl.float32).to(tl.bfloat16)
    for _ in tl.static_range(3):
        part = round_to(x, tl.bfloat16)
        acc = dot(select, part, acc, "ieee")
        x -= part.to(tl.float32)
    return acc


@triton.jit
def zero_tiles(PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of float32 accumulators: together they hold more columns than a power of two."""
    tiles = ()
    for _ in tl.static_range(PIECES):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles


@triton.jit
def overflow_as(x, dtype: tl.constexpr):
    """A float32 tile with infinities where ``dtype`` would overflow, else unrounded."""
    if dtype == tl.float16:
        rounded = round_to(x, tl.float16).to(tl.float32)
        x = tl.where(tl.abs(rounded) == float("inf"), rounded, x)
    return x


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MULTIPLY_1
    x = (x ^ (x >> 15)) * _MULTIPLY_2
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_ptr, offs_t):
    """The two key words of each row of the dropout mask, uint32; offs_t is int64."""
    seed = tl.load(seed_ptr)
    low = offs_t.to(tl.uint32)
    high = (offs_t >> 32).to(tl.uint32)
    key_0 = _mix(_mix(low ^ seed.to(tl.uint32)) + high)
    key_1 = _mix(_mix(low * _ROW_STEP + (seed >> 32).to(tl.uint32)) ^ key_0)
    return key_0, key_1


@triton.jit
def keep_tile(key_0, key_1, start, threshold, BLOCK_N: tl.constexpr):
    """Which elements of the columns from ``start`` (even) on survive dropout: the bits of
    ``pera_kernels.dropout.keep_mask``. Two neighbours share a hash.
    """
    pair = start // 2 + tl.arange(0, BLOCK_N // 2)
    x = pair.to(tl.uint32)[None, :] ^ key_0[:, None]
    x = ((x ^ (x >> 16)) * _MULTIPLY_1) ^ key_1[:, None]
    x = (x ^ (x >> 15)) * _MULTIPLY_2
    x = x ^ (x >> 16)
    lots = tl.interleave(x & 0xFFFF, x >> 16)
    return lots.to(tl.int32) >= threshold
