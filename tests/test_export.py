"""Export to plain LoRA, judged by the real PEFT."""

import json

import pytest
import torch

import pera_kernels as pk
from pera_kernels.adapters.export import best_of_rank, vllm_max_lora_rank
from tests.adapted import plain_model, refused, trained

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")


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


BAD = {
    "merged": (lambda m, f: pk.export_lora(pk.merge(m), f), "merged: 0.up, 0.down"),
    "pad_to": (lambda m, f: pk.export_lora(m, f, pad_to=0), "pad_to"),
    "rank": (lambda m, f: pk.export_lora(m, f, rank=1.5), "rank"),
    "dtype": (lambda m, f: pk.export_lora(m, f, dtype=torch.int8), "dtype must be"),
    "dtype name": (lambda m, f: pk.export_lora(m, f, dtype="bf16"), "dtype must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, tmp_path):
    call, match = BAD[name]
    with pytest.raises((TypeError, ValueError), match=match):
        call(trained(), tmp_path / "out")
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
    assert not out.exists()
