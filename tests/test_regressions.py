"""What random tests found, each as the smallest example with a name."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.testing import Case


def verdicts(case, draws=8, change=lambda inputs: None, backend="torch"):
    """A verdict on each output, from several draws of the inputs."""
    outputs = [[], [], []]
    for seed in range(draws):
        inputs = numerics.make_inputs(Case(**{**vars(case), "seed": seed}))
        change(inputs)
        outputs[0].append(numerics.run(case, inputs, backend))
        outputs[1].append(numerics.run(case, inputs, "reference"))
        outputs[2].append(numerics.run(case, inputs, "reference", exact=True))
    return {
        name: numerics.judge(
            name, *(torch.stack([o[name] for o in g]) for g in outputs), case.dtype
        )
        for name in outputs[0][0]
    }


@pytest.mark.parametrize("r, N, M", [(32, 64, 64), (64, 256, 1024)])
def test_one_token_is_not_summed_onto_its_base_lane_by_lane(r, N, M):
    """y.addmm_(weighted, φ(B)) of one row rounds K times at the size of y."""
    verdict = verdicts(Case(r=r, T=1, N=N, M=M, scale=0.02), draws=4)["y"]
    assert verdict.passed, str(verdict)


def test_few_tokens_and_many_lanes():
    """(T, K) φ(B) with φ(B) stored by lanes is summed lane by lane for small T."""
    verdict = verdicts(Case(r=24, T=8, N=256, M=256), draws=16)["y"]
    assert verdict.passed, str(verdict)


def test_one_feature_composed():
    """W0 + ΔW by one addmm of one row rounds K times at the size of W0."""
    case = Case(r=12, T=40, N=13, M=1, scale=0.02, plan="composed")
    for verdict in verdicts(case, draws=64).values():
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize("T", [8, 64])
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_float16_gradient_of_h_while_B_is_small(size, T):
    """Float32 adapters a few steps after B = 0: b_i b_j is below float16, but dh is not zero."""

    def small(inputs):
        inputs.B.mul_(2 * size)
        inputs.A.mul_(0.2)

    case = Case(r=8, T=T, N=96, M=80, dtype=torch.float16, adapter_dtype=torch.float32)
    verdict = verdicts(case, draws=2, change=small)["dh"]
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("terms", ["linear", "full"])
def test_float16_gradients_under_a_large_scale(terms, backend):
    """Dy and B are small and s is not: what autograd multiplies by s first does not underflow."""

    def small(inputs):
        inputs.B.mul_(2e-3)
        inputs.A.mul_(0.2)
        inputs.dy.mul_(1e-3)

    case = Case(terms=terms, r=4, T=64, N=24, M=20, scale=16.0, dtype=torch.float16)
    case = Case(**{**vars(case), "adapter_dtype": torch.float32})
    for verdict in verdicts(case, draws=2, change=small, backend=backend).values():
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize("terms", ["square", "full"])
def test_a_square_counts_twice_though_its_coefficient_is_large(terms, backend, device):
    """Twice 40000 is more than float16 has."""
    A, B, h = (
        torch.full(shape, value)
        for shape, value in (
            ((2, 3), 0.01),
            ((3, 2), 0.01),
            ((2 if terms == "square" else 3,), 4e4),
        )
    )
    x, weight = torch.ones(4, 3), torch.zeros(3, 3)
    gradients = []
    for own, name in ((torch.float16, backend), (torch.float64, "reference")):
        leaves = [t.to(device, own).requires_grad_() for t in (A, B, h)]
        x, weight = x.to(device, own), weight.to(device, own)
        y = pk.pera_linear(x, weight, *leaves, terms=terms, backend=name)
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=0.0)


def test_no_coefficients_in_a_strided_tensor():
    """r = 1 has no cross terms; the third evaluation keeps the expansions."""
    x, weight = torch.randn(3, 8).half(), torch.randn(6, 8).half()
    A, B, h = torch.randn(1, 8).half(), torch.randn(6, 1).half(), torch.empty(0, 2).half()[:, 0]
    with torch.no_grad():
        expected = pk.pera_linear(x, weight, A, B, None, terms="linear", backend="torch")
        for _ in range(4):
            y = pk.pera_linear(x, weight, A, B, h, terms="cross", backend="torch")
            assert torch.equal(y, expected)


@pytest.mark.parametrize("r, M", [(13, 1), (13, 3), (9, 64)])
def test_a_hundred_lanes_of_one_token(r, M):
    """A library sums them one after the other, with up to twice the error of a dot product."""
    verdict = verdicts(Case(r=r, T=1, N=4, M=M, scale=-1.0), draws=200)["y"]
    assert verdict.passed and verdict.rms_error <= 1.5 * verdict.reference_rms, str(verdict)


@pytest.mark.parametrize("T, M", [(27, 37), (200, 64)])
def test_float64_is_not_summed_onto_its_base_lane_by_lane(T, M):
    """A small update of many lanes is as exact as the product by itself."""
    p = numerics.make_inputs(Case(r=20, T=T, N=12, M=M, dtype=torch.float64))
    p.B.mul_(0.01)
    tensors = (p.x, p.weight, p.A, p.B, p.h, p.bias)
    y = pk.pera_linear(*tensors, backend="torch", plan="factored")
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    update = pk.reference.update(p.x, p.A, p.B, p.h)
    ulp = torch.finfo(torch.float64).eps * base.abs().max()
    assert (y - (base + update)).abs().max() <= 1.5 * ulp
