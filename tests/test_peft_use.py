"""What PEFT models go through in use: saved while merged, mixed in batches, misspelt, offloaded."""

import copy
import importlib
import pickle
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pera_kernels as pk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from pera_kernels.peft import PeraLayer, parameter_groups  # noqa: E402
from tests.test_peft import (  # noqa: E402
    IDS,
    SIZES,
    adapted,
    config,
    gpt2,
    layers,
    llama,
    logits,
    roberta,
    trainer,
)


class Plain(nn.Module):
    """Two linear layers of which the second is adapted; what follows is said by the test."""

    def __init__(self, layer=None, after=lambda y: y):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.v_proj = layer or nn.Linear(4, 4)
        self.after = after

    def forward(self, x):
        return self.after(self.v_proj(self.first(x)))


def plain(layer=None, after=lambda y: y, **options):
    torch.manual_seed(0)
    model = Plain(layer, after)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(**{"target_modules": ["v_proj"], **options})).eval()


def ours(record):
    """The messages of this package's own warnings."""
    return {m for w in record if "PERA" in (m := str(w.message)) or "PeraConfig" in m}


@torch.no_grad()
def randomize(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.normal_()


# State dicts and files of merged models.


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_state_dict_taken_while_merged_is_that_of_before(make, keep_vars):
    name = make.__name__
    model = adapted(name)
    model.add_adapter("other", config(name, terms="square"))
    model.base_model.set_adapter(["default", "other"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merge_and_unload"):
        merged = model.state_dict(keep_vars=keep_vars)
    assert list(merged) == list(before)
    assert all(torch.equal(merged[n], t) for n, t in before.items())
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_merged_state_dict_loads_into_unmerged_and_merged_models():
    model = adapted()
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merge_and_unload"):
        saved = copy.deepcopy(model.state_dict())
    for merge in (False, True):
        other = adapted(seed=5)
        if merge:
            other.merge_adapter()
        other.load_state_dict(saved)
        assert not any(layer.merged for layer in layers(other).values())
        assert torch.equal(logits(other), expected)


def test_loading_the_parameters_of_a_merged_adapter_unmerges():
    model, other = adapted(), adapted(seed=5)
    model.merge_adapter()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
    assert torch.equal(logits(model), logits(other))
    # What concerns another adapter leaves the layer as it is.
    layer = next(iter(layers(model).values()))
    layer.merge()
    layer.load_state_dict({"pera_A.none": torch.zeros(1)}, strict=False)
    assert layer.merged


def test_a_model_merged_and_cast_holds_both_in_that_dtype():
    model = adapted()
    expected = {n: layer.base_layer.weight.bfloat16() for n, layer in layers(model).items()}
    model.merge_adapter()
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="merge_and_unload"):
        saved = model.state_dict()
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    model.unmerge_adapter()
    for name, weight in expected.items():
        assert torch.equal(saved[f"{name}.base_layer.weight"], weight)
        assert torch.equal(layers(model)[name].base_layer.weight, weight)


def test_copies_and_pickles_of_merged_models():
    model = adapted()
    expected = logits(model)
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="merge_and_unload"):
            saved = copy.deepcopy(other.state_dict())
        other.unmerge_adapter()
        assert torch.equal(logits(other), expected)
        assert all(torch.equal(t, saved[n]) for n, t in other.state_dict().items())
    assert all(layer.merged for layer in layers(model).values())


def test_saving_the_adapter_of_a_merged_model_does_not_warn(tmp_path):
    model = adapted(target_modules=["q_proj", "lm_head"])
    expected = logits(model)
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    assert not ours(record)
    # PEFT puts the base of lm_head beside its adapter: it must be the one without the adapter.
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)


