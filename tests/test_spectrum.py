"""Spectra and shares of an update from its factors, against the update written out."""

import math

import pytest
import torch

import pera_kernels as pk
from pera_kernels.adapters import spectrum
from pera_kernels.terms import TERMS, coefficient_count, pairs

# (M, N), of which some are smaller than K.
SHAPES = ((40, 50), (9, 60), (50, 7))


def problem(terms, shape=SHAPES[0], r=4):
    """lora_A, lora_B, and ΔW in float64."""
    (M, N), count = shape, coefficient_count(r, terms)
    A, B = torch.randn(r, N).double(), torch.randn(M, r).double()
    h = None if terms == "linear" else torch.randn(count).double()
    delta = pk.reference.delta_weight(A, B, h, scale=0.3, terms=terms)
    return *pk.expand_factors(A, B, h, scale=0.3, terms=terms), delta


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(terms, shape):
    lora_A, lora_B, delta = problem(terms, shape)
    sigma = spectrum.singular_values(lora_A, lora_B)
    expected = torch.linalg.svdvals(delta)
    assert len(sigma) == min(*shape, len(lora_A))
    torch.testing.assert_close(sigma, expected[: len(sigma)], rtol=1e-11, atol=1e-12)
    assert spectrum.numerical_rank(sigma, *shape) == torch.linalg.matrix_rank(delta)
    for rank in (1, 4, 8, 100):
        left = expected[rank:].square().sum().sqrt() / delta.norm()
        assert spectrum.error_of_rank(sigma, rank) == pytest.approx(float(left), abs=1e-13)
        share = float(expected[:rank].square().sum() / delta.square().sum())
        assert spectrum.top_energy(sigma, rank) == pytest.approx(share, rel=1e-12)
    assert spectrum.error_of_rank(sigma, len(sigma)) == 0.0


def test_the_update_is_never_formed():
    """200,000 x 200,000 would take 320 GB."""
    A, B = torch.randn(2, 200_000), torch.randn(200_000, 2)
    lora_A, lora_B = pk.expand_factors(A, B, torch.randn(3))
    sigma = spectrum.singular_values(lora_A, lora_B)
    norm = spectrum.part_norms(lora_A, lora_B, 2, "full")["products"]
    assert len(sigma) == 5 and sigma.norm() > 0.0 and norm > 0.0


@pytest.mark.parametrize("terms", TERMS)
def test_parts_and_terms(terms):
    r, of_pairs = 4, pairs(4, terms)
    lora_A, lora_B, _ = problem(terms, r=r)
    one_by_one = [torch.outer(b, a) for b, a in zip(lora_B.T, lora_A, strict=True)]
    norms = spectrum.term_norms(lora_A, lora_B)
    torch.testing.assert_close(norms, torch.stack([own.norm() for own in one_by_one]))
    members = {
        "linear": one_by_one[:r],
        "square": [own for own, (i, j) in zip(one_by_one[r:], of_pairs, strict=True) if i == j],
        "cross": [own for own, (i, j) in zip(one_by_one[r:], of_pairs, strict=True) if i != j],
        "products": one_by_one[r:],
    }
    for part, norm in spectrum.part_norms(lora_A, lora_B, r, terms).items():
        expected = float(sum(members[part]).norm()) if members[part] else None
        assert norm == (pytest.approx(expected, rel=1e-12) if expected else None), part


def test_the_effective_rank():
    assert spectrum.effective_rank(torch.full((7,), 0.1)) == pytest.approx(7.0)
    assert spectrum.effective_rank(torch.tensor([3.0, 0.0, 0.0])) == 1.0
    assert spectrum.effective_rank(torch.zeros(4)) == 0.0
    # Independent entries: M N / (M + N), for large matrices.
    sigma = torch.linalg.svdvals(torch.randn(200, 300))
    assert spectrum.effective_rank(sigma) == pytest.approx(120, rel=0.02)
    # Values whose squares float32 has not.
    assert spectrum.effective_rank(torch.full((5,), 1e-25)) == pytest.approx(5.0)


def test_the_numerical_rank():
    sigma = torch.tensor([2.0, 1e-10, 1e-14, 1e-17]).double()
    assert spectrum.numerical_rank(sigma, 10, 10) == 3
    assert spectrum.numerical_rank(sigma, 1000, 10) == 2
    assert spectrum.numerical_rank(torch.zeros(3).double(), 4, 3) == 0


@pytest.mark.parametrize("power", [-0.5, -1.0])
def test_the_slope_of_a_power_law(power):
    sigma = 3.0 * torch.arange(1, 101, dtype=torch.float64) ** power
    # The end of a spectrum, here cut off, does not count.
    sigma[30:] = 1e-3 * sigma[30:]
    assert spectrum.log_slope(sigma) == pytest.approx(power)
    assert spectrum.log_slope(sigma[:5]) == pytest.approx(power)
    assert math.isnan(spectrum.log_slope(sigma[:1]))
    assert math.isnan(spectrum.log_slope(torch.zeros(9)))


def test_how_many_carry_a_share():
    norms = torch.tensor([1.0, 3.0, 0.0, 2.0])
    for share, count in ((0.6, 1), (0.65, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert spectrum.carried_by(norms, share) == count
    assert spectrum.carried_by(torch.zeros(3), 0.9) == 0
    assert spectrum.carried_by(torch.zeros(0), 0.9) == 0


@pytest.mark.parametrize("terms", TERMS)
def test_the_interaction_matrix(terms):
    r = 3
    lora_A, lora_B, _ = problem(terms, r=r)
    norms = spectrum.term_norms(lora_A, lora_B)
    matrix = spectrum.interaction(norms, r, terms)
    assert torch.equal(matrix, matrix.T)
    order = norms[:r].argsort(descending=True).tolist()
    of_pairs = dict(zip(pairs(r, terms), norms[r:].tolist(), strict=True))
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            assert matrix[row, column] == of_pairs.get((min(i, j), max(i, j)), 0.0)


def test_the_interaction_matrix_does_not_depend_on_the_order_of_directions():
    A, B, h = torch.randn(4, 30), torch.randn(20, 4), torch.randn(10)
    other = torch.tensor([2, 0, 3, 1])
    moved = torch.tensor([pairs(4).index(tuple(sorted(other[list(p)].tolist()))) for p in pairs(4)])
    both = [
        spectrum.interaction(spectrum.term_norms(*pk.expand_factors(*own)), 4, "full")
        for own in ((A, B, h), (A[other], B[:, other], h[moved]))
    ]
    torch.testing.assert_close(*both)


def test_what_is_not_finite_is_nan():
    lora_A, lora_B, _ = problem("full")
    lora_A[0, 0] = torch.inf
    sigma = spectrum.singular_values(lora_A, lora_B)
    assert sigma.isnan().all()
    assert math.isnan(spectrum.effective_rank(sigma))
    assert math.isnan(spectrum.error_of_rank(sigma, 2))


@pytest.mark.parametrize("terms", TERMS)
def test_nothing_depends_on_the_default_device(terms):
    lora_A, lora_B, _ = problem(terms)

    def numbers():
        sigma = spectrum.singular_values(lora_A, lora_B)
        norms = spectrum.term_norms(lora_A, lora_B)
        return (
            spectrum.part_norms(lora_A, lora_B, 4, terms),
            spectrum.interaction(norms, 4, terms).tolist(),
            spectrum.log_slope(sigma),
        )

    expected = numbers()
    with torch.device("meta"):
        assert numbers() == expected
