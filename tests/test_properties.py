"""What holds for every input: random shapes, dtypes, strides, scales and special values.

A failing example is printed as a ``Problem``: ``check_rule(Problem(...))`` runs it again. The slow
ones (``pytest -m slow tests/test_properties.py``) try many thousand fresh problems.
"""

from dataclasses import replace

import pytest
import torch

import pera_kernels as pk
from pera_kernels.terms import TERMS, pairs

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.random_problems import (  # noqa: E402
    BF16,
    F16,
    F32,
    F64,
    Problem,
    check_rule,
    check_spread,
    evaluate,
    make_inputs,
    problems,
    same_bits,
)

# The same problems each time, so that a change is judged by what it changes.
FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FRESH = settings(FIXED, derandomize=False, print_blob=True)
NOT_FINITE = {"special": "not finite", "decades": 1}


def counts(few, many):
    """Run a test on a few fixed problems, and as a slow test on many fresh ones."""
    slow = pytest.param(FRESH, many, id=str(many), marks=pytest.mark.slow)
    return pytest.mark.parametrize("profile, count", [pytest.param(FIXED, few, id=str(few)), slow])


def for_random_problems(check, profile, count, backend, **options):
    if backend == "triton":
        options |= {"most": 9, "most_rank": 6}

    @settings(profile, max_examples=count)
    @given(problems(backend, **options))
    def run(problem):
        check(problem, backend)

    run()


@counts(120, 24_000)
def test_torch_follows_the_numeric_rule(profile, count):
    """Output and gradients, whatever the call: see ``check_rule``."""
    for_random_problems(check_rule, profile, count, "torch")


@counts(120, 8_000)
def test_torch_hides_and_spreads_no_infinity(profile, count):
    """What is not finite shows where it belongs: see ``check_spread``."""
    for_random_problems(check_spread, profile, count, "torch", **NOT_FINITE)


@counts(12, 300)
def test_triton_follows_the_numeric_rule(profile, count, triton_backend):
    """The kernels on the same problems, small ones."""
    for_random_problems(check_rule, profile, count, triton_backend)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@counts(12, 300)
def test_triton_hides_no_infinity(profile, count, triton_backend):
    """As for the torch backend, with the spread that ``check_spread`` states."""
    for_random_problems(check_spread, profile, count, triton_backend, **NOT_FINITE)


@st.composite
def plain_problems(draw, dtypes=(F32, F64), **fixed):
    dtype = draw(st.sampled_from(dtypes))
    # A scale is zero or keeps everything normal: subnormal numbers round to a fixed distance.
    scale = st.just(0.0) | st.floats(1e-6, 30.0) | st.floats(-30.0, -1e-6)
    return Problem(
        terms=fixed.get("terms") or draw(st.sampled_from(TERMS)),
        r=draw(st.integers(1, 12)),
        batch=(draw(st.integers(0, 24)),),
        N=draw(st.integers(1, 40)),
        M=draw(st.integers(1, 40)),
        dtype=dtype,
        factor_dtype=dtype,
        h_dtype=dtype,
        scale=draw(scale),
        plan=draw(st.sampled_from(["auto", "factored"])),
        seed=draw(st.integers(0, 2**20)),
    )


def magnitudes(p, inputs):
    """The sum of the absolute values of all terms of each output and gradient: every coefficient
    of these polynomials is positive.
    """
    positive = {n: None if t is None else t.double().abs() for n, t in inputs.items()}
    return evaluate(replace(p, scale=abs(p.scale)), positive, "reference", exact=True)


def assert_within(got, expected, magnitude, p):
    """Equal up to one rounding per operation that any summand passes."""
    depth = p.T + p.N + p.M + 2 * p.K + 16
    info = torch.finfo(p.dtype)
    # The second part is the distance of subnormal numbers, which float16 soon reaches.
    allowed = info.eps * depth * (magnitude + info.smallest_normal)
    error = (got.double() - expected.double()).abs()
    assert (error <= allowed).all(), f"{p}\n{float((error / allowed).max())} times what rounding is"


@settings(FIXED, max_examples=50)
@given(plain_problems())
def test_without_coefficients_it_is_lora(p):
    """With h = 0 everything is that of terms="linear"."""
    p = replace(p, special=(("h", 0.0, 0),))
    inputs = make_inputs(p)
    got = evaluate(p, inputs, "torch")
    lora = {**inputs, "h": None}
    expected = evaluate(replace(p, terms="linear"), lora, "torch")
    for name, magnitude in magnitudes(p, inputs).items():
        if name != "dh":
            assert_within(got[name], expected[name], magnitude, p)


