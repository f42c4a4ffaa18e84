"""What PEFT models go through in use: saved while merged, mixed in batches, misspelt, offloaded."""

import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from pera_kernels.peft import PeraLayer, parameter_groups  # noqa: E402
from tests.test_peft import (  # noqa: E402
    adapted,
    config,
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


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tie", [False, True])
def test_an_adapted_output_layer_is_saved_and_loaded(tie, tmp_path):
    model = peft.get_peft_model(llama(tie), config(target_modules=["lm_head", "q_proj"])).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(tie), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    base = loaded.get_base_model()
    assert (base.lm_head.weight is base.get_input_embeddings().weight) is tie


# Merging.


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


# Mixed batches.


# Configurations.


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


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


class Twins(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(4, 4)
        self.heads = nn.ModuleList([self.v_proj])

    def forward(self, x):
        return self.v_proj(x) + 2 * self.heads[0](x)


def test_a_layer_under_two_names_is_left_alone_if_a_target_fails():
    base = Twins()
    base.add_module("embed_tokens", nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="embedding"):
        peft.get_peft_model(base, config(target_modules=["v_proj", "embed_tokens"]))
    assert type(base.v_proj) is nn.Linear and base.heads[0] is base.v_proj


# Where and how adapters are made.


def parameters(model):
    return [p.detach().clone() for n, p in model.named_parameters() if "pera_" in n]


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


def test_without_peft_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "pera_kernels.peft")
    with pytest.raises(ImportError, match=r'pip install "pera_kernels\[peft\]"') as raised:
        importlib.import_module("pera_kernels.peft")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
