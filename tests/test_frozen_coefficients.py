"""Coefficients frozen at zero: their pairs are left out, and come back with the first nonzero."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import autograd


@pytest.fixture
def kinds(monkeypatch):
    """The terms that every evaluation computed."""
    seen = []
    original = autograd.PeraLinearFunction.apply

    def apply(*arguments):
        seen.append(arguments[-1].terms)
        return original(*arguments)

    monkeypatch.setattr(autograd.PeraLinearFunction, "apply", apply)
    return seen


def layer_of(backend, device, terms="full"):
    layer = pk.PeraLinear(20, 12, r=3, terms=terms, backend=backend, device=device)
    torch.nn.init.normal_(layer.pera_B)
    return layer


def test_frozen_zeros_cost_what_lora_costs(backend, device, kinds):
    layer = layer_of(backend, device)
    layer.pera_h.requires_grad_(False)
    lora = layer_of(backend, device, "linear")
    lora.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "pera_h"})
    x = torch.randn(5, 20, device=device, requires_grad=True)
    for own in (layer, lora):
        own(x).square().sum().backward()
    assert kinds == ["linear", "linear"]
    assert torch.equal(layer(x), lora(x))
    assert torch.equal(layer.pera_A.grad, lora.pera_A.grad)
    assert torch.equal(layer.pera_B.grad, lora.pera_B.grad)


def test_trained_zeros_are_computed_with(backend, device, kinds):
    layer = layer_of(backend, device)
    layer(torch.randn(5, 20, device=device)).sum().backward()
    assert kinds == ["full"]
    assert layer.pera_h.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["copy_", "index", "load", "nan"])
def test_the_first_nonzero_is_noticed(change, backend, device, kinds):
    layer = layer_of(backend, device)
    layer.pera_h.requires_grad_(False)
    x = torch.randn(5, 20, device=device)
    before = layer(x)
    with torch.no_grad():
        if change == "copy_":
            layer.pera_h.copy_(torch.ones(6))
        elif change == "index":
            layer.pera_h[2] = 1.0
        elif change == "nan":
            layer.pera_h[0] = torch.nan
        else:
            layer.load_state_dict({**layer.state_dict(), "pera_h": torch.ones(6)})
    assert not torch.equal(layer(x), before)
    assert kinds == ["linear", "full"]


def test_compiled_layers_see_later_values(device):
    """A compiled graph serves any h: nothing about its values is assumed."""
    torch._dynamo.reset()
    layer = layer_of("torch", device)
    layer.pera_h.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20, device=device)
    compiled(x)
    with torch.no_grad():
        layer.pera_h.fill_(2.0)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
