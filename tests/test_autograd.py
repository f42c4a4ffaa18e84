"""What is refused, what is computed: the autograd boundary."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.testing import Case

T, N, M, R = 21, 40, 24, 4


def problem(device, dtype=torch.float32, **case):
    return numerics.make_inputs(Case(r=R, T=T, N=N, M=M, dtype=dtype, **case), device)


def apply(p, backend, **options):
    return pk.pera_linear(p.x, p.weight, p.A, p.B, p.h, p.bias, backend=backend, **options)


@pytest.mark.parametrize("plan", ["factored", "composed"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_requested_gradients_and_the_same_ones(wanted, plan, backend, device):
    p = problem(device)
    leaves = [p.x, p.A, p.B, p.h]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    y = apply(p, backend, plan=plan)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(p.dy)
    got = [leaf.grad for leaf in leaves]
    assert [g is not None for g in got] == list(wanted)
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_(True)
    apply(p, backend, plan=plan).backward(p.dy)
    for g, leaf in zip(got, leaves, strict=True):
        if g is not None:
            torch.testing.assert_close(g, leaf.grad)


def test_autocast_matches_half_precision_input(backend, device):
    p = problem(device, torch.float32)
    for leaf in (p.x, p.A, p.B, p.h):
        leaf.requires_grad_(True)
    with torch.autocast(device.type, torch.bfloat16):
        y = apply(p, backend)
    y.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in (p.x, p.A, p.B, p.h))
    expected = pk.pera_linear(
        p.x.bfloat16(), p.weight.bfloat16(), p.A, p.B, p.h, p.bias.bfloat16(), backend=backend
    )
    assert torch.equal(y, expected)


def test_second_derivative_is_refused(backend, device):
    p = problem(device)
    p.x.requires_grad_(True)
    p.A.requires_grad_(True)
    (dx,) = torch.autograd.grad(apply(p, backend).square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_wants_gradients_is_refused(name, backend, device):
    p = problem(device)
    getattr(p, name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        apply(p, backend)
    with torch.no_grad():
        assert apply(p, backend).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_with_the_same_dropout(use_reentrant, backend, device):
    p = problem(device)
    leaves = (p.x, p.A, p.B, p.h)
    gradients = []
    for checkpointed in (False, True):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_(True)
        torch.manual_seed(7)

        def run(x):
            return pk.pera_linear(
                x, p.weight, p.A, p.B, p.h, p.bias, dropout_p=0.4, backend=backend
            ).square()

        y = checkpoint(run, p.x, use_reentrant=use_reentrant) if checkpointed else run(p.x)
        y.sum().backward()
        gradients.append([leaf.grad.clone() for leaf in leaves])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_first_step_moves_B_alone(backend, device):
    """At B = 0 the gradients of A and h are exactly zero; after a step they are not."""
    layer = pk.PeraLinear(N, M, r=R, backend=backend, device=device)
    optimizer = torch.optim.SGD(pk.adapter_parameters(layer), lr=0.1)
    x = torch.randn(T, N, device=device)
    layer(x).square().sum().backward()
    assert not layer.pera_A.grad.any() and not layer.pera_h.grad.any()
    assert layer.pera_B.grad.any()
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.pera_A.grad.any() and layer.pera_h.grad.any()


def test_forward_mode_and_vmap_where_nothing_is_trained():
    layer = pk.PeraLinear(N, M, r=R, backend="torch").requires_grad_(False)
    torch.nn.init.normal_(layer.pera_B)
    x, tangent = torch.randn(2, T, N)
    y, dy = torch.func.jvp(layer, (x,), (tangent,))
    delta = layer.weight + layer.delta_weight()
    torch.testing.assert_close(dy, tangent @ delta.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(layer)(x), y)
