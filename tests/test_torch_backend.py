"""The ``torch`` backend's own pieces: φ, its contraction, sums in blocks."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import torch_backend
from pera_kernels.terms import TERMS, coefficient_count, expanded_rank
from pera_kernels.testing import Case, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


SIZES = [pytest.param(2**17, id="whole"), pytest.param(100, id="blocks")]


@pytest.fixture(params=SIZES)
def blocks(request, monkeypatch):
    """All at once, or in blocks, as of large factors."""
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 3, 8, 9])
def test_expand_is_the_reference(r, terms, blocks):
    factor = torch.randn(7, r).t()
    assert torch.equal(torch_backend.expand(factor, terms), pk.reference.expand(factor, terms))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 3, 8, 9])
def test_contract_is_the_gradient_of_expand(r, terms, blocks):
    """And dh is that of the coefficients, whose product with φ is what dφ belongs to."""
    factor = torch.randn(r, 30, dtype=torch.float64, requires_grad=True)
    h = torch.randn(coefficient_count(r, terms), dtype=torch.float64, requires_grad=True)
    dphi = torch.randn(expanded_rank(r, terms), 30, dtype=torch.float64)
    phi = pk.reference.expand(factor, terms)
    weighted = torch.cat([h.new_ones(r), h]).unsqueeze(1) * phi
    expected = torch.autograd.grad(weighted, [factor, h], dphi, materialize_grads=True)
    with torch.no_grad():
        got = torch_backend.contract(dphi, phi, h, terms, need_h=True)
    for gradient, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("plan", ["factored", "composed"])
@pytest.mark.parametrize("op", ["pera_linear", "delta_weight"])
def test_large_factors_under_the_numeric_rule(op, plan, monkeypatch):
    """Which are expanded one by one, and summed over in blocks."""
    monkeypatch.setattr(torch_backend, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 100)
    case = Case(op=op, r=5, plan=plan, dropout_p=0.2 if plan == "factored" else 0.0)
    failed = [str(v) for v in check(case, "torch") if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("T", [1, 24, 25])
def test_few_tokens_under_the_numeric_rule(T, terms, dtype, poison):
    """On both sides of the limit up to which products are summed in blocks."""
    half = dtype != torch.float32
    case = Case(terms=terms, r=13, dtype=dtype, T=T, N=40, M=30, dropout_p=0.2 if half else 0.0)
    if half:
        case = Case(**{**vars(case), "adapter_dtype": torch.float32})
    failed = [str(v) for v in check(case, "torch") if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("K", [79, 160, 165, 320])
@pytest.mark.parametrize("T, C", [(1, 7), (24, 25), (30, 2), (30, 30)])
def test_product_of_any_number_of_lanes(T, C, K):
    """Summed in blocks or not, whatever the strides."""
    a, b = torch.randn(K, T).t(), torch.randn(K, C)
    torch.testing.assert_close(
        torch_backend.product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4
    )


def test_nothing_made_under_another_mode_or_dtype_is_kept():
    """A default dtype, inference mode or fake tensors at the first call leave no trace."""
    layer = pk.PeraLinear(8, 6, r=11, backend="torch")
    torch.nn.init.normal_(layer.pera_B)
    x = torch.randn(20, 8)
    expected = pk.pera_linear(
        x, layer.weight, *layer._factors(), layer.bias, scale=layer.scale, backend="reference"
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        layer(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.to("meta")(x.to("meta")).shape == (20, 6)
