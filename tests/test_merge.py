"""Merge, unmerge and unload whole models, all or nothing."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pera_kernels as pk
from tests.adapted import (
    assert_unchanged,
    filled,
    layer,
    plain_model,
    refused,
    state,
    trained,
)


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


def test_a_merged_layer_trains_no_weight():
    own, x = layer(), torch.randn(3, 8)
    own.merge()
    own.requires_grad_(True)
    for around in (nullcontext, own.disabled):
        with around(), pytest.raises(ValueError, match="weight must not require grad"):
            own(x)


def test_an_unmerge_that_fails_changes_nothing(tmp_path):
    pytest.importorskip("safetensors")
    model, x = trained(), torch.randn(3, 24)
    pk.save_adapter(model, tmp_path)
    pk.merge(model)
    with torch.no_grad():
        model[0].up.pera_B.mul_(2.0)
    parametrizations.weight_norm(model[1].down, "weight")
    expected = model(x)
    with pytest.raises(TypeError, match=r"1\.down: the weight must be"):
        pk.unmerge(model)
    with pytest.raises(TypeError, match=r"1\.down: the weight must be"):
        pk.load_adapter(model, tmp_path, overwrite=True)
    assert torch.equal(model(x), expected)


COMPUTED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_not_merged_into(kind):
    model, x = nn.Sequential(layer()).eval(), torch.randn(3, 8)
    COMPUTED[kind](model[0])
    with torch.no_grad():
        expected = model(x)
    for change in (model[0].merge, lambda: pk.merge(model), lambda: pk.unload(model)):
        with pytest.raises(TypeError, match="computed"):
            change()
    with pytest.raises(TypeError, match="computed"):
        pk.unload(model, merge=False)
    with torch.no_grad():
        assert torch.equal(model(x), expected) and not model[0].merged


def test_a_weight_that_becomes_computed_while_merged_is_not_lost():
    own, x = layer(), torch.randn(3, 8)
    own.merge()
    expected = own(x)
    parametrizations.weight_norm(own, "weight")
    for change in (own.unmerge, own.state_dict):
        with pytest.raises(TypeError, match="computed"):
            change()
    torch.testing.assert_close(own(x), expected)
    parametrize.remove_parametrizations(own, "weight")
    own.unmerge()
    torch.testing.assert_close(own.weight, layer().weight)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_base_with_a_computed_weight_is_called(kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6)).eval()
    COMPUTED[kind](base[0])
    x = torch.randn(3, 8)
    expected = base(x)
    model = filled(pk.inject(base, ["0"], r=2))
    assert not torch.equal(model(x), expected)
    pk.unload(model, merge=False)
    torch.testing.assert_close(model(x), expected)


def test_one_tied_layer_is_not_merged():
    model = nn.Module()
    model.emb, model.lm_head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
    model.lm_head.weight = model.emb.weight
    filled(pk.inject(model, ["lm_head"], r=2))
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = own.emb.weight.clone()
        with pytest.raises(ValueError, match="would change emb.weight as well"):
            own.lm_head.merge()
        assert torch.equal(own.emb.weight, before)
    model.emb.weight = nn.Parameter(model.emb.weight.detach().clone())
    model.lm_head.merge()
    assert not torch.equal(model.lm_head.weight, model.emb.weight)


@pytest.mark.parametrize("keep_base", [True, False])
def test_unmerging_takes_away_what_was_added(keep_base):
    own, x = layer(), torch.randn(3, 8)
    weight = own.weight.clone()
    with own.disabled():
        base = own(x)
    own.merge(keep_base=keep_base)
    with torch.no_grad():
        own.alpha *= 9.0
        own.pera_B.mul_(3.0)
    own.pera_h = nn.Parameter(torch.randn(10))
    again = copy.deepcopy(own)
    with own.disabled():
        torch.testing.assert_close(own(x), base)
    own.unmerge()
    torch.testing.assert_close(own.weight, weight, rtol=1e-6, atol=1e-6)
    again.unmerge()
    torch.testing.assert_close(again.weight, weight, rtol=1e-6, atol=1e-6)


def test_a_state_dict_taken_while_merged_says_what_it_holds():
    model = trained()
    pk.merge(model)
    with pytest.warns(UserWarning, match=r"pera_kernels\.unload"):
        saved = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = pk.unload(copy.deepcopy(model)).state_dict()
    assert not torch.equal(saved["0.up.weight"], plain["0.up.weight"])
