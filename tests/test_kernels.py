"""What the launchers do beside the formula: splits, stacks, strides, rounding, precision."""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch

from pera_kernels import testing, torch_backend
from pera_kernels.kernels import tiles
from pera_kernels.operands import Base, Factors, Options
from pera_kernels.reference import coefficients, expand
from pera_kernels.terms import circular_order, lane_count, pairs
from pera_kernels.testing import Case


def circular(factor, h=None, terms="full"):
    """c ∘ φ of a factor in the kernels' order, by the reference, in float32."""
    r = factor.shape[0]
    order = torch.cat([torch.arange(r), circular_order(r, terms) + r]).to(factor.device)
    phi, c = expand(factor.float(), terms), coefficients(h, r)
    return (phi if c is None else phi * c.unsqueeze(1))[order]


def test_lanes_over_several_programs_of_several_accumulators(triton_backend, device, monkeypatch):
    """80 lanes as 32, 32 and 16: what a program starts at is not what it has in one accumulator."""
    tile = tiles.Tile(16, 16, 16, num_warps=4, num_stages=1, pieces=2)
    monkeypatch.setattr(tiles, "tile_for", lambda *arguments: tile)
    assert lane_count(11) == 80
    verdicts = testing.check(Case(r=11, T=17, N=40, M=40), triton_backend, device)
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [4, 5, pytest.param(16, marks=pytest.mark.slow)])
def test_what_is_not_finite_in_a_factor_stays_with_its_pairs(
    r, dtype, value, triton_backend, device
):
    """Zeros of a selecting product must not spread it: to other features, or other pairs' dh."""
    from pera_kernels.kernels.contract import Contraction, contract
    from pera_kernels.kernels.launch import Factor
    from pera_kernels.kernels.reduce import sum_partials

    left, x = torch.ones(9, lane_count(r), device=device), torch.ones(9, 20, device=device)
    rows, h = torch.ones(r, 20, device=device, dtype=dtype), torch.ones(r * (r + 1) // 2).to(device)
    rows[1, 3] = value
    df, dh = torch.empty(r, 20, device=device), torch.empty_like(h)
    job = Contraction(left, x, Factor(rows, h, r, "full"), df, dh, 1.0)
    sum_partials(contract([job]))
    assert dh.isfinite().tolist() == [1 not in pair for pair in pairs(r)]
    assert df.isfinite().all(0).tolist() == [n != 3 for n in range(20)]


@pytest.mark.parametrize(
    "r",
    [1, 2, 3, 5, 8, 9, 16, 32]
    + [pytest.param(r, marks=pytest.mark.slow) for r in (4, 6, 7, 12, 24, 33, 64, 70)],
)
def test_contraction_of_every_rank(r, triton_backend, device):
    """Ranks that divide a block of lanes, and those that do not."""
    verdicts = testing.check(Case(r=r, T=21, N=19, M=35), triton_backend, device)
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]


