"""What the README shows is what the committed files say, and its first example runs."""

import re

import pytest

from benchmarks import report
from tools import readme
from tools.finetune.__main__ import main as finetune


def test_generated_parts_are_current():
    text = readme.README.read_text()
    assert readme.render(text) == text
    for path, current in report.documents().items():
        assert path.read_text() == current, path.name


def test_first_example_runs():
    text = readme.README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert all(layer.merged for layer in names["pk"].adapted_modules(names["model"]).values())
    assert names["model"][0].pera_B.grad is not None


def test_the_snippet_from_training_to_serving(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    text = readme.README.read_text()
    code = re.search(r"<!-- snippet -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "3", "--pretrain-steps", "3", "--batch", "2", "--terms", "full"]
    assert finetune([*small, "--out", "finetune_out"]) == 0
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["pk"].adapted_modules(names["tuned"]) and "vLLM" in capsys.readouterr().out
    assert not names["pk"].adapted_modules(names["served"])


def test_files_and_commands_it_names_exist():
    text = readme.README.read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (readme.ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = readme.ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


def test_a_part_without_its_marker_is_refused():
    with pytest.raises(ValueError, match="exactly one part marked 'finetune'"):
        readme.render("no markers")