@settings(FIXED, max_examples=50)
@given(plain_problems(terms="full"))
def test_square_and_cross_add_up_to_full(p):
    """full - linear = (square - linear) + (cross - linear), each with its share of h."""
    inputs = make_inputs(p)
    A, B, h = (inputs[name] for name in ("A", "B", "h"))
    kept = pairs(p.r, "full")
    part = {
        "full": h,
        "square": h[[n for n, (i, j) in enumerate(kept) if i == j]],
        "cross": h[[n for n, (i, j) in enumerate(kept) if i < j]],
        "linear": None,
    }
    dW = {
        terms: pk.delta_weight(A, B, own, scale=p.scale, terms=terms, backend="torch").double()
        for terms, own in part.items()
    }
    quadratic = dW["square"] + dW["cross"] - 2 * dW["linear"]
    positive = (t.double().abs() for t in (A, B, h))
    magnitude = 3 * pk.delta_weight(*positive, scale=abs(p.scale), backend="reference")
    assert_within(dW["full"] - dW["linear"], quadratic, magnitude, p)


@settings(FIXED, max_examples=50)
@given(plain_problems(), st.randoms(use_true_random=False))
def test_order_of_the_rank_does_not_matter(p, generator):
    """Permuting the rows of A, the columns of B and the pairs of h permutes the gradients."""
    order = list(range(p.r))
    generator.shuffle(order)
    place = {pair: n for n, pair in enumerate(pairs(p.r, p.terms))}
    permuted = [
        place[min(order[i], order[j]), max(order[i], order[j])] for i, j in pairs(p.r, p.terms)
    ]
    inputs = make_inputs(p)
    h = inputs["h"]
    changed = {
        **inputs,
        "A": inputs["A"][order],
        "B": inputs["B"][:, order],
        "h": None if h is None else h[permuted],
    }
    got, expected = evaluate(p, changed, "torch"), evaluate(p, inputs, "torch")
    magnitude = magnitudes(p, inputs)
    index = {"dA": order, "dB": (slice(None), order), "dh": permuted}
    for name, t in got.items():
        at = index.get(name, slice(None))
        assert_within(t, expected[name][at], magnitude[name][at], p)


@settings(FIXED, max_examples=50)
@given(plain_problems((F32, F64, BF16)), st.data())
def test_scaling_a_column_against_its_row_changes_nothing(p, data):
    """b_i α and a_i / α: bit for bit with powers of two, else up to rounding."""
    exact = data.draw(st.booleans())
    power = st.integers(-6, 6).map(lambda n: 2.0**n)
    alpha = data.draw(
        st.lists(power if exact else st.floats(0.1, 10.0), min_size=p.r, max_size=p.r)
    )
    alpha = torch.tensor(alpha, dtype=F64)
    inputs = make_inputs(p)
    changed = {
        **inputs,
        "A": (inputs["A"].double() / alpha[:, None]).to(p.dtype),
        "B": (inputs["B"].double() * alpha).to(p.dtype),
    }
    got, expected = evaluate(p, changed, "torch"), evaluate(p, inputs, "torch")
    magnitude = magnitudes(p, inputs)
    back = {"dA": 1 / alpha[:, None], "dB": alpha}
    for name, t in got.items():
        t = t.double() * back.get(name, 1.0)
        if exact:
            assert torch.equal(t, expected[name].double()), f"{p}\n{name}"
        assert_within(t, expected[name], magnitude[name], p)


@settings(FIXED, max_examples=50)
@given(plain_problems((F32, F64, BF16, F16)))
def test_merging_equals_applying(p):
    """A merged layer gives what the adapted one gave, and unmerging restores the weight's bits."""
    p = replace(p, scale=min(p.scale, 2.0, key=abs) or 1.0, needs=())
    inputs = make_inputs(p)
    layer = pk.PeraLinear(p.N, p.M, p.r, alpha=p.r * abs(p.scale), terms=p.terms, dtype=p.dtype)
    p = replace(p, scale=layer.scale)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(layer, name).copy_(inputs[name])
        for name in "ABh":
            if (own := getattr(layer, f"pera_{name}")) is not None:
                own.copy_(inputs[name])
        weight, applied = layer.weight.clone(), layer(inputs["x"])
        layer.merge()
        merged = layer(inputs["x"])
        layer.unmerge()
    assert_within(merged, applied, magnitudes(p, inputs)["y"], p)
    assert same_bits(layer.weight, weight)


@settings(FIXED, max_examples=50)
@given(plain_problems((F32, F64, BF16, F16)))
def test_expanded_factors_reproduce_the_update(p):
    """lora_B @ lora_A is ΔW."""
    inputs = make_inputs(p)
    A, B, h = (inputs[name] for name in ("A", "B", "h"))
    options = {"scale": p.scale, "terms": p.terms}
    lora_A, lora_B = pk.expand_factors(A, B, h, **options)
    assert lora_A.shape == (p.K, p.N) and lora_B.shape == (p.M, p.K)
    positive = [None if t is None else t.double().abs() for t in (A, B, h)]
    options["scale"] = abs(p.scale)
    magnitude = pk.delta_weight(*positive, **options, backend="reference")
    expected = pk.delta_weight(A, B, h, scale=p.scale, terms=p.terms, backend="torch")
    assert_within(lora_B.double() @ lora_A.double(), expected, magnitude, p)
