"""Every backend under the numeric rule: float64 truth, at most twice the working-dtype error."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.backends import unavailable
from pera_kernels.terms import TERMS
from pera_kernels.testing import Case

RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {"T": 19, "N": 40, "M": 24}


def assert_passes(case, backend, device):
    verdicts = testing.check(case, backend, device)
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


def in_turn(keep):
    """Every rank and terms; interpreted kernels are slow, so by default only those of ``keep``."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "r, terms",
        [
            pytest.param(r, terms, marks=() if (r, terms) in keep else slow)
            for r in RANKS
            for terms in TERMS
        ],
    )


@in_turn(
    [(1, "full"), (2, "square"), (3, "cross"), (4, "full"), (5, "full"), (7, "cross")]
    + [(8, "full"), (12, "cross"), (16, "full"), (20, "square"), (24, "linear"), (32, "square")]
)
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


@in_turn([(1, "linear"), (3, "full"), (8, "cross"), (20, "square")])
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
    "many tokens": {"T": 300, "N": 24, "M": 20},
    "wide": {"T": 5, "N": 400, "M": 150},
    "one of each": {"T": 1, "N": 1, "M": 1, "r": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, backend, device, poison):
    assert_passes(Case(**{"r": 9, **SMALL, **VARIANTS[name]}), backend, device)


def test_float64_on_the_torch_backend(device):
    case = Case(r=5, dtype=torch.float64, **SMALL)
    inputs = testing.make_inputs(case, device)
    truth = testing.run(case, inputs, "reference")
    for name, got in testing.run(case, inputs, "torch").items():
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


def test_tensors_that_are_negated_by_a_bit(backend, device):
    """The imaginary part of a conjugate is one: here x, and the gradient of y."""
    z, weight = torch.randn(6, 12, dtype=torch.complex64, device=device), torch.randn(9, 12)
    A, B, h = torch.randn(3, 12), torch.randn(9, 3), torch.randn(6)
    target, gradients, signs = torch.randn(6, 9, dtype=torch.complex64, device=device), [], []
    x = z.conj().imag
    assert x.is_neg()
    for own, name in ((x, backend), (x.resolve_neg(), "reference")):
        leaves = [t.detach().to(device).requires_grad_() for t in (own, A, B, h)]
        y = pk.pera_linear(leaves[0], weight.to(device), *leaves[1:], backend=name)
        y.register_hook(lambda dy: signs.append(dy.is_neg()))
        loss = (torch.complex(torch.zeros_like(y), y).conj() * target).real.sum()
        gradients.append([y, *torch.autograd.grad(loss, leaves)])
    assert all(signs)
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


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


@pytest.mark.parametrize("plan", ["factored", "composed"])
def test_a_base_weight_of_any_strides(plan, backend, device):
    x, A, B, h = (torch.randn(s, device=device) for s in ((7, 12), (3, 12), (9, 3), (6,)))
    strided = torch.randn(12, 9, device=device).t()
    results = []
    for weight in (strided, strided.contiguous()):
        leaves = [t.clone().requires_grad_() for t in (x, A, B, h)]
        y = pk.pera_linear(leaves[0], weight, *leaves[1:], plan=plan, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


class Strange(nn.Module):
    """A base layer that keeps what it returns, and returns it column by column."""

    in_features, out_features = 12, 9

    def __init__(self, device):
        super().__init__()
        self.register_buffer("matrix", torch.randn(9, 12, device=device))

    def forward(self, x):
        self.kept = F.linear(x, self.matrix).t().contiguous().t()
        return self.kept


def test_a_base_output_of_any_strides_is_not_written_to(backend, device):
    layer = pk.PeraLinear.from_linear(Strange(device), 3, backend=backend).to(device)
    with torch.no_grad():
        for p in pk.adapter_parameters(layer):
            p.normal_()
    x = torch.randn(7, 12, device=device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert layer.base_layer.kept.stride() == (1, 7)
        base = F.linear(x, layer.base_layer.matrix)
        assert torch.equal(layer.base_layer.kept, base)
        expected = base + x @ layer.delta_weight().t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (2, 3, 1, 12)])
def test_leading_dimensions_and_empty_batches(shape, backend, device):
    layer = pk.PeraLinear(12, 9, r=3, backend=backend, device=device)
    nn.init.normal_(layer.pera_B)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 9)
    y.sum().backward()
    assert x.grad.shape == shape
    for p in (layer.pera_A, layer.pera_B, layer.pera_h):
        assert p.grad.shape == p.shape and p.grad.isfinite().all()
        if x.numel() == 0:
            assert not p.grad.any()


def test_inputs_are_not_modified(backend, device):
    case = Case(r=4, **SMALL)
    inputs = testing.make_inputs(case, device)
    before = [t.clone() for t in vars(inputs).values()]
    testing.run(case, inputs, backend)
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
    inputs = testing.make_inputs(case, device)
    for argument, factor in OVERFLOWS[name].items():
        setattr(inputs, argument, getattr(inputs, argument) * factor)
    reference = testing.run(case, inputs, "reference")["y"]
    got = testing.run(case, inputs, backend)["y"]
    assert reference.isfinite().all() == (name == "none")
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(got), kind(reference)), kind.__name__
