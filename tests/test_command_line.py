"""``python -m pera_kernels``."""

import json
import subprocess
import sys

import pytest
import torch

import pera_kernels as pk
from pera_kernels.__main__ import main
from pera_kernels.cli import describe
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
