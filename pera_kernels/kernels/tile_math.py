"""Arithmetic on tiles: products, rounding, columns of tiles, and the bits of the dropout mask."""

import triton
import triton.language as tl

from . import interpreting

# The interpreter takes bfloat16 for integers and truncates to it: there both have other bodies.
# Chosen here, because Triton looks at every global that a kernel uses at each of its launches.
if interpreting():

    @triton.jit
    def dot(a, b, acc, PRECISION: tl.constexpr):
        """acc + a b in float32, of exact float32 copies."""
        a = a.to(tl.float32)
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """float32 rounded to nearest even in ``dtype``."""
        if dtype == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        return x.to(dtype)

else:

    @triton.jit
    def dot(a, b, acc, PRECISION: tl.constexpr):
        """acc + a b in float32."""
        return tl.dot(a, b, acc, input_precision=PRECISION)

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """float32 rounded to nearest even in ``dtype``."""
        return x.to(dtype)


@triton.jit
def take_bfloat16(x):
    """The leading eight bits of float32 in bfloat16, and the rest: three times it is all of x."""
    part = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return part.to(tl.bfloat16), x - part


@triton.jit
def pick_columns(x, columns):
    """x[:, columns] in float32, exact: a sum of products of bfloat16 tiles with a 0/1 matrix.

    Zeros would spread what is not finite, which enters as large numbers whose sum overflows.
    """
    rows = tl.arange(0, x.shape[1])
    select = (rows[:, None] == columns[None, :]).to(tl.float32).to(tl.bfloat16)
    PARTS: tl.constexpr = 3 if x.dtype == tl.float32 else 2
    rest = x.to(tl.float32)
    finite = rest - rest == 0.0
    large = tl.full(x.shape, 3e38, tl.float32).to(tl.bfloat16)
    acc = tl.zeros((x.shape[0], columns.shape[0]), tl.float32)
    for _ in tl.static_range(PARTS):
        part, rest = take_bfloat16(rest)
        acc = dot(tl.where(finite, part, large), select, acc, "ieee")
    return acc


@triton.jit
def repeat_columns(x, COLUMNS: tl.constexpr):
    """x[:, k mod its width] in float32, for k < COLUMNS."""
    x = x.to(tl.float32)[:, None, :]
    return x.broadcast_to(x.shape[0], COLUMNS // x.shape[2], x.shape[2]).reshape(
        x.shape[0], COLUMNS
    )


@triton.jit
def sum_to_columns(x, columns, keep, acc):
    """acc[:, r] + Σ_k [columns[k] = r and keep[k]] x[:, k], in float32, on the matrix units.

    x is the exact sum of three bfloat16 tiles and the 0/1 matrix is exact, so nothing is rounded
    but the float32 sums.
    """
    rows = tl.arange(0, acc.shape[1])
    select = ((columns[:, None] == rows[None, :]) & keep[:, None]).to(tl.float32).to(tl.bfloat16)
    for _ in tl.static_range(3):
        part, x = take_bfloat16(x)
        acc = dot(part, select, acc, "ieee")
    return acc


@triton.jit
def sum_periods(x, acc):
    """acc[:, r] + Σ x[:, k] over the k that are r modulo the width of acc."""
    periods = x.reshape(x.shape[0], x.shape[1] // acc.shape[1], acc.shape[1])
    return acc + tl.sum(periods, axis=1)


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
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_ptr, offs_t):
    """The two key words of each row of the dropout mask, uint32; offs_t is int64."""
    seed = tl.load(seed_ptr)
    low = offs_t.to(tl.uint32)
    high = (offs_t >> 32).to(tl.uint32)
    key_0 = _mix(_mix(low ^ seed.to(tl.uint32)) + high)
    key_1 = _mix(_mix(low * 0x9E3779B9 + (seed >> 32).to(tl.uint32)) ^ key_0)
    return key_0, key_1


@triton.jit
def keep_tile(key_0, key_1, start, threshold, BLOCK_N: tl.constexpr):
    """Which elements of the columns from ``start`` (even) on survive dropout: the bits of
    ``pera_kernels.dropout.keep_mask``. Two neighbours share a hash.
    """
    pair = start // 2 + tl.arange(0, BLOCK_N // 2)
    x = pair.to(tl.uint32)[None, :] ^ key_0[:, None]
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ key_1[:, None]
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    lots = tl.interleave(x & 0xFFFF, x >> 16)
    return lots.to(tl.int32) >= threshold
