"""What only a GPU can show: compiled kernels at real sizes, streams, graphs, several devices."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.testing import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LARGE = {"T": 1100, "N": 1000, "M": 520}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms, r", [("full", 16), ("square", 12), ("cross", 8), ("linear", 16)])
def test_numeric_rule_at_sizes_that_split(terms, r, dtype):
    case = Case(terms=terms, r=r, dtype=dtype, **LARGE)
    failed = [str(v) for v in numerics.check(case, "triton", "cuda") if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("T", [1, 17, 64])
def test_few_tokens_split_over_the_features(T):
    case = Case(r=16, dtype=torch.bfloat16, T=T, N=4096, M=1024)
    failed = [str(v) for v in numerics.check(case, "triton", "cuda") if not v.passed]
    assert not failed, "\n".join(failed)


def layer(**options):
    made = pk.PeraLinear(512, 256, r=8, device="cuda", dtype=torch.bfloat16, **options)
    torch.nn.init.normal_(made.pera_B, std=0.1)
    torch.nn.init.normal_(made.pera_h)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_forward_and_backward_in_a_captured_graph(dropout):
    made = layer(dropout=dropout)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    leaves = [x, *pk.adapter_parameters(made)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(made(x), leaves, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
        gradients = torch.autograd.grad(y, leaves, dy)
    graph.replay()
    first = [t.clone() for t in (y, *gradients)]
    graph.replay()
    second = [y, *gradients]
    if dropout:
        assert not torch.equal(first[0], second[0])
        return
    expected = made(x)
    for a, b, c in zip(
        first, second, (expected, *torch.autograd.grad(expected, leaves, dy)), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_streams_give_the_same_bits():
    made = layer()
    inputs = [torch.randn(300, 512, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [made(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for index, x in enumerate(inputs):
        with torch.cuda.stream(streams[index % 2]):
            got.append(made(x))
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    made = layer().to("cuda:1")
    assert torch.cuda.current_device() == 0
    y = made(torch.randn(5, 512, device="cuda:1", dtype=torch.bfloat16))
    y.sum().backward()
    assert y.device.index == 1 and made.pera_A.grad.isfinite().all()


def test_auto_is_triton_on_a_gpu():
    from pera_kernels.backends import resolve

    assert resolve("auto", torch.device("cuda"), (torch.bfloat16,)) == "triton"
    assert resolve("auto", torch.device("cuda"), (torch.float64,)) == "torch"