@pytest.mark.parametrize(
    "T, features, r, terms, programs",
    [
        (16384, (4096, 4096), 16, "full", 128),
        (16384, (4096, 4096), 16, "square", 128),
        (16384, (4096, 4096), 32, "full", 640),
        (16384, (1024,), 16, "full", 128),
        (512, (4096, 4096), 16, "full", 128),
        (1, (4096, 1024), 16, "full", 120),
    ],
)
def test_contractions_fill_whole_waves(T, features, r, terms, programs, triton_backend):
    from pera_kernels.kernels.contract import divide

    lanes, tile = lane_count(r, terms), tiles.Tile(64, 128, 64, 8, 4, 3)
    own = divide(tuple((T, N) for N in features), lanes, r, tile, 132)
    blocks_n = sum(-(-N // own.block_n) for N in features)
    assert blocks_n * -(-lanes // (own.pieces * own.block_k)) * own.splits == programs


def test_kernels_hash_with_the_constants_of_the_definition(triton_backend):
    """They are literals there: Triton looks at each global that a kernel uses at every launch."""
    import pera_kernels.kernels
    from pera_kernels import dropout
    from pera_kernels.kernels import tile_math

    literals = {
        int(literal, 16)
        for function in (tile_math._mix, tile_math.row_keys, tile_math.keep_tile)
        for literal in re.findall(r"0x[0-9A-F]{8}", inspect.getsource(function.fn))
    }
    assert literals == {dropout.MULTIPLY_1, dropout.MULTIPLY_2, dropout.ROW_STEP}
    for found in pkgutil.iter_modules(pera_kernels.kernels.__path__, "pera_kernels.kernels."):
        held = vars(importlib.import_module(found.name)).items()
        assert not [name for name, value in held if type(value).__name__ == "constexpr"]


def test_layers_that_share_a_split_projection(triton_backend, device, poison):
    """Three layers on one x that is split along its features: each has its own lanes of u."""
    from pera_kernels.kernels import ops
    from pera_kernels.kernels.launch import recorded

    x = torch.randn(5, 600, device=device)
    adapters = [
        Factors(torch.randn(2, 600, device=device), torch.randn(M, 2, device=device), None)
        for M in (7, 3, 40)
    ]
    # Members of other strides are brought to those of the first.
    adapters[1] = adapters[1]._replace(A=torch.randn(600, 2, device=device).t())
    bases = [Base(torch.randn(len(own.B), 600, device=device)) for own in adapters]
    arguments = (x, bases, adapters, None, Options("linear", scale=0.5))
    with recorded() as calls:
        ops.forward(*arguments)
    assert calls[0].arguments["u_ptr"].shape[0] > 1, "the projection was not split"
    for y, u, base, own in zip(*ops.forward(*arguments), bases, adapters, strict=True):
        expected = x @ own.A.t()
        torch.testing.assert_close(u[:, :2], expected, rtol=1e-4, atol=1e-4)
        assert not u[:, 2:].any()
        expected = x @ base.weight.t() + 0.5 * expected @ own.B.t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_sums_of_few_and_of_more_parts_than_a_block_has(triton_backend, device, poison):
    from pera_kernels.kernels.reduce import MOST_PARTS, Sum, sum_partials

    shapes = [(2 * MOST_PARTS + 5, 3, 50), (1, 7, 1), (3, 40, 90), (MOST_PARTS, 1, 33), (2, 5, 9)]
    partials = [torch.randn(shape, device=device) for shape in shapes]
    outs = [torch.empty(p.shape[1], 100, device=device)[:, : p.shape[2]] for p in partials]
    sum_partials([Sum(p, o, p.shape[2], 100) for p, o in zip(partials, outs, strict=True)])
    for partial, out in zip(partials, outs, strict=True):
        torch.testing.assert_close(out, partial.sum(0))


@pytest.mark.parametrize("terms", ["full", "linear"])
def test_many_factors_and_a_sum_in_one_launch(terms, triton_backend, device, poison):
    """Three B of their own widths with h, three A below each other, and what a split left."""
    from pera_kernels.kernels.expand import expand as expand_all
    from pera_kernels.kernels.launch import Factor, recorded
    from pera_kernels.kernels.reduce import Sum

    h = None if terms == "linear" else torch.randn(15, device=device)
    rows = [torch.randn(5, N, device=device) for N in (200, 1, 17, 33, 33, 33)]
    factors = [Factor(own, h, 5, terms) for own in rows[:3]]
    factors.append(Factor(rows[3], None, 5, terms, tuple(rows[4:])))
    partial, out = torch.randn(9, 4, 70, device=device), torch.empty(4, 70, device=device)
    pending = Sum(partial, out, 70, 70)
    with recorded() as calls:
        expand_all(factors, pending, dtype=torch.float32)
    assert len(calls) == 1
    *phis, stack = expand_all(factors, pending, dtype=torch.float32)
    for own, phi in zip(rows, [*phis, *stack.chunk(3)], strict=True):
        expected = circular(own, h if own.shape[1] != 33 else None, terms)
        torch.testing.assert_close(phi[: len(expected)], expected)
        assert not phi[len(expected) :].any()
    torch.testing.assert_close(out, partial.sum(0))


@pytest.mark.parametrize(
    "factor_dtype, dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_h", [False, True])
def test_an_expansion_is_rounded_once(with_h, factor_dtype, dtype, backend, device):
    """Factors and coefficient are multiplied in float32, then rounded: bit for bit."""
    factor = torch.randn(6, 50, device=device).to(factor_dtype)
    h = torch.randn(21, device=device) if with_h else None
    expected = circular(factor, h)
    if backend == "triton":
        from pera_kernels.kernels import expand as kernel
        from pera_kernels.kernels.launch import Factor

        (phi,) = kernel.expand([Factor(factor, h, 6, "full")], dtype=dtype)
        got = phi[: len(expected)]
        assert not phi[len(expected) :].any()
    else:
        phi = torch_backend.weigh(torch_backend.expand(factor, "full"), h).to(dtype)
        got = torch.cat([phi[:6], phi[6:][circular_order(6, "full", device)]])
    assert torch.equal(got, expected.to(dtype))


def test_factors_out_of_32_bits_are_copied(triton_backend):
    from pera_kernels.kernels.launch import addressable

    near = torch.empty_strided((2, 4), (2**30, 1), device="meta")
    far = torch.empty_strided((3, 4), (2**30, 1), device="meta")
    assert addressable(near) is near
    assert addressable(far).stride() == (4, 1)


@pytest.mark.parametrize("allowed, expected", [(False, "ieee"), (True, "tf32")])
def test_single_precision_is_exact_unless_torch_allows_tf32(allowed, expected, triton_backend):
    from pera_kernels.kernels.launch import dot_precision

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert dot_precision(torch.float32) == expected
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9"
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_newer_setting_of_tf32(precision, triton_backend):
    """PyTorch raises where one of the two is set and the other is read."""
    from pera_kernels.kernels.launch import dot_precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        assert dot_precision(torch.float32) == precision
    finally:
        matmul.fp32_precision = before
