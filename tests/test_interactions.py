"""The interaction matrix of Eq. 12."""

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="the tools need matplotlib")
pytest.importorskip("rich", reason="the tools need rich")
pytest.importorskip("tqdm", reason="the tools need tqdm")

from tools import interactions
from tools.finetune import __main__ as finetune
from tools.finetune import data
from tools.finetune.model import ByteTransformer


def test_of_functions_whose_second_derivatives_are_known():
    torch.manual_seed(0)
    forms = torch.randn(3, 4, 4, dtype=torch.float64)
    functions = [lambda z, form=form: z @ form @ z for form in forms]
    states = torch.randn(3, 4, dtype=torch.float64)
    found = interactions.strength(functions, states)
    torch.testing.assert_close(found, (forms + forms.mT).abs().mean(0))
    expected = (found.sum() - found.diagonal().sum()) / 12
    assert interactions.off_diagonal(found) == pytest.approx(float(expected))


def test_the_function_is_the_models_output():
    torch.manual_seed(0)
    model = ByteTransformer(context=16, width=32, layers=2, heads=2).double()
    window = torch.randint(256, (9,))
    function, state = interactions.log_probability(model, window)
    expected = model(window[None, :-1])[0, -1].log_softmax(-1)[window[-1]]
    torch.testing.assert_close(function(state), expected)
    assert function(2 * torch.randn_like(state)) != expected


def test_program(tmp_path, capsys, monkeypatch):
    text = data.load_corpora(20_000)
    small = data.Corpora(text.source, text.training[:20_000], text.held_out[:1_500])
    monkeypatch.setattr(finetune, "load_corpora", lambda: small)
    sizes = ["--steps", "2", "--pretrain-steps", "2", "--batch", "1", "--rank", "2"]
    threads = torch.get_num_threads()
    assert finetune.main([*sizes, "--terms", "linear,full", "--out", str(tmp_path)]) == 0
    assert interactions.main([str(tmp_path), "--samples", "1"]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "interactions.json").read_text())["means"]
    assert list(found) == ["base", "LoRA", "PERA full"]
    assert len({own["off_diagonal"] for own in found.values()}) == 3
    assert (tmp_path / "interactions.png").read_bytes().startswith(b"\x89PNG")
    assert "PERA full" in capsys.readouterr().out
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "base.pt").write_bytes(b"not a model")
    for name in ("other", "none", "list"):
        (tmp_path / name).mkdir()
    (tmp_path / "none" / "base.pt").touch()
    torch.save([1], tmp_path / "list" / "base.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other" / "base.pt")
    for options, message in (
        ([str(tmp_path / "missing")], "No such file"),
        ([str(tmp_path / "junk")], "is no model of the fine-tune"),
        ([str(tmp_path / "other")], "Missing key(s) in state_dict"),
        ([str(tmp_path / "none")], "is no model of the fine-tune"),
        ([str(tmp_path / "list")], "is no model of the fine-tune"),
        ([str(tmp_path), "--samples", "5000"], "5000 windows, and the text has"),
    ):
        with pytest.raises(SystemExit) as refusal:
            interactions.main(options)
        error = capsys.readouterr().err
        assert refusal.value.code == 2 and message in error and error.count("\n") == 1
