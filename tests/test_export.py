"""Export to plain LoRA, judged by the real PEFT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.adapters.beside import beside_of
from pera_kernels.adapters.checkpoint import AdapterFile, read_adapter
from pera_kernels.adapters.export import best_of_rank, vllm_max_lora_rank
from tests.adapted import plain_model, refused, trained

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def x():
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(5))


def in_peft(folder, model=None, dtype=torch.float32):
    model = (model or plain_model()).to(dtype)
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize("terms", pk.terms.TERMS)
@pytest.mark.parametrize("r", [1, 3, 4, 8, 16])
def test_bitwise_with_exact_scale(r, terms, tmp_path, x):
    model = trained(r=r, terms=terms, alpha=0.7, backend="reference").eval()
    done = pk.export_lora(model, tmp_path, exact_scale=True)
    assert done.rank == pk.expanded_rank(r, terms)
    assert done.alpha / done.rank == pytest.approx(0.7 / r, rel=1e-15)
    assert torch.equal(in_peft(tmp_path)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", pk.terms.TERMS)
def test_under_the_numeric_rule(terms, dtype, tmp_path, x):
    """The error against float64 is at most twice that of the reference in the same dtype."""
    model = trained(r=5, terms=terms, alpha=2.0, backend="reference").to(dtype).eval()
    truth = trained(r=5, terms=terms, alpha=2.0, backend="reference").to(dtype).double().eval()
    pk.export_lora(model, tmp_path)
    x = x.to(dtype)
    with torch.no_grad():
        exact, ours, theirs = truth(x.double()), model(x), in_peft(tmp_path, dtype=dtype)(x)
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (theirs - exact).abs().max() <= 2 * (ours - exact).abs().max() + floor


def test_what_is_written(tmp_path, capsys):
    model = trained(trained(r=2, targets=["0.up"]), r=5, targets=["1.down"])
    done = pk.export_lora(model, tmp_path, base_model="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank == 32
    assert config["target_modules"] == ["0.up", "1.down"]
    assert config["base_model_name_or_path"] == "some/base" and "rank_pattern" not in config
    assert done.ranks == {"0.up": 5, "1.down": 20} and done.vllm_max_lora_rank == 32
    assert "--max-lora-rank 32" in capsys.readouterr().out
    assert pk.export_lora(trained(), tmp_path, pad_to=1, quiet=True).rank == 9
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down", "up"]
    assert not capsys.readouterr().out


def test_no_bucket(tmp_path, capsys):
    done = pk.export_lora(trained(r=32), tmp_path)
    assert done.rank == 560 and done.vllm_max_lora_rank is None
    assert "no --max-lora-rank is as large as 560" in capsys.readouterr().out
    assert [vllm_max_lora_rank(k) for k in (1, 16, 17, 152, 324, 512, 513)] == [
        1, 16, 32, 256, 512, 512, None,
    ]  # fmt: skip


def test_prune_zero(tmp_path, x):
    model = trained(r=6, backend="reference").eval()
    with torch.no_grad():
        for layer in pk.adapted_modules(model).values():
            layer.pera_h[::2] = 0.0
    full = pk.export_lora(model, tmp_path / "full", pad_to=1, quiet=True)
    pruned = pk.export_lora(model, tmp_path / "pruned", pad_to=1, prune_zero=True, quiet=True)
    assert (full.rank, pruned.rank) == (27, 16)
    torch.testing.assert_close(in_peft(tmp_path / "pruned")(x), model(x))


def test_best_of_a_rank(tmp_path, x):
    model = trained(r=6).eval()
    done = pk.export_lora(model, tmp_path, rank=4, pad_to=4)
    assert done.rank == 4 and 0.0 < max(done.errors.values()) < 1.0
    loaded = in_peft(tmp_path)
    for name, layer in pk.adapted_modules(model).items():
        lora = loaded.base_model.model.get_submodule(name)
        approximated = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        exact = layer.delta_weight().detach()
        error = float(((approximated - exact).norm() / exact.norm()).detach())
        assert error == pytest.approx(done.errors[name], rel=1e-4)
        singular = torch.linalg.svdvals(exact.double())
        best = float((singular[4:].square().sum() / singular.square().sum()).sqrt())
        assert error == pytest.approx(best, rel=1e-4)
    assert "relative error at most" in str(done)


def test_best_of_rank_of_nothing():
    new_A, new_B, error = best_of_rank(torch.zeros(5, 8), torch.zeros(6, 5), 2)
    assert error == 0.0 and not (new_B @ new_A).any() and new_A.shape == (2, 8)


def written_delta(folder, name):
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    return B @ A * (config["lora_alpha"] / config["r"])


@pytest.mark.parametrize("exact_scale", [False, True])
@pytest.mark.parametrize("rank", [None, 4, 19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_errors_are_those_of_what_is_written(dtype, rank, exact_scale, tmp_path):
    model = trained(r=5, alpha=0.7)
    done = pk.export_lora(model, tmp_path, dtype=dtype, rank=rank, exact_scale=exact_scale)
    for name, layer in pk.adapted_modules(model).items():
        factors = (layer.pera_A.double(), layer.pera_B.double(), layer.pera_h.double())
        exact = pk.delta_weight(*factors, scale=layer.scale).detach()
        error = float((written_delta(tmp_path, name) - exact).norm() / exact.norm())
        assert done.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-15)
    if rank is None:
        assert max(done.errors.values()) < {torch.bfloat16: 1e-2}.get(dtype, 1e-7)
    exact = max(done.errors.values()) == 0.0
    assert exact == (dtype == torch.float64 and rank is None) == (", exact" in str(done))


def test_exact_is_said_of_what_is_exact(tmp_path):
    linear = trained(r=4, terms="linear", alpha=8.0)
    assert ", exact" in str(pk.export_lora(linear, tmp_path))
    assert "relative error at most" in str(pk.export_lora(linear, tmp_path, dtype=torch.bfloat16))
    # Below the smallest number of the dtype the adapter is gone.
    with torch.no_grad():
        for p in pk.adapter_parameters(linear):
            p.mul_(1e-6)
    done = pk.export_lora(linear, tmp_path, dtype=torch.float16)
    assert min(done.errors.values()) > 0.01
    fresh = pk.inject(plain_model(), ["up"], 2)
    assert pk.export_lora(fresh, tmp_path, dtype=torch.bfloat16).errors == {
        "0.up": 0.0,
        "1.up": 0.0,
    }


def test_padding(tmp_path):
    model = trained(r=6)
    ranks = [
        pk.export_lora(model, tmp_path, **options).rank
        for options in ({}, {"rank": 2}, {"rank": 2, "pad_to": 16}, {"pad_to": 1})
    ]
    assert ranks == [32, 2, 16, 27]


BAD = {
    "model": (lambda m, f: pk.export_lora(3, f), "model must be an nn.Module; got int"),
    "merged": (lambda m, f: pk.export_lora(pk.merge(m), f), "merged: 0.up, 0.down"),
    "pad_to": (lambda m, f: pk.export_lora(m, f, pad_to=0), "pad_to"),
    "pad_to text": (lambda m, f: pk.export_lora(m, f, pad_to="16"), "pad_to must be an int >= 1"),
    "rank": (lambda m, f: pk.export_lora(m, f, rank=1.5), "rank"),
    "rank zero": (lambda m, f: pk.export_lora(m, f, rank=0), "rank must be an int >= 1; got 0"),
    "dtype": (lambda m, f: pk.export_lora(m, f, dtype=torch.int8), "dtype must be torch.float64"),
    "dtype name": (lambda m, f: pk.export_lora(m, f, dtype="bf16"), "dtype must be torch.float64"),
    "switch": (lambda m, f: pk.export_lora(m, f, prune_zero="no"), "prune_zero must be True or"),
    "exact": (lambda m, f: pk.export_lora(m, f, exact_scale=1), "exact_scale must be True or"),
    "quiet": (lambda m, f: pk.export_lora(m, f, quiet=None), "quiet must be True or"),
    "base": (lambda m, f: pk.export_lora(m, f, base_model=f), "base_model must be a string"),
    "adapter": (lambda m, f: pk.export_lora(m, f, adapter="x"), "has no adapters with names"),
    "adapter type": (lambda m, f: pk.export_lora(m, f, adapter=3), "adapter must be the name"),
    "folder": (lambda m, f: pk.export_lora(m, 3), "folder must be the path of a folder; got 3"),
    "no folder": (lambda m, f: pk.export_lora(m, ""), "folder must be the path of a folder"),
    "meta": (lambda m, f: pk.export_lora(m.to("meta"), f), "0.up: pera_A is on the meta device"),
    "itself": (lambda m, f: pk.export_lora(m[0].up, f), "model is itself the adapted layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, tmp_path):
    call, match = BAD[name]
    with pytest.raises((TypeError, ValueError), match=match):
        call(trained(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_to_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "deeper"):
        with pytest.raises(ValueError, match=r"folder must be a folder.* is a file"):
            pk.export_lora(trained(), folder)
    assert file.read_text() == "mine"
    model = trained()
    pk.save_adapter(model, tmp_path / "adapter")
    refused(model, "would be overwritten", lambda m: pk.export_lora(m, tmp_path / "adapter"))
    pk.load_adapter(plain_model(), tmp_path / "adapter")


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"prune_zero": True}, {"exact_scale": True}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["pera_A", "pera_B", "pera_h"])
def test_what_is_not_finite_is_refused(part, value, options, tmp_path):
    model = trained()
    with torch.no_grad():
        getattr(model[1].down, part).view(-1)[1] = value
    with pytest.raises(ValueError, match=f"1.down: {part} is not finite"):
        pk.export_lora(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(tmp_path):
    out = tmp_path / "out"
    refused(plain_model(), "no PERA adapter", lambda m: pk.export_lora(m, out))
    mixed = trained(trained(targets=["up"], alpha=1.0), targets=["down"], alpha=2.0)
    refused(mixed, "one scale", lambda m: pk.export_lora(m, out, exact_scale=True))
    model = trained()
    with torch.no_grad():
        model[0].up.pera_A.fill_(1e4)
    refused(model, "0.up: lora_A overflows", lambda m: pk.export_lora(m, out, dtype=torch.float16))
    with torch.no_grad():
        model[0].up.pera_A.fill_(1e30)
    refused(model, "0.up: lora_A overflows", lambda m: pk.export_lora(m, out))
    twice = plain_model()
    twice[1].up = twice[0].up
    refused(trained(twice), "0.up, 1.up are one layer", lambda m: pk.export_lora(m, out))
    lora = peft.get_peft_model(plain_model(), peft.LoraConfig(target_modules=["down"]))
    refused(
        trained(lora, targets=["up"]),
        "0.down holds an adapter of another method",
        lambda m: pk.export_lora(m, out),
    )
    assert not out.exists()


class Tagger(nn.Module):
    """A body of two blocks, and what is often trained beside adapters."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(24))
        self.body = plain_model()
        self.norm = nn.LayerNorm(24)
        self.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 5))
        self.pieces = nn.ParameterList([torch.zeros(5)])

    def forward(self, x):
        return self.head(self.norm(self.body(x + self.shift))) + self.pieces[0]


