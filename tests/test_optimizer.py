"""Parameter groups: which parameters, at which rates, and what the default rate of h means."""

import copy
import json

import pytest
import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.adapters import checkpoint, load

LR = 1e-3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12), nn.Linear(12, 3))


def adapted(**options):
    return pk.inject(model(), ["0", "2"], **{"r": 2, **options})


def coefficients(groups):
    return [group for group in groups if group["name"] == "coefficients"]


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


def test_groups():
    m = adapted()
    m[3].weight.requires_grad_(True)
    groups = {g["name"]: g for g in pk.parameter_groups(m, LR, lr_h=0.5, weight_decay=0.1)}
    assert len(groups["factors"]["params"]) == 4 and groups["factors"]["lr"] == LR
    assert groups["coefficients"]["lr"] == 0.5 and groups["coefficients"]["weight_decay"] == 0.0
    assert "eps" not in groups["coefficients"] and len(groups["coefficients"]["params"]) == 2
    assert groups["other"]["params"] == [m[3].weight]
    assert groups["factors"]["weight_decay"] == groups["other"]["weight_decay"] == 0.1
    optimizer = torch.optim.AdamW(list(groups.values()))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 7


def test_only_h_has_another_rate_than_lr():
    groups = pk.parameter_groups(adapted(), LR)
    assert [g["lr"] for g in groups if g["name"] != "coefficients"] == [LR]
    assert [g["weight_decay"] for g in coefficients(groups)] == [0.0, 0.0]
    linear = pk.parameter_groups(adapted(terms="linear"), LR)
    assert [g["name"] for g in linear] == ["factors"]


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("terms", ["full", "square", "cross"])
def test_the_default_rate_of_h_is_a_tenth_of_lr_on_normalised_products(terms, init):
    """AdamW moves h as it moves q at lr / 10, where h = q / (rms(A) β²) and β = 8 lr."""
    torch.manual_seed(1)
    layer = pk.PeraLinear(400, 7, r=3, terms=terms, init=init, dtype=torch.float64)
    nn.init.normal_(layer.pera_B, std=8 * LR)
    for factor in (layer.pera_A, layer.pera_B):
        factor.requires_grad_(False)
    (group,) = pk.parameter_groups(layer, LR)
    # What A starts with, and not what was drawn.
    expected = 1 / 3 if init == "gaussian" else (3 * 400) ** -0.5
    assert rms(layer.pera_A) == pytest.approx(expected, rel=0.05)
    size = expected * (8 * LR) ** 2
    x, wanted = torch.randn(9, 400, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    other = copy.deepcopy(layer)
    q = torch.zeros_like(layer.pera_h, requires_grad=True)

    def loss(h):
        A, B = other.pera_A, other.pera_B
        y = pk.reference.pera_linear(x, other.weight, A, B, h, other.bias, terms=terms)
        return (y - wanted).square().mean()

    by_rule = torch.optim.AdamW([group])
    by_definition = torch.optim.AdamW([q], lr=LR / 10, eps=1e-8, weight_decay=0.0)
    for _ in range(7):
        for optimizer, compute in (
            (by_rule, lambda: (layer(x) - wanted).square().mean()),
            (by_definition, lambda: loss(q / size)),
        ):
            optimizer.zero_grad()
            compute().backward()
            optimizer.step()
    assert layer.pera_h.abs().max() > 0
    torch.testing.assert_close(layer.pera_h, q / size, rtol=1e-9, atol=0)


def test_layers_of_one_width_share_a_group_and_every_width_has_its_own():
    m = nn.ModuleList(nn.Linear(n, 8) for n in (12, 48, 12, 48))
    groups = coefficients(pk.parameter_groups(pk.inject(m, ["0", "1", "2", "3"], r=2), LR))
    assert [g["params"] for g in groups] == [
        [m[0].pera_h, m[2].pera_h],
        [m[1].pera_h, m[3].pera_h],
    ]
    # √(3N): wider layers have smaller products, and gradients of h.
    assert groups[1]["lr"] == pytest.approx(2 * groups[0]["lr"])
    assert groups[1]["eps"] == pytest.approx(groups[0]["eps"] / 2)


def test_a_smaller_lr_makes_smaller_products_and_a_larger_rate_of_h():
    (fast, slow) = (coefficients(pk.parameter_groups(adapted(), lr))[0] for lr in (1e-2, 1e-4))
    assert slow["lr"] == pytest.approx(100 * fast["lr"])
    assert slow["eps"] == pytest.approx(1e-4 * fast["eps"])


def test_a_rate_of_zero_moves_nothing():
    m = adapted()
    before = [p.clone() for p in pk.adapter_parameters(m)]
    groups = pk.parameter_groups(m, 0.0)
    assert {g["lr"] for g in groups} == {0.0}
    m(torch.randn(5, 12)).sum().backward()
    torch.optim.AdamW(groups).step()
    assert all(map(torch.equal, pk.adapter_parameters(m), before))


def test_the_share_of_the_products_is_far_above_that_of_one_rate_for_all():
    torch.manual_seed(2)
    x, wanted = torch.randn(64, 48), torch.randn(64, 48)
    shares = {}
    for rule, lr_h in (("default", None), ("one rate", LR)):
        torch.manual_seed(3)
        layer = pk.PeraLinear(48, 48, r=8)
        optimizer = torch.optim.AdamW(pk.parameter_groups(layer, LR, lr_h=lr_h))
        for _ in range(40):
            optimizer.zero_grad()
            (layer(x) - wanted).square().mean().backward()
            optimizer.step()
        shares[rule] = layer.quadratic_share()
    assert shares["one rate"] < 1e-3 < 0.1 < shares["default"]


def test_gradients_below_the_usual_eps_do_not_stop_h():
    """At small factors all of h's gradient is below 1e-8."""
    moved = {}
    for eps in (1e-8, None):
        torch.manual_seed(0)
        layer = pk.PeraLinear(1024, 64, r=4)
        groups = pk.parameter_groups(layer, 1e-5, eps=eps)
        optimizer = torch.optim.AdamW(groups)
        x = torch.randn(64, 1024)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - 1.0).square().mean().backward()
            optimizer.step()
        assert layer.pera_h.grad.abs().max() < 1e-8
        moved[eps] = layer.pera_h.abs().mean() / coefficients(groups)[0]["lr"]
    # Steps of about the rate, against a small part of one.
    assert moved[1e-8] > 1 > 0.5 > moved[None]


