"""Merge, unmerge and unload whole models, all or nothing."""

import pytest
import torch
from torch import nn

import pera_kernels as pk
from tests.adapted import assert_unchanged, plain_model, refused, state, trained


@pytest.fixture
def x():
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(5))


def test_merge_and_unmerge(x):
    model = trained()
    before, expected = state(model), model(x)
    assert pk.merge(model) is model and all(m.merged for m in pk.adapted_modules(model).values())
    torch.testing.assert_close(model(x), expected)
    pk.merge(model)
    pk.unmerge(model)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("merged_before", [True, False])
def test_unload(merge, merged_before, x):
    model = trained()
    weight = model[0].up.weight
    expected = model(x) if merge else plain_model()(x)
    if merged_before:
        pk.merge(model)
    assert pk.unload(model.eval(), merge=merge) is model
    assert not pk.adapted_modules(model) and type(model[0].up) is nn.Linear
    assert model[0].up.weight is weight and not model[0].up.training
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == list(plain_model().state_dict())


def test_unload_of_one_module_under_two_names(x):
    model = plain_model()
    model[1].up = model[0].up
    trained(model, targets=["up"])
    expected = model(x)
    pk.unload(model)
    assert model[1].up is model[0].up and type(model[0].up) is nn.Linear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("keep_base", [True, False])
def test_one_bad_layer_changes_none(keep_base):
    model = trained()
    with torch.no_grad():
        model[1].down.pera_B[0, 0] = float("inf")
    refused(model, "1.down: merging would make", lambda m: pk.merge(m, keep_base=keep_base))
    assert not any(m.merged for m in pk.adapted_modules(model).values())
    refused(model, "1.down", pk.unload)


def test_shared_weights_are_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 24)
            self.head = nn.Linear(24, 40, bias=False)
            self.head.weight = self.embed.weight

    model = trained(Tied(), targets=["head"])
    refused(model, r"head\.weight is also embed\.weight", pk.merge)
    refused(model, r"head\.weight is also embed\.weight", pk.unload)
    pk.unload(model, merge=False)
    assert model.head.weight is model.embed.weight
    # Another parameter over part of the same memory.
    model = plain_model()
    model.register_buffer("view", model[0].up.weight.detach()[3:5])
    refused(trained(model), r"0\.up\.weight is also view", pk.merge)


def test_bases_without_a_dense_weight(x):
    class Quantized(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("codes", (linear.weight * 100).to(torch.int8))

        def forward(self, x):
            return nn.functional.linear(x, self.codes.to(x.dtype) / 100)

    model = plain_model()
    model[0].up = Quantized(model[0].up)
    base = model[0].up
    trained(model)
    refused(model, r"cannot merge into 0\.up.*Quantized.*dequantized", pk.merge)
    refused(model, "dequantized", pk.unload)
    pk.unload(model, merge=False)
    assert model[0].up is base


@pytest.mark.parametrize("call", [pk.merge, pk.unmerge, pk.unload])
def test_a_model_without_adapters(call):
    refused(plain_model(), "no adapter to", call)


def test_unload_of_the_layer_itself():
    layer = pk.PeraLinear(4, 4, 2)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        pk.unload(layer)
    assert_unchanged(layer, state(layer), [type(m) for m in layer.modules()])
