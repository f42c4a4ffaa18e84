"""Every backend under the numeric rule: float64 truth, at most twice the working-dtype error."""

from dataclasses import replace

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.backends import unavailable
from pera_kernels.terms import TERMS
from pera_kernels.testing import Case

RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {"T": 19, "N": 40, "M": 24}


def assert_passes(case, backend, device):
    verdicts = numerics.check(case, backend, device)
    assert len(verdicts) >= 3
    failed = [str(v) for v in verdicts if not v.passed]
    assert not failed, f"{backend} {case}:\n" + "\n".join(failed)


def skip_unless(backend, device):
    if (reason := unavailable(backend, device)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", RANKS)
def test_torch_backend(r, terms, dtype, device, poison):
    case = Case(terms=terms, r=r, dtype=dtype, T=37, N=70, M=50)
    assert_passes(case, "torch", device)
    assert_passes(replace(case, op="delta_weight"), "torch", device)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", RANKS)
def test_triton_kernels(r, terms, device, poison):
    """Every rank and term kind; the dtypes and variants rotate with the rank."""
    skip_unless("triton", device)
    turn = RANKS.index(r) + TERMS.index(terms)
    case = Case(terms=terms, r=r, dtype=DTYPES[turn % 3], **SMALL)
    if turn % 4 == 1 and case.dtype != torch.float32:
        case = replace(case, adapter_dtype=torch.float32)
    if turn % 4 == 2:
        case = replace(case, dropout_p=0.25)
    if turn % 4 == 3:
        case = replace(case, plan="composed")
    assert_passes(case, "triton", device)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", (1, 3, 8, 20, 64))
def test_triton_delta_weight(r, terms, device, poison):
    skip_unless("triton", device)
    dtype = DTYPES[(r + TERMS.index(terms)) % 3]
    assert_passes(Case(op="delta_weight", terms=terms, r=r, dtype=dtype, **SMALL), "triton", device)


VARIANTS = {
    "float32 adapters, bfloat16": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32},
    "float32 adapters, float16": {"dtype": torch.float16, "adapter_dtype": torch.float32},
    "dropout": {"dropout_p": 0.3},
    "dropout, bfloat16": {"dropout_p": 0.3, "dtype": torch.bfloat16},
    "composed": {"plan": "composed"},
    "composed, bfloat16": {"plan": "composed", "dtype": torch.bfloat16},
    "many tokens": {"T": 700, "N": 24, "M": 20, "r": 3},
    "wide": {"T": 5, "N": 900, "M": 300, "r": 3},
    "one of each": {"T": 1, "N": 1, "M": 1, "r": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, backend, device, poison):
    assert_passes(Case(**{"r": 6, **SMALL, **VARIANTS[name]}), backend, device)


def test_float64_on_the_torch_backend(device):
    case = Case(r=5, dtype=torch.float64, **SMALL)
    inputs = numerics.make_inputs(case, device)
    truth = numerics.run(case, inputs, "reference")
    for name, got in numerics.run(case, inputs, "torch").items():
        torch.testing.assert_close(got, truth[name], rtol=1e-11, atol=1e-11)


def same_as_contiguous(x, make_view, backend, device, terms="full"):
    """Output and gradients for a strided x are those for its contiguous copy."""
    r, N, M = 3, x.shape[-1], 9
    A, B, h = torch.randn(r, N), torch.randn(M, r), torch.randn(r * (r + 1) // 2)
    weight = torch.randn(M, N)
    results = []
    for contiguous in (False, True):
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (x, A, B, h)]
        view = make_view(leaves[0])
        view = view.contiguous() if contiguous else view
        assert view.is_contiguous() == contiguous
        y = pk.pera_linear(view, weight.to(device), *leaves[1:], terms=terms, backend=backend)
        assert y.shape == (*view.shape[:-1], M)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append([y, *gradients])
    for strided, dense in zip(*results, strict=True):
        torch.testing.assert_close(strided, dense, rtol=1e-4, atol=1e-3)


VIEWS = {
    "transposed batch": ((4, 5, 12), lambda x: x.transpose(0, 1)),
    "every other column": ((7, 12), lambda x: torch.cat([x, x], 1)[:, ::2]),
    "column-major": ((7, 12), lambda x: x.t().contiguous().t()),
    "expanded": ((1, 1, 12), lambda x: x.expand(3, 4, 12)),
    "offset": ((6, 5, 12), lambda x: x[1:, 2:4]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_inputs(name, backend, device):
    shape, make_view = VIEWS[name]
    same_as_contiguous(torch.randn(shape), make_view, backend, device)


def test_strided_parameters(backend, device):
    """B stored column-major, A as a slice, an expanded output gradient."""
    x, weight = torch.randn(6, 12, device=device), torch.randn(9, 12, device=device)
    A, B = torch.randn(12, 8, device=device).t()[2:5], torch.randn(3, 9, device=device).t()
    h = torch.randn(12, device=device)[::2]
    got = [t.detach().requires_grad_() for t in (A, B, h)]
    dense = [t.detach().contiguous().requires_grad_() for t in (A, B, h)]
    for y in (pk.pera_linear(x, weight, *p, backend=backend) for p in (got, dense)):
        y.backward(torch.ones((), device=device).expand_as(y))
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (2, 3, 1, 12)])
def test_leading_dimensions_and_empty_batches(shape, backend, device):
    layer = pk.PeraLinear(12, 9, r=3, backend=backend, device=device)
    torch.nn.init.normal_(layer.pera_B)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 9)
    y.sum().backward()
    assert x.grad.shape == shape
    for p in (layer.pera_A, layer.pera_B, layer.pera_h):
        assert p.grad.shape == p.shape and p.grad.isfinite().all()
        if x.numel() == 0:
            assert not p.grad.any()


def test_same_inputs_same_bits(backend, device):
    case = Case(r=7, T=300, N=70, M=50, dropout_p=0.2)
    inputs = numerics.make_inputs(case, device)
    first = numerics.run(case, inputs, backend)
    for _ in range(3):
        for name, got in numerics.run(case, inputs, backend).items():
            assert torch.equal(got, first[name]), name


def test_inputs_are_not_modified(backend, device):
    case = Case(r=4, **SMALL)
    inputs = numerics.make_inputs(case, device)
    before = [t.clone() for t in vars(inputs).values()]
    numerics.run(case, inputs, backend)
    for name, old, new in zip(vars(inputs), before, vars(inputs).values(), strict=True):
        assert torch.equal(old, new), name


OVERFLOWS = {
    "product of factors": {"A": 300.0, "x": 0.01, "B": 0.01},
    "projection": {"A": 200.0, "x": 300.0, "B": 1e-3},
    "update": {"A": 20.0, "x": 20.0, "B": 40.0},
    "base": {"weight": 300.0, "x": 200.0, "B": 1e-3},
    "none": {},
}


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_half_precision_overflow_shows_where_the_reference_has_it(name, scale, backend, device):
    case = Case(r=4, dtype=torch.float16, scale=scale, T=12, N=40, M=24)
    inputs = numerics.make_inputs(case, device)
    for argument, factor in OVERFLOWS[name].items():
        setattr(inputs, argument, getattr(inputs, argument) * factor)
    reference = numerics.run(case, inputs, "reference")["y"]
    got = numerics.run(case, inputs, backend)["y"]
    assert reference.isfinite().all() == (name == "none")
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(got), kind(reference)), kind.__name__