def test_eps_is_left_out_for_optimizers_without_a_single_one():
    groups = pk.parameter_groups(adapted(), LR, eps=None)
    assert not any("eps" in group for group in groups)
    m = adapted()
    optimizer = torch.optim.Adafactor(pk.parameter_groups(m, LR, eps=None))
    m(torch.randn(5, 12)).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in pk.adapter_parameters(m))


def test_bad_rates_and_plain_models_are_refused():
    m = adapted()
    with pytest.raises(ValueError, match="lr_h must be finite and >= 0; got -1"):
        pk.parameter_groups(m, LR, lr_h=-1)
    with pytest.raises(ValueError, match="eps must be finite and >= 0; got nan"):
        pk.parameter_groups(m, LR, eps=float("nan"))
    with pytest.raises(TypeError, match="lr must be a number"):
        pk.parameter_groups(m, "fast")
    with pytest.raises(TypeError, match="lr must be a number"):
        pk.parameter_groups(m, None)
    with pytest.raises(ValueError, match="no adapter to train: call inject first"):
        pk.parameter_groups(model(), LR)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_adapter_that_goes_on_training_has_the_rate_that_it_had(init, tmp_path):
    pytest.importorskip("safetensors")
    before = adapted(init=init)
    pk.save_adapter(before, tmp_path)
    after = model()
    pk.load_adapter(after, tmp_path)
    filled = adapted()
    pk.load_adapter(filled, tmp_path)
    rates, *others = (
        [group["lr"] for group in coefficients(pk.parameter_groups(m, LR))]
        for m in (before, after, filled)
    )
    assert others == [rates, rates]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_weights"] == init
    # Files of old do not say how A began: a layer keeps its own.
    read = checkpoint.read_adapter(tmp_path)
    for options in read.options.values():
        assert options.pop("init") == init
    own = adapted(init="gaussian")
    load.place(own, read, True, True, "auto", None)
    assert {layer.init for layer in pk.adapted_modules(own).values()} == {"gaussian"}


class TestWarning:
    """save_adapter says where the products did nothing."""

    @staticmethod
    def trained(h, B=0.1, **options):
        m = adapted(**options)
        for layer in pk.adapted_modules(m).values():
            nn.init.normal_(layer.pera_B, std=B)
            if layer.pera_h is not None:
                nn.init.constant_(layer.pera_h, h)
        return m

    def test_it_warns(self, tmp_path):
        pytest.importorskip("safetensors")
        with pytest.warns(UserWarning, match=r"less than 1 % .* in every layer.*parameter_groups"):
            pk.save_adapter(self.trained(h=1e-6), tmp_path)
        loaded = model()
        pk.load_adapter(loaded, tmp_path)
        assert len(pk.adapted_modules(loaded)) == 2

    @pytest.mark.parametrize(
        "options",
        [
            {"h": 5.0},
            {"h": 0.0, "B": 0.0},
            {"h": 0.0, "terms": "linear"},
            {"h": float("nan")},
        ],
        ids=["they do", "untrained", "no products", "not finite"],
    )
    def test_it_does_not_warn(self, options, tmp_path, recwarn):
        pytest.importorskip("safetensors")
        pk.save_adapter(self.trained(**options), tmp_path)
        assert not [w for w in recwarn if "products" in str(w.message)]

    def test_a_frozen_h_is_no_mistake(self, tmp_path, recwarn):
        pytest.importorskip("safetensors")
        m = self.trained(h=0.0)
        for layer in pk.adapted_modules(m).values():
            layer.pera_h.requires_grad_(False)
        pk.save_adapter(m, tmp_path)
        assert not [w for w in recwarn if "products" in str(w.message)]
