"""The orders in which a layer may compute its products, as a table of tiles chooses."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.terms import TERMS
from pera_kernels.testing import Case

pytestmark = pytest.mark.usefixtures("triton_backend")
BF16, F32 = torch.bfloat16, torch.float32
SIZES = {"T": 17, "N": 40, "M": 24, "r": 3}
# On chip or in memory φ; the base product first or last; our kernels or the library.
LIBRARY = {"library_projection": 1, "library_update": 1}
CHOICES = {
    "φ on chip, base first": {"products": 10**18, "base_last": None},
    "φ on chip, base last": {"products": 10**18, "base_last": 1},
    "φ in memory, base first": {"products": 0, "base_last": None},
    "φ in memory, base last": {"products": 0, "base_last": 1},
    "library, base first": {"products": 0, "base_last": None, **LIBRARY},
    "library, base last": {"products": 0, "base_last": 1, **LIBRARY},
    "φ on chip, update by the library": {"products": 10**18, "library_update": 1},
}


# What runs by default where every choice takes long.
FEW = ("φ on chip, base last", "library, base last")
EACH = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES]


@pytest.fixture(params=CHOICES)
def chosen(request, monkeypatch):
    from pera_kernels.kernels import tiles

    made = tiles.Choices(**CHOICES[request.param])
    monkeypatch.setattr(tiles, "choices", lambda device: made)
    return request.param


def assert_passes(device, **case):
    verdicts = testing.check(Case(**SIZES | case), "triton", device)
    assert len(verdicts) >= 3
    failed = [str(v) for v in verdicts if not v.passed]
    assert not failed, "\n".join(failed)


def test_the_numeric_rule(chosen, device, poison):
    assert_passes(device, terms="full", dtype=BF16, adapter_dtype=F32)


@pytest.mark.parametrize("dtype", [torch.float16, F32], ids=str)
def test_other_dtypes_have_one_order(dtype, device, monkeypatch):
    """float16 keeps its infinities, float32 its accuracy: the base first, by our kernels."""
    from pera_kernels.kernels import tiles

    case, results = Case(**SIZES, dtype=dtype), []
    for name in ("φ in memory, base first", "library, base last"):
        made = tiles.Choices(**CHOICES[name])
        monkeypatch.setattr(tiles, "choices", lambda device, made=made: made)
        results.append(testing.run(case, testing.make_inputs(case, device), "triton"))
    assert all(torch.equal(results[0][name], got) for name, got in results[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32], ids=str)
def test_the_numeric_rule_in_other_dtypes(dtype, terms, chosen, device, poison):
    assert_passes(device, terms=terms, dtype=dtype)


@pytest.mark.parametrize("chosen", EACH, indirect=True)
def test_dropout(chosen, device, poison):
    assert_passes(device, terms="square", dtype=BF16, dropout_p=0.3)


@pytest.mark.parametrize("chosen", EACH, indirect=True)
def test_without_a_bias_and_with_a_strided_one(chosen, device, poison):
    p = testing.make_inputs(Case(**SIZES, dtype=BF16, adapter_dtype=F32), device)
    strided = torch.stack([p.bias, p.bias], 1)[:, 0]
    assert strided.stride() != p.bias.stride()

    def y(bias, backend="triton", to=lambda t: t):
        tensors = map(to, (p.x, p.weight, p.A, p.B, p.h))
        return pk.pera_linear(*tensors, bias=bias, backend=backend)

    assert torch.equal(y(strided), y(p.bias))
    plain = testing.judge(
        "y", y(None), y(None, "reference"), y(None, "reference", torch.Tensor.double), BF16
    )
    assert plain.passed, str(plain)


@pytest.mark.parametrize("chosen", EACH, indirect=True)
def test_same_bits_with_and_without_gradients_and_again(chosen, device):
    layer = pk.PeraLinear(40, 24, r=3, dtype=BF16, device=device, backend="triton")
    for parameter in (layer.pera_A, layer.pera_B, layer.pera_h):
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(17, 40, dtype=BF16, device=device, requires_grad=True)
    dy = torch.randn(17, 24, dtype=BF16, device=device)
    asked = [x, layer.pera_A, layer.pera_B, layer.pera_h]
    y = layer(x)
    first = torch.autograd.grad(y, asked, dy)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    again = torch.autograd.grad(layer.train()(x), asked, dy)
    assert torch.equal(layer.eval()(x), y) and all(map(torch.equal, first, again))


@pytest.mark.parametrize("chosen", EACH, indirect=True)
def test_compiled_and_checked_as_ops(chosen, device):
    from pera_kernels.kernels import ops

    p = testing.make_inputs(Case(**SIZES, dtype=BF16, adapter_dtype=F32), device)
    rest = (p.A, p.B, p.h, None, 0.5, "full", 0.0, False)
    forward = (p.x, p.weight, p.bias, None, *rest)
    torch.library.opcheck(ops.forward_op, forward)
    _, u = ops.forward_op(*forward)
    torch.library.opcheck(ops.backward_op, (p.dy, p.x, u, p.weight, *rest, [True] * 4))

    def layer(x, A, B, h):
        return pk.pera_linear(x, p.weight, A, B, h, p.bias, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x, p.A, p.B, p.h), layer(p.x, p.A, p.B, p.h))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph(chosen, device):
    layer = pk.PeraLinear(256, 256, r=16, dtype=BF16, device=device)
    x = torch.randn(512, 256, dtype=BF16, device=device)
    with torch.no_grad():
        for _ in range(3):
            expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    assert torch.equal(y, expected)
