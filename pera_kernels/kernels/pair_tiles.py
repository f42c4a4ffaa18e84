"""The circular order on chip: which rows of a factor a lane multiplies, its coefficient, its φ.

Lane ``k`` of the expanded rank stands in circular order (see ``pera_kernels.terms``): ``R`` linear
lanes, then ``R`` lanes for each circular offset. The two rows of a pair follow from ``k`` by
arithmetic, so that no kernel reads an index table.
"""

import triton
import triton.language as tl


@triton.jit
def pair_lanes(offs_k, R: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr):
    """Lane k -> (i, j, is_pair, live): φ[k] = f_i, or f_i ∘ f_j where is_pair, or 0 unless live.

    Blocks of pairs start with the circular offset FIRST; there are none if K is R.
    """
    live = offs_k < K
    if K == R:
        i = offs_k
        j = i
        is_pair = offs_k < 0
    else:
        block = offs_k // R
        i = offs_k % R
        is_pair = (block > 0) & live
        j = (i + FIRST + tl.maximum(block - 1, 0)) % R
    return i, j, is_pair, live


@triton.jit
def coefficient_index(i, j, R: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr):
    """Where the coefficient of the pair {i, j} stands in h, in the public order (row-major upper
    triangular).
    """
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    if FIRST == 0 and K == 2 * R:
        # Squares only.
        index = low
    else:
        index = low * (2 * R - 1 - 2 * FIRST - low) // 2 + high - FIRST
    return index


@triton.jit
def load_coefficients(h_ptr, i, j, is_pair, R: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr):
    """c in float32: one on linear lanes, h on pair lanes."""
    index = coefficient_index(i, j, R, K, FIRST)
    return tl.load(h_ptr + index, mask=is_pair, other=1.0).to(tl.float32)


@triton.jit
def load_phi(f_ptr, i, j, is_pair, offs, stride_f_r, stride_f_n, mask, HAS_PAIRS: tl.constexpr):
    """A tile of φ(f), zero outside the mask; the shapes of i and offs broadcast. Products are
    float32, single rows come as they are.
    """
    phi = tl.load(f_ptr + (i * stride_f_r + offs * stride_f_n), mask=mask, other=0.0)
    if HAS_PAIRS:
        partner = tl.load(
            f_ptr + (j * stride_f_r + offs * stride_f_n), mask=mask & is_pair, other=1.0
        )
        phi = phi.to(tl.float32) * partner.to(tl.float32)
    return phi
