"""inject and its companions on small models."""

import pytest
import torch
from torch import nn

import pera_kernels as pk


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.my_v_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.q_proj(x) + self.v_proj(x) + self.my_v_proj(x))


def model():
    return nn.ModuleDict({"layers": nn.Sequential(Block(), Block()), "head": nn.Linear(8, 5)})


def test_names_match_whole_segments():
    m = model()
    assert pk.inject(m, ["v_proj"], r=2) is m
    assert set(pk.adapted_modules(m)) == {"layers.0.v_proj", "layers.1.v_proj"}
    assert type(m["layers"][0].my_v_proj) is nn.Linear


def test_a_path_and_a_regular_expression():
    m = pk.inject(model(), ["1.q_proj", "head"], r=2)
    assert set(pk.adapted_modules(m)) == {"layers.1.q_proj", "head"}
    m = pk.inject(model(), r"layers\.\d\.(q|v)_proj|layers", r=2)
    assert len(pk.adapted_modules(m)) == 4


def test_everything_else_is_frozen_and_output_unchanged():
    m = model()
    x = torch.randn(3, 8)
    before = m["layers"](x)
    pk.inject(m, ["q_proj"], r=2, terms="square")
    trainable = {name for name, p in m.named_parameters() if p.requires_grad}
    assert trainable == {
        f"layers.{i}.q_proj.pera_{letter}" for i in (0, 1) for letter in ("A", "B", "h")
    }
    assert torch.equal(m["layers"](x), before)
    assert len(list(pk.adapter_parameters(m))) == 6


def test_a_second_injection_keeps_the_first_trainable():
    m = pk.inject(model(), ["q_proj"], r=2)
    pk.inject(m, ["v_proj"], r=3)
    assert len(pk.adapted_modules(m)) == 4
    assert all(p.requires_grad for p in pk.adapter_parameters(m))


def test_a_shared_layer_gets_one_adapter():
    m = model()
    m["layers"][1].q_proj = m["layers"][0].q_proj
    pk.inject(m, ["q_proj"], r=2)
    assert m["layers"][1].q_proj is m["layers"][0].q_proj
    assert len(list(pk.adapter_parameters(m))) == 3


def test_training_mode_follows_the_layer():
    m = pk.inject(model().eval(), ["q_proj"], r=2, dropout=0.5)
    assert not m["layers"][0].q_proj.training


@pytest.mark.parametrize(
    "targets, error, words",
    [
        (["absent"], ValueError, "'absent' matches no linear layer.*layers.0.q_proj"),
        (["norm"], ValueError, "norm is a LayerNorm, not a linear layer"),
        ([], ValueError, "non-empty list"),
        ("(", ValueError, "does not compile"),
        ([3], ValueError, "got \\[3\\]"),
    ],
)
def test_bad_targets_leave_the_model_alone(targets, error, words):
    m = model()
    with pytest.raises(error, match=words):
        pk.inject(m, targets, r=2)
    assert not pk.adapted_modules(m)
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"r": 0}, ValueError, "r must be an int >= 1"),
        ({"terms": "cubic"}, ValueError, "terms must be one of"),
        ({"dropout": 1.5}, ValueError, "dropout must be in \\[0, 1\\)"),
        ({"alpha": -1}, ValueError, "alpha must be finite and > 0"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, words):
    m = model()
    with pytest.raises(error, match=words):
        pk.inject(m, ["q_proj"], **options)
    assert not pk.adapted_modules(m)
    assert all(p.requires_grad for p in m.parameters())


def test_adapting_twice_is_refused():
    m = pk.inject(model(), ["q_proj"], r=2)
    with pytest.raises(ValueError, match="layers.0.q_proj is a PeraLinear already"):
        pk.inject(m, ["q_proj"], r=2)
    with pytest.raises(ValueError, match="already"):
        pk.PeraLinear.from_linear(m["layers"][0].q_proj, 2)


def test_a_layer_whose_weight_is_read_without_a_call_is_refused():
    m = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="attention.out_proj .by MultiheadAttention."):
        pk.inject(m, ["out_proj"], r=2)


def test_parameter_groups():
    m = pk.inject(model(), ["q_proj"], r=2)
    m["head"].weight.requires_grad_(True)
    groups = {g["name"]: g for g in pk.parameter_groups(m, 1e-3, lr_h=0.5, weight_decay=0.1)}
    assert len(groups["factors"]["params"]) == 4 and groups["factors"]["lr"] == 1e-3
    assert groups["coefficients"]["lr"] == 0.5 and groups["coefficients"]["weight_decay"] == 0.0
    assert groups["other"]["params"] == [m["head"].weight]
    optimizer = torch.optim.AdamW(list(groups.values()))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 7
    default = pk.parameter_groups(m, 1e-3)
    assert [g["lr"] for g in default] == [1e-3] * 3


def test_parameter_groups_refuse_bad_rates_and_plain_models():
    m = pk.inject(model(), ["q_proj"], r=2)
    with pytest.raises(ValueError, match="lr_h must be finite and >= 0; got -1"):
        pk.parameter_groups(m, 1e-3, lr_h=-1)
    with pytest.raises(TypeError, match="lr must be a number"):
        pk.parameter_groups(m, "fast")
    with pytest.raises(ValueError, match="no adapter to train: call inject first"):
        pk.parameter_groups(model(), 1e-3)
