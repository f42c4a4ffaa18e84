"""inject and its companions on small models."""

import warnings

import pytest
import torch
from torch import nn

import pera_kernels as pk
from tests.adapted import (
    Attention,
    Classifier,
    assert_unchanged,
    filled,
    plain_model,
    refused,
    state,
    trained,
)


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


def test_every_target_of_a_list_has_to_match():
    refused(Attention(), "'v_porj' matches no linear", lambda m: pk.inject(m, ["q_proj", "v_porj"]))


def test_experts_in_one_tensor_are_named():
    model = Attention()
    model.experts = nn.ParameterDict({"gate_up_proj": torch.zeros(2, 8, 8)})
    refused(model, "Experts in one tensor", lambda m: pk.inject(m, ["q_proj", "gate_up_proj"]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("target", ["a", "b"])
def test_a_module_with_two_names_is_one(target, tmp_path):
    pytest.importorskip("safetensors")
    model, fresh, x = Twice(), Twice(), torch.randn(3, 8)
    filled(pk.inject(model, [target], r=2))
    assert model.a is model.b
    pk.save_adapter(model, tmp_path)
    pk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    pk.merge(model)
    torch.testing.assert_close(model(x), fresh(x))
    pk.unload(model)
    assert type(model.a) is nn.Linear and model.a is model.b


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def __setattr__(self, name, value):
        if name == "last" and isinstance(value, pk.PeraLinear):
            raise RuntimeError("not here")
        super().__setattr__(name, value)


def test_a_parent_that_takes_no_other_child_leaves_the_model_as_it_was():
    model = Stubborn()
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="not here"):
        pk.inject(model, ["q_proj", "last"], r=2)
    assert_unchanged(model, before, kinds)
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_hooks


@pytest.mark.parametrize("targets", [["0"], ["0", "1"]])
def test_lazy_parameters_are_refused(targets):
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias get theirs"):
        pk.inject(model, targets, r=2)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(TypeError, match="first call"):
        pk.PeraLinear.from_linear(nn.LazyLinear(4))


def test_a_head_is_frozen_with_a_word():
    with pytest.warns(UserWarning, match=r"freezes classifier.*modules_to_save=\['classifier'\]"):
        model = pk.inject(Classifier(), ["body"], r=2)
    assert not model.classifier.weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Classifier(), ["body"], r=2, modules_to_save=())
        model = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])
    assert model.classifier.weight.requires_grad
    refused(
        Classifier(),
        "modules_to_save: 'clasifier' matches no module",
        lambda m: pk.inject(m, ["body"], r=2, modules_to_save=["clasifier"]),
    )


@pytest.mark.parametrize("saved", [["body"], ["embedding"]])
def test_a_base_that_would_train_is_refused(saved):
    def model():
        made = Classifier()
        made.embedding = nn.Embedding(8, 8)
        made.embedding.weight = made.body.weight
        return made

    refused(model(), "body: weight must not require grad",
            lambda m: pk.inject(m, ["body"], r=2, modules_to_save=saved))  # fmt: skip


def test_a_head_that_is_the_target_is_not_said_to_be_frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Classifier(), ["classifier"], r=2)


def test_ties_are_those_of_the_last_injection():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    pk.inject(model, ["0"], r=2)
    pk.inject(model, ["1"], r=2)
    with pytest.raises(ValueError, match="1.weight"):
        model[0].merge()
    model[1].weight = nn.Parameter(model[1].weight.clone(), requires_grad=False)
    model[0].merge()


def test_a_second_injection_leaves_alone_what_trains():
    model = pk.inject(Attention(), ["q_proj"], r=2, modules_to_save=["v_proj"])
    model.q_proj.pera_h.requires_grad_(False)
    pk.inject(model, ["k_proj"], r=2)
    assert model.v_proj.weight.requires_grad and not model.q_proj.pera_h.requires_grad
    assert not model.k_proj.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_over_half_precision_are_float32(dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = trained(plain_model().to(dtype))
    assert {p.dtype for p in pk.adapter_parameters(model)} == {torch.float32}
    model(torch.randn(2, 24, dtype=dtype)).sum().backward()
    asked = trained(plain_model().to(dtype), adapter_dtype=dtype)
    assert {p.dtype for p in pk.adapter_parameters(asked)} == {dtype}
    pk.save_adapter(asked, tmp_path)
    promoted, kept = plain_model().to(dtype), plain_model().to(dtype)
    pk.load_adapter(promoted, tmp_path)
    pk.load_adapter(kept, tmp_path, adapter_dtype=dtype)
    assert {p.dtype for p in pk.adapter_parameters(promoted)} == {torch.float32}
    assert {p.dtype for p in pk.adapter_parameters(kept)} == {dtype}
    with pytest.raises(ValueError, match="adapter_dtype goes with a model without adapters"):
        pk.load_adapter(kept, tmp_path, overwrite=True, adapter_dtype=dtype)


def test_a_model_that_is_synchronized_takes_no_new_adapters(tmp_path):
    """Their gradients would differ from process to process."""
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path / "adapter")
    file = tmp_path / "store"
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(plain_model())
        for change in (
            lambda: pk.inject(model, ["up"], r=2),
            lambda: pk.load_adapter(model, tmp_path / "adapter"),
        ):
            with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
                change()
        adapted = nn.parallel.DistributedDataParallel(trained(seed=5))
        pk.load_adapter(adapted, tmp_path / "adapter", overwrite=True)
        x = torch.randn(2, 24)
        assert torch.equal(adapted(x), trained()(x))
    finally:
        torch.distributed.destroy_process_group()


def test_why_adapters_over_half_precision_are_float32():
    """What the README says of them: small steps vanish in bfloat16, GradScaler refuses float16."""

    def moved(dtype):
        model = trained(plain_model().bfloat16(), adapter_dtype=dtype)
        before = [p.clone() for p in pk.adapter_parameters(model)]
        optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-5, weight_decay=0.0)
        model(torch.randn(9, 24).bfloat16()).float().square().mean().backward()
        optimizer.step()
        pairs = zip(before, pk.adapter_parameters(model), strict=True)
        return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for b in before)

    assert moved(torch.float32) > 0.9 and moved(torch.bfloat16) < 0.5
    for dtype in (None, torch.float16):
        model = trained(plain_model().half(), adapter_dtype=dtype)
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        scaler.scale(model(torch.randn(9, 24).half()).float().mean()).backward()
        if dtype is None:
            scaler.unscale_(optimizer)
        else:
            with pytest.raises(ValueError, match="unscale FP16 gradients"):
                scaler.unscale_(optimizer)
