"""The switches of the ablation: each changes what is computed how, never the result."""

import json
from dataclasses import replace

import pytest

from benchmarks import ablation


@pytest.mark.parametrize("own", ablation.ABLATIONS, ids=lambda own: own.name)
def test_off_is_another_way_to_the_same_result(own, monkeypatch):
    """Small enough to be quick, large enough to reach the same branch."""
    small = {"models": min(own.models, 2), "n": 64, "out": (64, 32, 32)[: len(own.out)]}
    if own.T in (64, 512):
        # Composing would hide what is switched off.
        small["T"] = 20
    measured = ablation.measure(replace(own, **small), rounds=10)
    assert measured["with_ms"] > 0 and measured["gain_p20"] <= measured["gain_p80"]


def test_a_switch_that_changes_the_result_is_refused():
    broken = replace(
        ablation.ABLATIONS[0],
        T=8,
        n=64,
        out=(64,),
        phase="both",
        off=lambda: ablation.mock.patch.object(
            ablation.lean_adapters, "_weighted", lambda u, c, scale: 2 * u
        ),
    )
    with pytest.raises(RuntimeError, match="the result without it is another"):
        ablation.measure(broken, rounds=10)


def test_rows_are_appended_and_shown(tmp_path, capsys):
    path, name = tmp_path / "rows.jsonl", ablation.ABLATIONS[1].name
    assert "Not measured" in ablation.table(path)
    for _ in range(2):
        assert ablation.main(["--only", name, "--rounds", "10", "--out", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["gain"] > 0
    assert f"{rows[1]['gain']:.2f} (" in ablation.table(path)
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nonsense"], "nonsense"),
        (["--rounds", "3"], "3"),
        (["--out", "/dev/null/rows"], "cannot write"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        ablation.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