def test_saving_the_base_of_a_merged_model_warns(tmp_path):
    model = adapted()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path)
    load_file = pytest.importorskip("safetensors.torch").load_file
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    weight = llama().get_submodule(name).weight
    assert torch.equal(saved[f"{name}.base_layer.weight"], weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tie", [False, True])
def test_an_adapted_output_layer_is_saved_and_loaded(tie, tmp_path):
    model = peft.get_peft_model(llama(tie), config(target_modules=["lm_head", "q_proj"])).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(tie), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    base = loaded.get_base_model()
    assert (base.lm_head.weight is base.get_input_embeddings().weight) is tie


def test_a_file_with_modules_that_the_model_has_not_warns(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = llama()
    del base.model.layers[1]
    with pytest.warns(UserWarning, match=r"3 modules with PERA adapters.*layers\.1\.mlp\.up_proj"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_loading_without_memory_for_the_adapter_keeps_its_bits(tmp_path):
    """PEFT moves what it has loaded to the base's dtype, which rounds float32 adapters."""
    model = peft.get_peft_model(llama().bfloat16(), config())
    randomize(model, "pera_")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    saved = peft.get_peft_model_state_dict(model)
    for name, tensor in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(tensor, saved[name]) and tensor.dtype == torch.float32


# Merging.


def test_unmerging_restores_the_base_whatever_became_of_the_adapter():
    model = adapted()
    before = {n: layer.base_layer.weight.clone() for n, layer in layers(model).items()}
    model.merge_adapter()
    randomize(model, "pera_")
    with pytest.warns(UserWarning, match="'default' is merged: its new scale"):
        for layer in layers(model).values():
            layer.set_scale("default", 3.0)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight, before[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(0.5)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


NOT_PLAIN = {
    "parametrized": (nn.utils.parametrizations.weight_norm, "computed anew"),
    "weight_norm": (nn.utils.weight_norm, "computed anew"),
    "pruned": (pruned, "computed anew"),
    "subclass": (lambda layer: Twice(4, 4), "its class computes something else"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_bases_that_are_not_plain_are_not_merged(kind, call):
    wrap, match = NOT_PLAIN[kind]
    model = plain(wrap(nn.Linear(4, 4)), target_modules=["first", "v_proj"])
    x = torch.randn(3, 4)
    expected = model(x)
    with pytest.raises(TypeError, match=f"v_proj: .*{match}"):
        getattr(model, call)()
    assert torch.equal(model(x), expected) and len(layers(model)) == 2


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_offloaded_layers_are_merged(call, safe):
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    merged = getattr(model, call)(safe_merge=safe) or model
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_merged_adapters_are_not_deleted():
    layer = next(iter(layers(adapted()).values()))
    layer.merge()
    with pytest.raises(ValueError, match="'default' is merged: unmerge"):
        layer.delete_adapter("default")
    assert list(layer.pera_A) == ["default"]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_adapter(adapter_names=["defualt"]),
        lambda model: model.merge_and_unload(adapter_names=["defualt"]),
        lambda model: model.base_model.set_adapter(["default", "defualt"]),
    ],
)
def test_misspelt_adapters_are_refused(call):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="no adapter 'defualt'; the model has 'default'"):
        call(model)
    assert torch.equal(logits(model), expected) and layers(model)


# Mixed batches.


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("active", ["default", "other", "third"])
def test_mixed_batches_take_the_whole_modules_of_each_adapter(active, beams):
    """Also where the active adapter, or one of the others, has none."""
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", config(r=2, terms="cross"))
    model.add_adapter("third", config(modules_to_save=["lm_head"]))
    randomize(model, "modules_to_save")
    model.set_adapter(active)
    ids, names = IDS[[0, 1, 0, 1]], ["default", "__base__", "other", "third"]
    options = {
        "max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    mixed = logits(model, ids, adapter_names=names)
    generated = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = llama()
        if name != "__base__":
            model.set_adapter(name)
            alone = model
        torch.testing.assert_close(mixed[row], logits(alone, ids)[row], atol=1e-5, rtol=1e-4)
        assert torch.equal(generated[row], alone.generate(input_ids=ids, **options)[row])


@pytest.mark.parametrize("bias", ["all", "pera_only"])
def test_mixed_batches_and_trained_biases(bias):
    model = adapted("roberta", bias=bias)
    randomize(model, "bias")
    expected = logits(model)
    torch.testing.assert_close(logits(model, adapter_names=["default"] * 2), expected)
    with pytest.raises(ValueError, match=f"'default' has trained biases .bias='{bias}'"):
        logits(model, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model), expected)


def test_disabled_adapters_stay_disabled_in_mixed_batches():
    model = adapted()
    model.base_model.disable_adapter_layers()
    mixed = logits(model, adapter_names=["default"] * 2)
    torch.testing.assert_close(mixed, logits(llama()))


# Configurations.


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


MISSES = {
    "targets": ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj'$"),
    "layers": ({"layers_to_transform": [0, 7]}, "layers_to_transform: 7$"),
    "excluded": ({"exclude_modules": ["v_proj", "k_porj"]}, "exclude_modules: 'k_porj'$"),
    "whole": ({"modules_to_save": ["lm_head", "lm_haed"]}, "modules_to_save: 'lm_haed'$"),
    "two": (
        {"target_modules": ["q_proj", "a"], "modules_to_save": ["zz"]},
        "target_modules: 'a'; modules_to_save: 'zz'$",
    ),
}


@pytest.mark.parametrize("kind", MISSES)
def test_entries_that_match_nothing_are_named_in_one_warning(kind):
    options, match = MISSES[kind]
    with pytest.warns(UserWarning, match=match) as record:
        model = adapted(**options)
    assert len(ours(record)) == 1
    with pytest.warns(UserWarning, match=match):
        model.add_adapter("other", config(**options))


@pytest.mark.parametrize("name", ["w1", "gate_up_proj"])
def test_experts_in_one_parameter_are_named_as_such(name):
    model = mixtral()
    parameters = {n.rpartition(".")[2] for n, _ in model.named_parameters()}
    with pytest.warns(UserWarning, match=f"target_modules: '{name}'") as record:
        if not any(n.endswith(name) for n, _ in model.named_modules()):
            peft.get_peft_model(model, config(target_modules=["q_proj", name]))
        else:
            pytest.skip("the experts of this transformers are modules")
    assert ("as experts in one tensor" in ours(record).pop()) is (name in parameters)


def test_no_needless_warnings_about_entries(tmp_path):
    options = {"target_modules": ["query", "value", "key"], "task_type": "SEQ_CLS"}
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = peft.get_peft_model(roberta(), config("roberta", **options))
        model.save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(roberta(), tmp_path)
        peft.PeftModel.from_pretrained(roberta(), tmp_path, is_trainable=True)
        adapted(target_modules="all-linear", exclude_modules=["down_proj"])
        adapted(target_modules=None, layers_to_transform=[1])
        adapted(target_modules=["v_proj"], layers_to_transform=[1], exclude_modules=["v_proj.x"])
    assert not ours(record)


def test_an_adapter_that_is_loaded_for_inference_does_not_warn_again(tmp_path):
    options = {"target_modules": ["q_proj", "v_porj"]}
    with pytest.warns(UserWarning, match="v_porj"):
        adapted(**options).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert not ours(record)
    with pytest.warns(UserWarning, match="v_porj"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


def test_layers_of_all_linear_are_refused():
    """PEFT would adapt every layer: names in full match whatever their layer is."""
    with pytest.raises(ValueError, match="layers_to_transform goes with a list"):
        config(target_modules="all-linear", layers_to_transform=[0])


def test_layers_of_inject_are_refused():
    model = pk.inject(llama(), ["q_proj"])
    with pytest.raises(ValueError, match="adapter of pera_kernels.inject already"):
        peft.get_peft_model(model, config())


class Twins(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(4, 4)
        self.heads = nn.ModuleList([self.v_proj])

    def forward(self, x):
        return self.v_proj(x) + 2 * self.heads[0](x)


def test_a_layer_under_two_names_is_adapted_under_both(tmp_path):
    torch.manual_seed(0)
    base = Twins()
    x = torch.randn(3, 4)
    before = base(x)
    model = peft.get_peft_model(base, config(target_modules=["v_proj"])).eval()
    adapters = [m for m in (base.v_proj, base.heads[0]) if isinstance(m, PeraLayer)]
    assert len(adapters) == 2 and adapters[0] is adapters[1]
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(Twins(), tmp_path)
    assert torch.equal(loaded(x), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert type(merged.v_proj) is nn.Linear and merged.heads[0] is merged.v_proj
    assert torch.equal(model.unload()(x), before)
    assert type(base.heads[0]) is nn.Linear


def test_a_layer_under_two_names_is_left_alone_if_a_target_fails():
    base = Twins()
    base.add_module("embed_tokens", nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="embedding"):
        peft.get_peft_model(base, config(target_modules=["v_proj", "embed_tokens"]))
    assert type(base.v_proj) is nn.Linear and base.heads[0] is base.v_proj


# Where and how adapters are made.


def parameters(model):
    return [p.detach().clone() for n, p in model.named_parameters() if "pera_" in n]


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapters_do_not_depend_on_the_defaults(dtype, init):
    def make():
        return plain(nn.Linear(4, 4, device="cpu", dtype=dtype), init_weights=init)

    torch.set_default_dtype(torch.float32)
    expected = parameters(make())
    assert {p.dtype for p in expected} == {torch.promote_types(dtype, torch.float32)}
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            got = parameters(make())
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(map(torch.equal, got, expected))


def test_adapters_are_on_the_device_of_the_base():
    base = Plain()
    with torch.device("meta"):
        model = peft.get_peft_model(base, config(target_modules=["v_proj"]))
        empty = peft.get_peft_model(Plain(), config(target_modules=["v_proj"]))
    assert model(torch.randn(3, 4)).device.type == "cpu"
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty(torch.empty(3, 4, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_made_in_inference_mode_train(dtype):
    layer = nn.Linear(4, 4, dtype=dtype)
    with torch.inference_mode():
        model = peft.get_peft_model(nn.Sequential(layer), config(target_modules=["0"]))
    model(torch.randn(3, 4, dtype=dtype)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pera_" in n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", [False, True])
def test_dtypes_of_adapters_are_those_of_lora(dtype, cast):
    kinds = []
    for options in (config(), peft.LoraConfig(target_modules=["v_proj"])):
        base = llama().to(dtype)
        model = peft.get_peft_model(base, options, autocast_adapter_dtype=cast)
        kinds.append({p.dtype for p in model.parameters() if p.requires_grad})
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "change", [nn.ReLU(inplace=True), lambda y: y.mul_(0.5), lambda y: y.add_(1)]
)
def test_outputs_may_be_changed_in_place(change):
    gradients = []
    for after in (change, lambda y: change(y.clone())):
        model = plain(after=after).train()
        torch.manual_seed(2)
        x = torch.randn(3, 4, requires_grad=True)
        model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 4
    assert all(map(torch.equal, *gradients))


# Weighted sums.


def test_weighted_sums_are_not_rounded_to_the_dtype_of_the_base():
    model = peft.get_peft_model(llama().bfloat16(), config()).eval()
    model.add_weighted_adapter(["default"], [1.0], "same")
    for layer in layers(model).values():
        own, same = (layer.get_delta_weight(name) for name in ("default", "same"))
        torch.testing.assert_close(same, own, atol=1e-6, rtol=1e-6)
        assert layer.pera_A["same"].dtype == layer.pera_A["default"].dtype == torch.float32


@pytest.mark.parametrize(
    "weights, combination, rank, match",
    [
        ([float("nan")], "cat", None, "weights must be finite"),
        ([1.0], "svd", 0, "svd_rank must be"),
        ([1.0], "svd", 2, r"layers\.1\.mlp\.up_proj: combination_type='svd' needs finite"),
        ([1.0], "svd", 10**6, r"layers\.1\.mlp\.up_proj: combination_type='svd' needs finite"),
    ],
)
def test_weighted_sums_that_are_not_finite_are_refused(weights, combination, rank, match):
    model = adapted()
    list(layers(model).values())[-1].pera_A["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(["default"], weights, "sum", combination, rank)
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.pera_A) == ["default"] for layer in layers(model).values())


def test_weighted_sums_of_whole_modules_are_refused():
    model = adapted(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save.*'default'"):
        model.add_weighted_adapter(["default"], [0.5], "sum")
    assert list(model.peft_config) == ["default"]


# Optimizers, and PEFT not installed.


def test_frozen_adapters_have_no_parameter_groups(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(peft.PeftModel.from_pretrained(llama(), tmp_path), 1e-3)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert [group["name"] for group in parameter_groups(model, 1e-3)] == [
        "factors", "coefficients"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="peft.get_peft_model"):
        parameter_groups(llama(), 1e-3)


def test_a_parameter_in_two_places_is_in_one_group_once():
    model = adapted()
    first, second, *_ = layers(model).values()
    for part in PeraLayer.adapter_layer_names:
        getattr(second, part)["default"] = getattr(first, part)["default"]
    groups = parameter_groups(model, 1e-3)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    torch.optim.AdamW(groups)


def test_trainer_with_the_groups_does_not_decay_coefficients(tmp_path):
    model = adapted().train()
    groups = parameter_groups(model, 0.0, weight_decay=0.5)
    run = trainer(model, tmp_path, 1, optimizers=(torch.optim.AdamW(groups), None))
    run.args.weight_decay = 0.5
    run.train()
    decays = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    own = {n: decays[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert {d for n, d in own.items() if ".pera_h." in n} == {0.0}
    assert {d for n, d in own.items() if ".pera_h." not in n} == {0.5}


def test_trainer_can_leave_coefficients_out_of_its_own_decay(tmp_path):
    """As docs/peft.md says."""

    class PeraTrainer(transformers.Trainer):
        def get_decay_parameter_names(self, model):
            return [n for n in super().get_decay_parameter_names(model) if ".pera_h." not in n]

    model = adapted().train()
    run = trainer(model, tmp_path, 1)
    run.__class__ = PeraTrainer
    run.args.weight_decay = 0.5
    groups = run.create_optimizer().param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    own = {n: decays[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".pera_")[1][0] for n, decay in own.items() if decay == 0.0} == {"h"}


SAVED = ("idle", "working", "untrained", "frozen", "no products")


@pytest.mark.parametrize("case", [*SAVED, "elsewhere", "missing", "flat", "packed", "mixed"])
def test_saving_warns_where_the_products_did_nothing(case, tmp_path):
    terms = "linear" if case == "no products" else "full"
    model = plain(terms=terms, init_weights=True).train()
    layer = model.base_model.model.v_proj
    with torch.no_grad():
        if case != "untrained":
            layer.pera_B["default"].normal_()
        for h in layer.pera_h.values():
            h.fill_(1.0 if case == "working" else 1e-5)
            h.requires_grad_(case != "frozen")
    state = model.state_dict()
    if case == "elsewhere":
        state = {key: value.to("meta") for key, value in state.items()}
    if case == "missing":
        state = {key: value for key, value in state.items() if "pera_A" not in key}
    if case == "flat":
        state = {key: value.flatten() for key, value in state.items()}
    if case in ("packed", "mixed"):
        dtype = torch.int8 if case == "packed" else torch.half
        state = {key: v.to(dtype) if "pera_B" in key else v for key, v in state.items()}
    warned = pytest.warns(UserWarning, match="less than 1 % of BA in every layer.*parameter_groups")
    with warned if case == "idle" else warnings.catch_warnings():
        warnings.simplefilter("always" if case == "idle" else "error")
        peft.get_peft_model_state_dict(model, state_dict=state)
        if case in SAVED:
            model.save_pretrained(tmp_path)
            assert (tmp_path / "adapter_model.safetensors").exists()


def test_without_peft_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "pera_kernels.peft")
    with pytest.raises(ImportError, match=r'pip install "pera_kernels\[peft\]"') as raised:
        importlib.import_module("pera_kernels.peft")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_adapters_that_are_not_called_are_named():
    class Fused(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            return hidden @ self._modules["lm_head"].weight.t()

    fused = Fused(llama().config)
    model = peft.get_peft_model(
        fused, config(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    with pytest.warns(UserWarning, match="1 adapted layers were not called.*: lm_head"):
        model(input_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=IDS)


def test_a_layer_whose_weight_is_read_is_refused():
    class Fused(Plain):
        def forward(self, x):
            return self.first(x) @ self.v_proj.weight.t()

    plain = Fused()
    with pytest.raises(ValueError, match=r"v_proj \(by Fused\)"):
        peft.get_peft_model(plain, config(target_modules=["v_proj"]))
    assert type(plain.v_proj) is nn.Linear and plain.v_proj.weight.requires_grad


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_checkpoint_computes_again_what_its_forward_computed(where):
    from torch.utils.checkpoint import checkpoint

    model, x = plain(), torch.randn(3, 4, requires_grad=True)

    def gradient(call):
        x.grad = None
        with model.disable_adapter() if where == "forward" else nullcontext():
            y = call(x)
        with model.disable_adapter() if where == "backward" else nullcontext():
            y.square().sum().backward()
        return x.grad

    expected = gradient(model)
    got = gradient(lambda x: checkpoint(model, x, use_reentrant=True))
    torch.testing.assert_close(got, expected)


def test_one_tied_layer_is_not_merged():
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(True), config(target_modules=["lm_head"]))
    before = model.base_model.model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match="would change model.embed_tokens.weight as well"):
        model.base_model.model.lm_head.merge()
    assert torch.equal(model.base_model.model.model.embed_tokens.weight, before)


def test_a_backward_unmerges_nothing():
    from torch.utils.checkpoint import checkpoint

    model, x = plain(), torch.randn(3, 4, requires_grad=True)
    model.merge_adapter()
    y = checkpoint(model, x, use_reentrant=False)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="outside of disable_adapter"):
        y.sum().backward()
    assert all(layer.merged for layer in layers(model).values())
