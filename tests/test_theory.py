"""What the paper says of ranks (Eq. 6 to 11, Appendix A), tried on the reference in float64."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels.terms import TERMS, coefficient_count, pairs


def factors(r, M, N, terms="full", draw=torch.randn):
    """A, B and h of this terms; h has no zero."""
    A, B = draw(r, N, dtype=torch.float64), draw(M, r, dtype=torch.float64)
    h = None if terms == "linear" else torch.rand(coefficient_count(r, terms)).double() + 0.5
    return A, B, h


def signs(*shape, dtype):
    return torch.randint(2, shape).to(dtype) * 2 - 1


def zeros_and_ones(*shape, dtype):
    return torch.randint(2, shape).to(dtype)


def delta(A, B, h, terms="full"):
    return pk.reference.delta_weight(A, B, h, terms=terms)


def rank(matrix):
    return int(torch.linalg.matrix_rank(matrix))


def products(A, B, h, terms):
    """The part of ΔW that h multiplies."""
    return delta(A, B, h, terms) - B @ A


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 3, 5, 8])
def test_random_factors_reach_the_bound(r, terms):
    """Eq. 6 and 7: r for LoRA, 2r + r(r - 1)/2 for PERA, and what is between them."""
    K = {
        "linear": r,
        "square": 2 * r,
        "cross": r + r * (r - 1) // 2,
        "full": 2 * r + r * (r - 1) // 2,
    }[terms]
    assert K == pk.expanded_rank(r, terms)
    assert rank(delta(*factors(r, 61, 53, terms), terms)) == K


@pytest.mark.parametrize("r", [2, 5, 8])
def test_each_part_alone_reaches_its_bound(r):
    """Theorem 1's three parts: at most r, r and r(r - 1)/2."""
    assert rank(products(*factors(r, 61, 53, "square"), "square")) == r
    assert rank(products(*factors(r, 61, 53, "cross"), "cross")) == r * (r - 1) // 2


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", [(7, 40), (40, 9), (12, 12), (1, 6)])
def test_the_rank_is_that_of_the_smallest_size(shape, terms):
    """min(M, N, K)."""
    assert rank(delta(*factors(4, *shape, terms), terms)) == min(*shape, pk.expanded_rank(4, terms))


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, signs, zeros_and_ones])
@pytest.mark.parametrize("terms", TERMS)
def test_the_bound_is_never_passed(terms, draw):
    for r in (1, 2, 3, 6):
        A, B, h = factors(r, 50, 60, terms, draw)
        assert rank(delta(A, B, h, terms)) <= pk.expanded_rank(r, terms)


def test_the_bound_is_no_promise():
    """Where squares depend on each other or on the factors, the rank is lower."""
    r = 5
    # The square of a sign is 1: all squares are one and the same direction.
    assert rank(products(*factors(r, 50, 60, "square", signs), "square")) == 1
    assert rank(delta(*factors(r, 50, 60, "full", signs))) == r + 1 + r * (r - 1) // 2
    # The square of 0 or 1 is itself: squares add nothing to LoRA.
    A, B, h = factors(r, 50, 60, "square", zeros_and_ones)
    assert rank(delta(A, B, h, "square")) == r < pk.expanded_rank(r, "square")
    # Rows that do not overlap have no products.
    A, B, h = factors(r, 50, 60, "cross")
    A = A * torch.eye(r).repeat(1, 12)
    assert rank(delta(A, B, h, "cross")) == r


def test_every_coefficient_that_is_zero_costs_one_rank():
    A, B, h = factors(6, 61, 53)
    for zeros in (1, 4, 20):
        h[:zeros] = 0.0
        assert rank(delta(A, B, h)) == pk.expanded_rank(6) - zeros


def test_lora_is_h_of_zero():
    """Section 3.3.3; and with one kind of coefficients at zero, Eq. 10 and 11."""
    A, B, h = factors(4, 9, 11)
    assert torch.equal(delta(A, B, torch.zeros_like(h)), B @ A)
    square = torch.tensor([i == j for i, j in pairs(4)])
    for terms, kept in (("square", square), ("cross", ~square)):
        expected = delta(A, B, h[kept], terms)
        torch.testing.assert_close(delta(A, B, h * kept), expected, rtol=1e-14, atol=1e-14)


def test_a_pair_is_the_elementwise_product_of_two_rank_one_matrices():
    """(b_i∘b_j)(a_i∘a_j)ᵀ = (b_i a_iᵀ)∘(b_j a_jᵀ): ΔW is an elementwise quadratic form of P_k =
    b_k a_kᵀ, and the rank of each of its terms is 1.
    """
    A, B, h = factors(3, 9, 11)
    P = B.T.unsqueeze(2) * A.unsqueeze(1)
    terms = [c * P[i] * P[j] for c, (i, j) in zip(h, pairs(3), strict=True)]
    assert {rank(own) for own in (*P, *terms)} == {1}
    torch.testing.assert_close(delta(A, B, h), P.sum(0) + sum(terms), rtol=1e-13, atol=1e-13)


def test_a_layer_stays_linear_in_its_input():
    """The products are of weights. Of y no second derivative by x is left, for PERA as for LoRA:
    Eq. 12 (Figure 5) measures the model around the layer.
    """
    A, B, h = factors(3, 5, 6)

    def layer(x):
        return pk.reference.pera_linear(x, torch.zeros(5, 6).double(), A, B, h)[0]

    assert not torch.autograd.functional.hessian(layer, torch.randn(6).double()).any()


@pytest.mark.parametrize("r", [1, 2, 3])
def test_no_update_comes_nearer_than_the_singular_value_after_the_bound(r):
    """What follows from ΔW having at most rank K (Eckart, Young): ‖ΔW − E‖₂ >= σ_(K+1)(E). The
    paper's Theorem 1 has the sign the other way round.
    """
    K = pk.expanded_rank(r)
    for E in (torch.randn(20, 16).double(), torch.eye(20, 16).double()):
        least = torch.linalg.svdvals(E)[K]
        # Near the best of rank K, and anywhere.
        U, S, V = torch.linalg.svd(E, full_matrices=False)
        near = (V[:r], U[:, :r] * S[:r], torch.zeros(coefficient_count(r)).double())
        for A, B, h in (near, factors(r, 20, 16)):
            assert torch.linalg.matrix_norm(delta(A, B, h) - E, 2) >= least * (1 - 1e-12)


@pytest.mark.parametrize("r, M, N", [(1, 6, 7), (2, 9, 8), (3, 12, 13)])
def test_the_updates_are_few_among_the_matrices_of_their_rank(r, M, N):
    """So no inequality as Theorem 1's, ``min ‖ΔW − E‖₂ <= σ_(K+1)(E)``, can hold for every E.

    The updates that factors of rank r can make have r(M + N) + L − r dimensions (b_i and a_i may be
    scaled against each other), the matrices of rank K have K(M + N − K): almost none of these, for
    which σ_(K+1) is zero, is an update. LoRA's, r(M + N − r), are all matrices of rank r.
    """

    def dimensions(terms):
        given = [own for own in factors(r, M, N, terms) if own is not None]

        def update(*own):
            return delta(*own, *[None] * (3 - len(own)), terms).flatten()

        jacobian = torch.autograd.functional.jacobian(update, tuple(given))
        return rank(torch.cat([own.flatten(1) for own in jacobian], 1))

    K = pk.expanded_rank(r)
    assert dimensions("linear") == r * (M + N - r)
    assert dimensions("full") == r * (M + N) + coefficient_count(r) - r < K * (M + N - K)