def tagger(*trains):
    """With adapters on the first block, and these parameters trained."""
    torch.manual_seed(0)
    model = Tagger().eval()
    if trains:
        trained(model, targets=["body.0.up"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in trains:
                    p.requires_grad_(True).add_(torch.randn_like(p))
    return model


BESIDE = {
    "a layer": (["head.1.weight", "head.1.bias"], ["head.1"], "none"),
    "a part of a layer": (["head.1.weight"], ["head.1"], "none"),
    "a layer with buffers": (["head.0.weight"], ["head.0"], "none"),
    "two layers": (["norm.weight", "head.1.weight"], ["head.1", "norm"], "none"),
    "a bias": (["body.1.up.bias"], None, "all"),
    "the bias of an adapted layer": (["body.0.up.bias"], None, "lora_only"),
    "all": (["body.0.up.bias", "body.0.down.bias", "norm.weight"], ["norm"], "all"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_trained_beside_adapters(kind, tmp_path, x, capsys):
    trains, modules, bias = BESIDE[kind]
    model = tagger(*trains)
    done = pk.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"]) == (modules, bias)
    assert list(done.modules_to_save) == (modules or [])
    out = capsys.readouterr().out
    assert "Trained beside them" in out and "vLLM: refuses" in out
    with torch.no_grad():
        torch.testing.assert_close(in_peft(tmp_path, tagger())(x), model(x))
    # The same of a file, which has no model at hand.
    pk.save_adapter(model, tmp_path / "own")
    beside = beside_of(read_adapter(tmp_path / "own"))
    assert beside.bias({"body.0.up"}) == bias and list(beside.wanted) == (modules or [])


def test_modules_that_peft_saved_are_put_together():
    names = ("a.head.0.weight", "a.head.1.bias", "b.up.bias", "b.norm.bias", "c.weight")
    parameters = {name: torch.ones(2) for name in names}
    read = AdapterFile(Path("a"), {}, {"b.up": {}, "c": {}}, parameters, frozenset({"c.weight"}))
    beside = beside_of(read, ["head"])
    assert {n: list(own) for n, own in beside.modules.items()} == {"a.head": ["0.weight", "1.bias"]}
    assert sorted(beside.biases) == ["b.norm", "b.up"] and beside.wanted == ("a.head",)
    assert {"b.up.base_layer.bias", "c.base_layer.weight"} < set(beside.tensors({"b.up", "c"}))
    with pytest.raises(ValueError, match=r"c\.weight is trained .* has an adapter"):
        beside_of(replace(read, frozen=frozenset()), ["head"])


CANNOT = {
    "the model's own": ("shift", "shift is trained .*holds body.0.up, which has an adapter"),
    "an adapted weight": ("body.0.up.weight", "body.0.up.weight is trained .*has an adapter"),
    "in a list": ("pieces.0", "pieces.0 is trained .*a ParameterList cannot be saved whole"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_no_checkpoint_can_hold(kind, tmp_path):
    part, match = CANNOT[kind]
    refused(tagger(part), match, lambda m: pk.export_lora(m, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_that_peft_would_misread(tmp_path, x):
    """PEFT takes modules by the ends of their names, and leaves adapters out below them."""
    base = nn.Sequential(plain_model(), nn.Linear(24, 24))
    model = trained(base, targets=["0.1.up"])
    model[1].requires_grad_(True)
    refused(model, "PEFT would take 0.1.*for", lambda m: pk.export_lora(m, tmp_path / "out"))
    # What is taken besides, but not trained, is written as it is.
    model = tagger("norm.weight")
    model.body[0].norm = nn.LayerNorm(24)
    model.body[0].norm.weight.requires_grad_(False).fill_(2.0)
    model.body[0].norm.bias.requires_grad_(False)
    pk.export_lora(model, tmp_path)
    base = tagger()
    base.body[0].norm = nn.LayerNorm(24)
    loaded = in_peft(tmp_path, base)
    torch.testing.assert_close(loaded(x), model(x))


def test_compiled_parts(tmp_path, x):
    """Names are those of the base model, wherever compilation stands."""
    model = plain_model()
    model[0] = torch.compile(model[0], backend="eager")
    model = trained(model)
    pk.export_lora(torch.compile(model, backend="eager"), tmp_path, quiet=True)
    torch.testing.assert_close(in_peft(tmp_path)(x), model.eval()(x))


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=True, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([[3, 5, 7, 9]])).logits


def peft_trained(**options):
    from pera_kernels.peft import PeraConfig

    config = PeraConfig(r=4, target_modules=["q_proj"], init_weights=False, **options)
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


PEFT_TRAINS = {
    "head": {"modules_to_save": ["lm_head"]},
    "ends of names": {"modules_to_save": ["norm"]},
    "biases": {"bias": "all"},
    "own biases": {"bias": "pera_only"},
    "both": {"bias": "all", "modules_to_save": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("kind", PEFT_TRAINS)
def test_what_peft_trains_beside_adapters(kind, tmp_path):
    model = peft_trained(**PEFT_TRAINS[kind])
    before = logits(model)
    # A model that was loaded again requires no gradient, nor does the one inside another's place.
    model.save_pretrained(tmp_path / "pera")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "pera")
    for number, one in enumerate((model, again, model.base_model, again.base_model.model)):
        folder = tmp_path / str(number)
        done = pk.export_lora(one, folder, quiet=True)
        assert done.modules_to_save or done.biases
        loaded = peft.PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(logits(loaded), before, rtol=1e-3, atol=1e-5)


def test_each_adapter_has_its_own_modules(tmp_path):
    from pera_kernels.peft import PeraConfig

    model = peft_trained(modules_to_save=["lm_head"])
    first = logits(model)
    model.add_adapter("other", PeraConfig(r=2, target_modules=["v_proj"], init_weights=False))
    model.set_adapter("other")
    other = logits(model)
    for adapter, expected, whole in (
        ("default", first, ("lm_head",)), ("other", other, ()), (None, other, ()),
    ):  # fmt: skip
        done = pk.export_lora(model, tmp_path, adapter=adapter, quiet=True)
        assert done.modules_to_save == whole
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="got 'nosuch', the model has 'default', 'other'"):
        pk.export_lora(model, tmp_path, adapter="nosuch")
    for layer in model.modules():
        if hasattr(type(layer), "pera_view"):
            layer.set_adapter([])
    with pytest.raises(ValueError, match="no PERA adapter is active; name one"):
        pk.export_lora(model, tmp_path)


def test_a_tied_embedding_is_written_in_both_places(tmp_path):
    def tied():
        model = llama()
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    model = trained(tied(), targets=["q_proj"])
    with torch.no_grad():
        model.lm_head.weight.requires_grad_(True).mul_(1.5)
    done = pk.export_lora(model, tmp_path, quiet=True)
    assert done.modules_to_save == ("lm_head", "model.embed_tokens")
    loaded = peft.PeftModel.from_pretrained(tied(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-5)


def test_the_scale_is_that_of_now_and_disabled_adapters_are_written(tmp_path):
    model = peft_trained()
    for layer in model.modules():
        if hasattr(type(layer), "pera_view"):
            layer.set_scale("default", 0.25)
    expected = logits(model)
    model.disable_adapter_layers()
    pk.export_lora(model, tmp_path, quiet=True)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-5)
