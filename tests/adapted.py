"""Small models with adapters that do something, shared by the tests of what is done with them."""

import pytest
import torch
from torch import nn

import pera_kernels as pk


class Block(nn.Module):
    def __init__(self, n=24, hidden=40):
        super().__init__()
        self.up = nn.Linear(n, hidden)
        self.down = nn.Linear(hidden, n)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def plain_model(n=24, hidden=40, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(n, hidden), Block(n, hidden))


def trained(model=None, *, r=3, terms="full", alpha=2.0, seed=1, targets=("up", "down"), **options):
    """A model with adapters that do something."""
    model = pk.inject(model or plain_model(), list(targets), r, alpha=alpha, terms=terms, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in pk.adapter_parameters(model):
            p.normal_(std=0.2)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before, kinds):
    assert [type(m) for m in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def refused(model, match, call):
    """``call`` raises, and the model is what it was, down to what trains."""
    before, kinds = state(model), [type(m) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=match):
        call(model)
    assert_unchanged(model, before, kinds)
    assert [p.requires_grad for p in model.parameters()] == grads


def filled(model, std=0.4):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model):
            parameter.normal_(std=std)
    return model


def layer(**options):
    torch.manual_seed(0)
    return filled(pk.PeraLinear(8, 6, r=4, **options))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def dx(x, call):
    x.grad = None
    call()
    return x.grad


class Head(nn.Module):
    """What a fused loss does: the weight of the output layer is read."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.body(x))
