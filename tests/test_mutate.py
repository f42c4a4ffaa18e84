"""``tools.mutate``: its table fits the tree, and it says what survives."""

import json
import sys
from dataclasses import replace

import pytest

from tools.mutate import MUTANTS, ROOT, MutationError, check, main, mutated

PYPROJECT = '[tool.pytest.ini_options]\npythonpath = ["."]\n'
TEST = "from pera_kernels.double import double\n\n\ndef test_double():\n    assert double(2) == 4\n"
KEYS = {"name", "file", "breaks", "killed_by", "status", "seconds", "commit", "date"}


def test_every_mutant_applies_once():
    check(MUTANTS)
    assert len(MUTANTS) >= 40 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_told_in_one_line_and_has_tests_that_exist(mutant):
    assert mutant.breaks and "\n" not in mutant.breaks
    assert mutant.tests and mutated(mutant, ROOT)
    for test in mutant.tests:
        path, _, name = test.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"\ndef {name.partition('[')[0]}(" in source, test


@pytest.fixture
def tree(tmp_path):
    """A tree of one function and its test, and a mutant that changes nothing the test looks at."""
    for folder in ("pera_kernels", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "pera_kernels" / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests" / "test_double.py").write_text(TEST)
    return tmp_path


def mutant(name="added", new="x + x", **changes):
    values = {
        "name": name,
        "file": "pera_kernels/double.py",
        "old": "2 * x",
        "new": new,
        "tests": ("tests/test_double.py",),
    }
    return replace(MUTANTS[0], **{**values, **changes})


def run(tree, *mutants, words=()):
    return main(["--out", str(tree / "rows" / "out.jsonl"), *words], mutants, tree)


def rows(tree):
    return [json.loads(line) for line in (tree / "rows" / "out.jsonl").read_text().splitlines()]


def test_a_survivor_is_told_and_fails(tree, capsys):
    before = (tree / "pera_kernels" / "double.py").read_text()
    assert run(tree, mutant(), mutant("tripled", "3 * x")) == 1
    survivor, killed = rows(tree)
    assert survivor.keys() == KEYS and survivor["status"] == "survived"
    assert survivor["killed_by"] is None
    assert killed["status"] == "killed" and killed["killed_by"].endswith("::test_double")
    assert "total" in capsys.readouterr().out
    assert (tree / "pera_kernels" / "double.py").read_text() == before
    # A row takes the place of the older one.
    assert run(tree, mutant("tripled", "3 * x"), mutant(), words=["--only", "tripled"]) == 0
    assert [row["name"] for row in rows(tree)] == ["added", "tripled"]


def test_a_mutant_that_never_ends_is_killed_by_the_clock(tree, monkeypatch):
    monkeypatch.setattr(sys.modules["tools.mutate"], "TIMEOUT", 3.0)
    endless = mutant("endless", "[x for _ in iter(int, 1)]")
    assert run(tree, endless) == 0
    assert [row["status"] for row in rows(tree)] == ["timeout"]


def test_a_selection_that_does_not_run_is_an_error(tree, capsys):
    assert run(tree, mutant(tests=("tests/test_other.py",))) == 2
    assert "error: without a mutant the tests end with status 4" in capsys.readouterr().err
    broken = mutant("import", "x\n\n\nimport nowhere")
    assert run(tree, broken) == 2
    assert [row["status"] for row in rows(tree)] == ["error"]


def test_a_baseline_that_fails_stops_the_run(tree, capsys):
    (tree / "tests" / "test_double.py").write_text(TEST.replace("== 4", "== 5"))
    assert run(tree, mutant()) == 2
    assert "without a mutant the tests end with status 1" in capsys.readouterr().err
    assert not (tree / "rows").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"old": "4 * x"}, "mutant added: its old text occurs 0 times in pera_kernels/double.py"),
        ({"old": "x"}, "mutant added: its old text occurs 2 times"),
        ({"file": "pera_kernels/none.py"}, "mutant added: there is no file pera_kernels/none.py"),
        ({"new": "2 *"}, "mutant added: pera_kernels/double.py is not Python then"),
        ({"new": "(2 * x)"}, "mutant added: it changes nothing"),
    ],
)
def test_a_table_that_does_not_fit_is_told_in_one_line(changes, message, tree, capsys):
    assert run(tree, mutant(**changes)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_names_are_unique(tree):
    with pytest.raises(MutationError, match="mutant added: the name stands twice"):
        check([mutant(), mutant()], tree)


def test_an_unknown_name_and_the_list(tree, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tree, mutant(), words=["--only", "other"])
    assert stopped.value.code == 2
    assert "there is no mutant 'other'" in capsys.readouterr().err
    assert run(tree, mutant(), words=["--list"]) == 0
    assert "added" in capsys.readouterr().out and not (tree / "rows").exists()


def test_a_mutant_of_this_package_is_killed(tmp_path):
    out = tmp_path / "out.jsonl"
    assert main(["--only", "half-block", "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["status"] == "killed" and row["killed_by"].startswith("tests/test_terms.py::")
