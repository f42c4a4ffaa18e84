"""``python -m pera_kernels``."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import pera_kernels as pk
from pera_kernels.__main__ import main
from pera_kernels.adapters.checkpoint import read_adapter
from pera_kernels.cli import commands, describe
from tests.adapted import plain_model, trained

pytest.importorskip("safetensors")
pytest.importorskip("rich")


@pytest.fixture
def adapter(tmp_path):
    model = trained(r=4, alpha=2.0)
    with torch.no_grad():
        model[0].up.pera_h[:2] = 0.0
    pk.save_adapter(model, tmp_path / "adapter", base_model="some/base")
    return tmp_path / "adapter"


def run(*arguments):
    return main([str(a) for a in arguments])


def read_json(capsys):
    return json.loads(capsys.readouterr().out)


def test_info(capsys):
    assert run("info", "--json") == 0
    found = read_json(capsys)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]
    assert found["backends"]["torch"] is None and found["auto"] in ("torch", "triton")
    if found["device"] == "cpu" and not found["interpreting"]:
        assert "TRITON_INTERPRET=1" in found["backends"]["triton"]
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "tile table" in out and "triton" in out and "reference" in out


def test_inspect(adapter, capsys):
    assert run("inspect", adapter, "--json") == 0
    found = read_json(capsys)
    own = found["modules"]["0.up"]
    assert (own["r"], own["expanded_rank"], own["zero_coefficients"]) == (4, 14, 2)
    layer = plain_model()
    pk.load_adapter(layer, adapter)
    up = pk.adapted_modules(layer)["0.up"]
    assert own["delta_norm"] == pytest.approx(float(up.delta_weight().detach().norm()), rel=1e-5)
    assert own["quadratic_share"] == pytest.approx(up.quadratic_share(), rel=1e-6)
    assert found["lora_rank"] == 16 and found["vllm_max_lora_rank"] == 16
    assert run("inspect", adapter) == 0
    out = capsys.readouterr().out
    assert "0.up" in out and "some/base" in out and "--max-lora-rank 16" in out


def test_export(adapter, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    assert run("export-lora", adapter, tmp_path / "lora", "--json") == 0
    assert read_json(capsys)["rank"] == 16
    model = plain_model()
    pk.load_adapter(model, adapter)
    x = torch.randn(3, 24)
    loaded = peft.PeftModel.from_pretrained(plain_model(), tmp_path / "lora")
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    assert run("export-lora", adapter, tmp_path / "b", "--dtype", "bfloat16", "--rank", 3) == 0
    assert "relative error at most" in capsys.readouterr().out
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


def test_merge(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    trained(model, targets=["query_key_value", "dense_h_to_4h"])
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    pk.save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "new" / "merged"
    assert run("merge", tmp_path / "base", tmp_path / "adapter", out, "--json") == 0
    assert read_json(capsys) == {
        "out": str(out), "modules": 4, "architecture": "GPTNeoXForCausalLM",
    }  # fmt: skip
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(merged(ids).logits, expected)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in out.parent.iterdir()] == ["merged"]


def saved_by_peft(tmp_path, *, targets=("c_attn", "c_fc"), **options):
    """A GPT-2, whose Conv1D layers store their weights (in, out), and the logits under PERA."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from pera_kernels.peft import PeraConfig

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    own = PeraConfig(r=3, target_modules=list(targets), init_weights=False, **options)
    model = peft.get_peft_model(model, own).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 3]])).logits


