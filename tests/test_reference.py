"""The specification against the definition written out, and against the released formula."""

import pytest
import torch
import torch.nn.functional as F

import pera_kernels as pk
from pera_kernels.terms import TERMS, coefficient_count, pairs


def problem(r, terms, N=11, M=7, T=5):
    A, B = torch.randn(r, N).double(), torch.randn(M, r).double()
    count = coefficient_count(r, terms)
    h = None if terms == "linear" else torch.randn(count).double()
    return torch.randn(T, N).double(), torch.randn(M, N).double(), torch.randn(M).double(), A, B, h


def delta_by_loops(A, B, h, terms):
    """Σ_i b_i a_iᵀ + Σ h_ij (b_i∘b_j)(a_i∘a_j)ᵀ (Eq. 4), one outer product at a time."""
    delta = sum(torch.outer(B[:, i], A[i]) for i in range(A.shape[0]))
    for position, (i, j) in enumerate(pairs(A.shape[0], terms)):
        delta = delta + h[position] * torch.outer(B[:, i] * B[:, j], A[i] * A[j])
    return delta


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 3, 5, 8])
def test_delta_weight_is_the_sum_of_outer_products(r, terms):
    *_, A, B, h = problem(r, terms)
    expected = 0.3 * delta_by_loops(A, B, h, terms)
    got = pk.reference.delta_weight(A, B, h, scale=0.3, terms=terms)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("terms", TERMS)
def test_pera_linear_is_a_linear_layer_with_delta(terms):
    x, weight, bias, A, B, h = problem(4, terms)
    expected = F.linear(x, weight + 0.3 * delta_by_loops(A, B, h, terms), bias)
    got = pk.reference.pera_linear(x, weight, A, B, h, bias, scale=0.3, terms=terms)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_released_formula():
    """The released expansion: all products, upper triangle gathered, h between the factors."""
    x, weight, _, A, B, h = problem(6, "full")
    row, column = torch.triu_indices(6, 6)
    products_A = torch.einsum("in,jn->ijn", A, A)[row, column]
    products_B = torch.einsum("mi,mj->mij", B, B)[:, row, column]
    A_expanded = torch.cat([A, products_A])
    B_expanded = torch.cat([B, products_B * h], 1)
    expected = F.linear(x, weight) + F.linear(F.linear(x, A_expanded), B_expanded)
    got = pk.reference.pera_linear(x, weight, A, B, h)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", TERMS)
def test_expanded_factors_are_a_lora_of_rank_K(terms):
    *_, A, B, h = problem(5, terms)
    lora_A, lora_B = pk.expand_factors(A, B, h, scale=0.3, terms=terms)
    K = pk.expanded_rank(5, terms)
    assert lora_A.shape == (K, 11) and lora_B.shape == (7, K)
    expected = pk.reference.delta_weight(A, B, h, scale=0.3, terms=terms)
    torch.testing.assert_close(lora_B @ lora_A, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 5])
def test_torch_gradients_by_finite_differences(r, terms):
    x, weight, bias, A, B, h = problem(r, terms, N=4, M=3, T=3)
    inputs = [t.requires_grad_() for t in (x, A, B, h) if t is not None and t.numel()]

    def layer(x, A, B, h=h):
        return pk.pera_linear(x, weight, A, B, h, bias, scale=0.7, terms=terms, backend="torch")

    def delta(x, A, B, h=h):
        return pk.delta_weight(A, B, h, scale=0.7, terms=terms, backend="torch")

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradcheck(delta, inputs)


def test_half_precision_products_are_rounded_once():
    A = torch.randn(3, 9).bfloat16()
    expanded = pk.reference.expand(A, "full")
    assert expanded.dtype == torch.float32
    assert torch.equal(expanded[4], A[0].float() * A[1].float())
