"""The examples of the README run, and the files and commands that it names exist."""

import re
from pathlib import Path

import pytest

from tools.finetune import __main__ as finetune
from tools.finetune import data

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_first_example_runs():
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert all(layer.merged for layer in names["pk"].adapted_modules(names["model"]).values())
    assert names["model"][0].pera_B.grad is not None


def test_the_snippet_from_training_to_serving(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    page = (ROOT / "docs" / "serving.md").read_text()
    code = re.search(r"<!-- snippet -->\n```py\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    text = data.load_corpora(20_000)
    text = data.Corpora(text.source, text.training[:20_000], text.held_out[:1_500])
    monkeypatch.setattr(finetune, "load_corpora", lambda: text)
    small = ["--steps", "3", "--pretrain-steps", "3", "--batch", "2", "--terms", "full"]
    assert finetune.main([*small, "--out", "finetune_out"]) == 0
    names = {}
    exec(compile(code, "serving.md", "exec"), names)
    assert names["pk"].adapted_modules(names["tuned"]) and "vLLM" in capsys.readouterr().out
    assert not names["pk"].adapted_modules(names["served"])


def test_files_and_commands_it_names_exist():
    text = README.read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module