def merged_from(tmp_path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def refused(capsys, *arguments):
    """The line about the mistake; bars of the libraries may stand before it."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and ": error: " in line
    return line


def test_merge_into_conv1d(tmp_path, capsys):
    model = saved_by_peft(tmp_path)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    torch.testing.assert_close(logits(merged_from(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)
    exported = tmp_path / "lora"
    assert run("export-lora", tmp_path / "adapter", exported) == 0
    assert json.loads((exported / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def reading_also(monkeypatch, parameters, **config):
    """Files as if they held these parameters, and this in their configuration."""

    def read(folder):
        found = read_adapter(folder)
        return replace(found, config={**found.config, **config}, parameters=parameters)

    monkeypatch.setattr(commands, "read_adapter", read)


def test_what_was_trained_beside_adapters(tmp_path, capsys, monkeypatch):
    peft = pytest.importorskip("peft")
    import transformers

    model = saved_by_peft(tmp_path)
    own = model.base_model.model
    with torch.no_grad():
        own.transformer.ln_f.weight.mul_(3.0)
        own.transformer.h[0].attn.c_attn.base_layer.bias.add_(0.5)
    names = {
        "transformer.ln_f.weight": own.transformer.ln_f.weight,
        "transformer.ln_f.bias": own.transformer.ln_f.bias,
        "transformer.h.0.attn.c_attn.bias": own.transformer.h[0].attn.c_attn.bias,
    }
    reading_also(monkeypatch, {name: p.detach() for name, p in names.items()})
    assert run("inspect", tmp_path / "adapter") == 0
    assert "Trained beside them, 160 parameters: transformer.ln_f.weight" in capsys.readouterr().out
    assert run("inspect", tmp_path / "adapter", "--json") == 0
    assert read_json(capsys)["trained_beside"]["transformer.ln_f.weight"]["shape"] == [32]
    assert run("export-lora", tmp_path / "adapter", tmp_path / "lora", "--json") == 0
    told = read_json(capsys)
    assert told["modules_to_save"] == ["transformer.ln_f"]
    assert told["biases"] == ["transformer.h.0.attn.c_attn"]
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    torch.testing.assert_close(logits(merged_from(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)


MISFITS = {
    "missing": ({"score.weight": torch.ones(3)}, {}, "the model has no parameter score.weight"),
    "shape": ({"transformer.ln_f.bias": torch.ones(3)}, {}, "ln_f.bias ((3,) for (32,))"),
    "nan": ({"transformer.ln_f.bias": torch.full((32,), torch.nan)}, {}, "infinite or NaN"),
    # PEFT trained a copy of the head, and the embedding stayed as it was.
    "tied": ({"lm_head.weight": torch.ones(64, 32)}, {"peft_type": "PERA"}, "weights are shared"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_merge_refuses_what_does_not_fit(kind, tmp_path, capsys, monkeypatch):
    saved_by_peft(tmp_path)
    parameters, config, match = MISFITS[kind]
    reading_also(monkeypatch, parameters, **config)
    where = (tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert match in refused(capsys, "merge", *where)
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_adapters_that_do_not_fit(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    where = (tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    saved_by_peft(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    assert "c_attn is (48, 16) (out, in), its adapter is for (96, 32)" in refused(
        capsys, "merge", *where
    )
    config.n_layer, config.n_embd = 1, 32
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    assert (
        "has no module 'transformer.h.1" in refused(capsys, "merge", *where)
        or not (tmp_path / "merged").exists()
    )
    # The head of a GPT-2 is its embedding.
    model = transformers.GPT2LMHeadModel(config)
    pk.inject(model, ["lm_head"], 2)
    pk.save_adapter(model, tmp_path / "head")
    where = (tmp_path / "base", tmp_path / "head", tmp_path / "merged")
    assert "weights are shared" in refused(capsys, "merge", *where)
    # A base with a weight too few would be filled up with random ones.
    where = (tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    saved_by_peft(tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors[next(name for name in tensors if "c_proj.weight" in name)]
    safetensors.save_file(tensors, file, {"format": "pt"})
    assert "lacks 1 weights of GPT2LMHeadModel" in refused(capsys, "merge", *where)
    file.write_bytes(file.read_bytes()[:2000])
    assert f"{tmp_path / 'base'} cannot be loaded" in refused(capsys, "merge", *where)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite(value, tmp_path, capsys):
    model = trained()
    with torch.no_grad():
        model[0].up.pera_B[0, 0] = value
    pk.save_adapter(model, tmp_path / "adapter")
    assert run("inspect", tmp_path / "adapter") == 0
    out = capsys.readouterr().out
    assert "Not finite: 0.up\n" in out and "nan" in out
    assert run("inspect", tmp_path / "adapter", "--json") == 0

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=constant)["modules"]
    assert found["0.up"]["delta_norm"] in ("nan", "inf") and found["0.up"]["finite"] is False
    for options in ((), ("--rank", 2)):
        command = ("export-lora", tmp_path / "adapter", tmp_path / "lora", *options)
        assert "0.up: pera_B is not finite" in refused(capsys, *command)
    assert not (tmp_path / "lora").exists()


def test_the_rank_of_an_approximation_is_not_padded(adapter, tmp_path, capsys):
    for options, rank in (((), 16), (("--rank", 2), 2), (("--rank", 2, "--pad-to", 8), 8)):
        assert run("export-lora", adapter, tmp_path / str(rank), "--json", *options) == 0
        assert read_json(capsys)["rank"] == rank


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["inspect"]])
def test_a_reader_that_leaves_is_no_error(command, adapter):
    """As of other programs in a pipe: no message, and a status that says it."""
    command = [*command, str(adapter)] if command == ["inspect"] else command
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pera_kernels", *command],
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(write)
    assert done.returncode in (1, 141), done.stderr
    assert "Traceback" not in done.stderr and "pipe" not in done.stderr.lower()


BAD_USE = {
    "nothing": ([], "required: COMMAND"),
    "unknown": (["nonsense"], "invalid choice: 'nonsense'"),
    "no adapter": (["inspect", "{tmp}/none"], "there is no file"),
    "no rank": (
        ["export-lora", "{adapter}", "{tmp}/o", "--rank", "0"],
        "'0' is not a whole number",
    ),
    "no dtype": (
        ["export-lora", "{adapter}", "{tmp}/o", "--dtype", "int8"],
        "'int8' is not one of",
    ),
    "pad to": (
        ["export-lora", "{adapter}", "{tmp}/o", "--pad-to", "x"],
        "argument --pad-to: 'x' is not a whole number from 1",
    ),
    "a file": (
        ["export-lora", "{adapter}", "{adapter}/adapter_config.json"],
        "not an empty folder",
    ),
    "below a file": (["export-lora", "{adapter}", "{adapter}/adapter_config.json/o"], "is a file"),
    "merge below a file": (
        ["merge", "{adapter}", "{adapter}", "{adapter}/adapter_config.json/o"],
        "is a file",
    ),
    "filled": (["export-lora", "{adapter}", "{adapter}"], "not an empty folder"),
    "filled merge": (["merge", "{tmp}", "{adapter}", "{adapter}"], "not an empty folder"),
    "no base": (["merge", "{tmp}/none", "{adapter}", "{tmp}/o"], "there is no folder"),
}


@pytest.mark.parametrize("name", BAD_USE)
def test_bad_use(name, adapter, tmp_path, capsys):
    arguments, match = BAD_USE[name]
    if "merge" in arguments:
        pytest.importorskip("transformers")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([a.format(tmp=tmp_path, adapter=adapter) for a in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and match in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [[], ["info"], ["inspect"], ["export-lora"], ["merge"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "examples:\n  python -m pera_kernels" in capsys.readouterr().out


def test_verify_in_its_own_process():
    done = subprocess.run(
        [sys.executable, "-m", "pera_kernels", "verify", "--backend", "torch", "--terms", "linear",
         "--ranks", "2", "--dtypes", "float32", "--ops", "delta_weight"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "delta_weight" in done.stdout


def test_the_commit_of_a_checkout_and_of_a_copy(tmp_path, monkeypatch):
    monkeypatch.delenv("PERA_COMMIT", raising=False)
    monkeypatch.setattr(describe, "ROOT", tmp_path)
    assert describe.commit() is None
    (tmp_path / ".git").write_text("no repository")
    assert describe.commit() is None
    monkeypatch.setenv("PERA_COMMIT", "0123456789ab")
    assert describe.installation()["commit"] == "0123456789ab"
