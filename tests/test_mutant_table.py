"""The table of ``tools.mutants`` fits the tree; ``nox -s mutants`` runs it."""

import ast

import pytest

from tools.mutants import MUTANTS, ROOT, broken


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant):
    source = (ROOT / mutant.file).read_text()
    assert ast.dump(ast.parse(broken(mutant))) != ast.dump(ast.parse(source))
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()
