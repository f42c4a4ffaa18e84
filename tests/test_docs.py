"""The pages in docs/: their code runs, their links exist, every "yes" has its test."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_its_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    if page.name == "peft.md":
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    if page.name == "inspect.md":
        pytest.importorskip("matplotlib")
        pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.name}
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), names)
    assert list(tmp_path.iterdir())


def headings(page):
    """The anchors that GitHub makes."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


def features():
    lines = (DOCS / "features.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row for row in rows[1:]}


@pytest.mark.parametrize("name", features())
def test_every_feature_has_its_test(name):
    row = features()[name]
    assert len(row) == 5 and row[1] in ("yes", "no")
    tests = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", row[4])
    assert tests
    for path, function in tests:
        source = (ROOT / path).read_text()
        assert f"def {function}(" in source if function else "def test_" in source, row[4]
