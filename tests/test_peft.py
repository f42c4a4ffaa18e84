"""PERA as a method of the real PEFT, on tiny transformers models built from configurations."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import pera_kernels as pk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from pera_kernels.peft import PeraConfig, PeraLayer, parameter_groups, register  # noqa: E402

IDS = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 6, 8, 10, 12, 2]])


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(tie=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.2,
    )
    return transformers.RobertaForSequenceClassification(config).eval()


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "up_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
    "roberta": (roberta, ["query", "value"]),
}


def config(name="llama", **options):
    return PeraConfig(
        **{"r": 3, "target_modules": MODELS[name][1], "init_weights": False, **options}
    )


def adapted(name="llama", seed=1, **options):
    model = MODELS[name][0]()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config(name, **options)).eval()


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PeraLayer)}


def base_weights(model):
    return {n: p.clone() for n, p in model.named_parameters() if "pera_" not in n}


@pytest.mark.parametrize("terms", pk.terms.TERMS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_update_in_the_weights(name, terms):
    """Every layer adds s φ(B) diag(1, h) φ(A), also over Conv1D, whose weight is transposed."""
    model = adapted(name, terms=terms, pera_alpha=2.0)
    ours = logits(model)
    plain = MODELS[name][0]()
    base = logits(plain)
    for path, layer in layers(model).items():
        target = plain.get_submodule(path.removeprefix("base_model.model."))
        view = layer.pera_view()
        delta = pk.delta_weight(view.A, view.B, view.h, scale=2.0 / 3.0, terms=terms)
        target.weight.data += delta.t() if name == "gpt2" else delta
    torch.testing.assert_close(ours, logits(plain), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_new_adapters_change_nothing_and_are_what_trains(name):
    model = peft.get_peft_model(MODELS[name][0](), config(name, init_weights=True))
    torch.testing.assert_close(logits(model.eval()), logits(MODELS[name][0]()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".pera_" in n for n in trained)
    assert len(trained) == 3 * len(layers(model))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, low, tmp_path):
    model = adapted(name, pera_dropout=0.1)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PERA" and saved["r"] == 3
    loaded = peft.PeftModel.from_pretrained(MODELS[name][0](), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(loaded.eval()), logits(model))
    # The package's own loader reads the folder as well, where the layers are plain.
    if name != "gpt2":
        own = MODELS[name][0]()
        pk.load_adapter(own, tmp_path)
        torch.testing.assert_close(logits(own.eval()), logits(model))


def test_patterns_and_rslora_are_saved(tmp_path):
    model = adapted(rank_pattern={"layers.0.self_attn.q_proj": 5}, alpha_pattern={"v_proj": 7.0},
                    use_rslora=True, pera_alpha=2.0)  # fmt: skip
    own = {n.split("model.layers.")[1]: m for n, m in layers(model).items()}
    q, v = own["0.self_attn.q_proj"], own["1.self_attn.v_proj"]
    assert q.r == {"default": 5} and v.scaling == {"default": 7.0 / 3**0.5}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    plain = llama()
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain.eval()), logits(model))


def test_auto_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_all_linear_and_exclude():
    model = adapted(target_modules="all-linear", exclude_modules=["down_proj"])
    ends = {n.rpartition(".")[2] for n in layers(model)}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_layers_to_transform():
    model = adapted(layers_to_transform=[1])
    assert all(".layers.1." in n for n in layers(model)) and len(layers(model)) == 3


def test_several_adapters():
    model = adapted()
    first = logits(model)
    torch.manual_seed(9)
    model.add_adapter("other", config(r=2, terms="square"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    assert torch.equal(logits(model), second)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    for layer in layers(model).values():
        total = sum(layer.get_delta_weight(name) for name in ("default", "other"))
        layer.base_layer.weight.data += total
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), both, atol=2e-5, rtol=1e-4)
    model.delete_adapter("other")
    assert all(
        list(m.pera_A) == ["default"] and list(m.r) == ["default"] for m in layers(model).values()
    )


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge(name):
    model = adapted(name)
    before, expected = base_weights(model), logits(model)
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers(model).values())
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(t, base_weights(model)[n]) for n, t in before.items())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload(name, safe):
    model = adapted(name)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)
    assert set(merged.state_dict()) == set(MODELS[name][0]().state_dict())


def test_unload_leaves_the_base():
    model = adapted()
    model.merge_adapter()
    plain = model.unload()
    assert not layers(plain) and torch.equal(logits(plain), logits(llama()))


def test_a_merge_that_fails_changes_nothing():
    model = adapted()
    last = list(layers(model).values())[-1]
    last.pera_B["default"].data[0, 0] = float("inf")
    before = base_weights(model)
    for call in (
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: merging default"):
            call()
        assert not any(layer.merged for layer in layers(model).values())
        assert all(torch.equal(t, base_weights(model)[n]) for n, t in before.items())


def test_tied_weights_are_refused():
    model = peft.get_peft_model(llama(tie=True), config(target_modules=["lm_head", "q_proj"]))
    before = base_weights(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"lm_head.*is also .*embed_tokens"):
            call()
    assert all(torch.equal(t, base_weights(model)[n]) for n, t in before.items())
    assert model.unload() is not None


def test_modules_to_save(tmp_path):
    torch.manual_seed(1)
    model = peft.get_peft_model(roberta(), config("roberta", modules_to_save=["classifier"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                assert p.requires_grad
                p.normal_()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(roberta(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    plain = roberta().eval()
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("bias", ["all", "pera_only"])
def test_biases_train_and_are_saved(bias, tmp_path):
    model = peft.get_peft_model(roberta(), config("roberta", bias=bias))
    biases = {n for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    everything = sum(n.endswith("bias") for n, _ in model.named_parameters())
    assert len(biases) == (everything if bias == "all" else len(layers(model)))
    model.train()
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in biases and p.grad is not None:
                p -= p.grad
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(roberta(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_inject_adapter_in_model():
    model = llama()
    torch.manual_seed(1)
    peft.inject_adapter_in_model(config(), model)
    assert torch.equal(logits(model), logits(adapted()))
    own = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(config(), llama())
    peft.set_peft_model_state_dict(other, own)
    assert torch.equal(logits(other), logits(model))


def test_transformers_adapters(tmp_path):
    model = llama()
    torch.manual_seed(1)
    try:
        model.add_adapter(config(), adapter_name="mine")
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"this transformers refuses this peft: {error}")
        raise
    expected = logits(model)
    assert torch.equal(expected, logits(adapted()))
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(loaded.eval()), expected)
    loaded.disable_adapters()
    torch.testing.assert_close(logits(loaded), logits(llama()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)


def test_generate():
    model = adapted()
    ours = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload()
    assert torch.equal(
        ours, merged.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    )


def gradients(model, **kwargs):
    model.zero_grad()
    torch.manual_seed(0)
    model(input_ids=IDS, labels=IDS, **kwargs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(dropout):
    model = adapted(pera_dropout=dropout).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_autocast_and_half_precision():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model)
    torch.testing.assert_close(half.float(), logits(model), atol=0.1, rtol=0.1)
    torch.manual_seed(1)
    low = peft.get_peft_model(llama().bfloat16(), config()).eval()
    assert {p.dtype for n, p in low.named_parameters() if "pera_" in n} == {torch.float32}
    assert logits(low).dtype == torch.bfloat16
    torch.manual_seed(1)
    both = peft.get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False).eval()
    assert {p.dtype for n, p in both.named_parameters() if "pera_" in n} == {torch.bfloat16}
    assert logits(both).dtype == torch.bfloat16


def test_compile():
    model = adapted()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_copies_and_pickles():
    model = adapted()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.arange(index, index + 8) % 60 + 2
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, steps, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=Samples(), **options)


def test_trainer_resumes(tmp_path):
    def model():
        return adapted(init_weights=True, seed=2).train()

    whole = model()
    trainer(whole, tmp_path / "whole", 4).train()
    trainer(model(), tmp_path / "parts", 2).train()
    resumed = model()
    trainer(resumed, tmp_path / "parts", 4).train(str(tmp_path / "parts" / "checkpoint-2"))
    changed = peft.get_peft_model_state_dict(whole)
    start = peft.get_peft_model_state_dict(model())
    assert any(not torch.equal(changed[n], start[n]) for n in changed)
    assert (tmp_path / "whole" / "checkpoint-4" / "adapter_config.json").exists()
    resumed_logits = logits(resumed.eval())
    assert torch.isfinite(resumed_logits).all()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "parts" / "checkpoint-4").eval()
    torch.testing.assert_close(logits(loaded), resumed_logits)


def test_coefficients_at_their_own_rate(tmp_path):
    model = adapted().train()
    groups = parameter_groups(model, 1e-3, lr_h=0.5, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["factors", "coefficients"]
    assert groups[1]["lr"] == 0.5 and groups[1]["weight_decay"] == 0.0
    hs = {n: p.clone() for n, p in model.named_parameters() if ".pera_h." in n}
    As = {n: p.clone() for n, p in model.named_parameters() if ".pera_A." in n}
    trainer(model, tmp_path, 1, optimizers=(torch.optim.SGD(groups), None)).train()
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[n], p) for n, p in hs.items())
    assert any(not torch.equal(now[n], p) for n, p in As.items())
    with pytest.raises(ValueError, match="no trainable adapter"):
        parameter_groups(llama().requires_grad_(False), 1e-3)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_default_rate_of_h_is_that_of_plain_layers(init):
    """By width, and by what A starts with."""
    model = adapted(init_weights=init).train()
    got = {h: g for g in parameter_groups(model, 1e-3) for h in g["params"]}
    plain = "gaussian" if init == "gaussian" else "kaiming"
    for layer in layers(model).values():
        own = pk.PeraLinear(layer.in_features, layer.out_features, layer.r["default"], init=plain)
        (_, expected) = pk.parameter_groups(own, 1e-3)
        group = got[layer.pera_h["default"]]
        assert group["name"] == expected["name"] == "coefficients"
        assert group["lr"] == pytest.approx(expected["lr"])
        assert group["eps"] == pytest.approx(expected["eps"])


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_add_weighted_adapter(combination):
    model = adapted()
    torch.manual_seed(9)
    model.add_adapter("other", config(r=2, terms="square", pera_alpha=1.0))
    rank = {"svd_rank": 32} if combination == "svd" else {}
    model.add_weighted_adapter(
        ["default", "other"], [0.25, -2.0], "sum", combination_type=combination, **rank
    )
    for layer in layers(model).values():
        expected = 0.25 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-4)
        assert layer.terms["sum"] == "linear" and layer.scaling["sum"] == 1.0
    model.set_adapter("sum")
    assert torch.isfinite(logits(model)).all()


def test_add_weighted_adapter_survives_saving(tmp_path):
    model = adapted()
    torch.manual_seed(9)
    model.add_adapter("other", config(r=2, layers_to_transform=[0]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((["default"], [1.0, 2.0], "sum"), "one length"),
        ((["none"], [1.0], "sum"), "no adapter 'none'"),
        ((["default"], [1.0], "default"), "already"),
        ((["default"], [1.0], "sum", "linear"), "combination_type must be"),
        ((["default"], [1.0], "sum", "svd"), "svd_rank"),
    ],
)
def test_add_weighted_adapter_refuses(arguments, match):
    model = adapted()
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


def test_mixed_batches():
    model = adapted()
    torch.manual_seed(9)
    model.add_adapter("other", config(r=2, terms="cross"))
    ids = IDS[[0, 1, 0, 1]]
    mixed = logits(model, ids, adapter_names=["default", "__base__", "other", "default"])
    for adapter, rows in (("default", [0, 3]), ("other", [2])):
        model.set_adapter(adapter)
        torch.testing.assert_close(mixed[rows], logits(model, ids)[rows])
    torch.testing.assert_close(mixed[[1]], logits(llama(), ids)[[1]])
    together = model.generate(
        input_ids=IDS, adapter_names=["other", "__base__"], max_new_tokens=4, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    model.set_adapter("other")
    alone = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(together[0], alone[0])
    beams = model.generate(
        input_ids=IDS, adapter_names=["other", "other"], max_new_tokens=4, num_beams=2,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    expected = model.generate(
        input_ids=IDS, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0
    )
    assert torch.equal(beams, expected)


def test_mixed_batches_refuse():
    model = adapted()
    with pytest.raises(ValueError, match="'none'"):
        logits(model, adapter_names=["default", "none"])
    with pytest.raises(ValueError, match="one name for each of the 2 samples"):
        logits(model, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), adapter_names=["default", "default"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        logits(model, adapter_names=["default", "default"])


def assert_untouched(model, kinds):
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


BAD_TARGETS = {
    "embedding": (llama, ["q_proj", "embed_tokens"], r"embed_tokens, a Embedding: an embedding"),
    "norm": (llama, ["q_proj", "norm"], "not a linear layer"),
    "nothing": (llama, ["nonsense"], "nonsense"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_targets_that_cannot_be_adapted(name):
    make, targets, match = BAD_TARGETS[name]
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(model, config(target_modules=targets))
    assert_untouched(model, kinds)


def test_convolutions_experts_and_attention_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 4
            self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    model.add_module("experts", Experts())
    model.add_module("attention", nn.MultiheadAttention(4, 1))
    for target, match in (
        ("conv", "convolution"),
        ("experts", "experts"),
        ("attention", "MultiheadAttention"),
        ("attention.out_proj", "MultiheadAttention"),
    ):
        with pytest.raises(ValueError, match=match):
            peft.get_peft_model(model, config(target_modules=["first", target]))
        assert type(model.first) is nn.Linear


def test_a_second_adapter_that_fails_leaves_the_first():
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="embedding"):
        model.add_adapter("bad", config(target_modules=["q_proj", "embed_tokens"]))
    assert list(model.peft_config) == ["default"]
    assert all(list(m.pera_A) == ["default"] for m in layers(model).values())
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_another_method_is_refused():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError):
        model.add_adapter("pera", config())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"r": 0}, "r must be an int >= 1"),
        ({"pera_alpha": -1.0}, "pera_alpha must be finite and > 0"),
        ({"pera_dropout": 1.0}, "pera_dropout must be in"),
        ({"terms": "cubic"}, "terms must be one of"),
        ({"init_weights": "zeros"}, "init_weights must be"),
        ({"bias": "lora_only"}, "bias must be one of"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]"),
        ({"layers_pattern": "layers"}, "layers_pattern needs"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform goes"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        config(**options)


def test_fan_in_fan_out_is_corrected():
    assert adapted("gpt2", fan_in_fan_out=False).peft_config["default"].fan_in_fan_out
    assert not adapted("llama", fan_in_fan_out=True).peft_config["default"].fan_in_fan_out


def test_registering_again_and_stepping_aside(monkeypatch):
    from peft.utils.peft_types import PeftType

    assert register() is True and register() is True
    monkeypatch.setattr(PeftType, "PERA", "PERA", raising=False)
    assert register() is False


def test_scaling_of_layers():
    layer = next(iter(layers(adapted(pera_alpha=6.0)).values()))
    layer.scale_layer(0.5)
    assert layer.scaling == {"default": 1.0}
    layer.unscale_layer(0.5)
    layer.set_scale("default", 3.0)
    assert layer.scaling == {"default": 6.0}
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.0}


@pytest.mark.parametrize("name", MODELS)
def test_export_as_lora(name, tmp_path):
    model = adapted(name, pera_alpha=2.0)
    pk.export_lora(model, tmp_path, quiet=True)
    loaded = peft.PeftModel.from_pretrained(MODELS[name][0](), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == peft.PeftType.LORA
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-4)


def test_export_names_one_of_several():
    model = adapted()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        pk.export_lora(model, "nowhere")


def test_bitwise_logits_of_the_exported_adapter(tmp_path):
    """float32 and exact_scale: plain PEFT computes what the specification does."""
    model = pk.inject(llama(), ["q_proj", "v_proj", "up_proj"], 8, alpha=3.0, backend="reference")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in pk.adapter_parameters(model):
            p.normal_(std=0.2)
    pk.export_lora(model, tmp_path, exact_scale=True, quiet=True)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_parameters_are_no_targets():
    with pytest.raises(TypeError, match="target_parameters"):
        config(target_parameters=["experts.gate_up_proj"])


def test_projections_share_their_input(together):
    """In the forward of every layer q, k and v read x once, gate and up likewise."""
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    model = adapted(target_modules=targets)
    got = logits(model)
    assert together == [3, 2] * 2
    pk.shared_inputs(model, ())
    torch.testing.assert_close(logits(model), got)
    pk.shared_inputs(model)
    with model.disable_adapter():
        logits(model)
    model.add_adapter("other", config(target_modules=targets))
    model.base_model.set_adapter(["default", "other"])
    logits(model)
    assert together == [3, 2] * 2
    unloaded = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())


def test_shared_inputs_train_as_layers_apart(together):
    model = adapted(target_modules=["q_proj", "k_proj", "v_proj"]).train()
    gradients = []
    for share in (True, False):
        if not share:
            pk.shared_inputs(model, ())
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert together == [3] * 2 and len(gradients[0]) == len(gradients[1]) == 18
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
