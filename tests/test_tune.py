"""``tools.tune`` without a GPU: candidates, the gate, what is written, a dry run."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="tiles are those of Triton kernels")

from pera_kernels.kernels import tiles  # noqa: E402
from pera_kernels.kernels.tiles import Tile  # noqa: E402
from tools import tune  # noqa: E402

needs_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU here the kernels are not interpreted"
)
SMALL = ("--ranks", "3", "--candidates", "1", "--rounds", "1", "--dry")


@needs_the_interpreter
def test_a_dry_run_judges_times_and_writes(tmp_path, capsys):
    kernels = ("accumulate", "project", "project_expanded", "contract", "expand", "compose")
    words = ["--kernels", ",".join(kernels), *SMALL, "--write"]
    assert tune.main([*words, "--out", str(tmp_path), "--tables", str(tmp_path / "tiles")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert {row["kernel"] for row in rows if row["what"] == "timed"} == set(kernels)
    chosen = {row["kernel"]: row["tile"] for row in rows if row["what"] == "chosen"}
    table = json.loads((tmp_path / "tiles" / "generic.json").read_text())
    shipped = json.loads((tiles.TABLES / "generic.json").read_text())
    assert table["basis"].startswith("Interpreted, nothing timed")
    assert table["basis"].endswith(f"The rest: {shipped['basis']}")
    for kernel in kernels:
        assert table["tiles"][kernel] == {**shipped["tiles"][kernel], "half": chosen[kernel]}


@needs_the_interpreter
def test_a_wrong_candidate_is_dropped_and_a_wrong_present_tile_is_an_error(
    tmp_path, monkeypatch, capsys
):
    call, calls = tune.Operands.call, []

    def spoiled_from_the_second_on(self):
        outputs = call(self)
        calls.append(self)
        if len(calls) > 1:
            outputs["y"][3, 5] += 1.0
        return outputs

    monkeypatch.setattr(tune.Operands, "call", spoiled_from_the_second_on)
    words = ["--kernels", "accumulate", *SMALL, "--out", str(tmp_path)]
    assert tune.main(words) == 0
    (wrong,) = [row for row in map(json.loads, open(tmp_path / "tune.jsonl")) if "reason" in row]
    assert wrong["what"] == "wrong" and "worst at (3, 5)" in wrong["reason"]
    assert tune.main(words) == 1
    assert "the present tile is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("kind", tiles.CLASSES)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_begin_with_the_present_tile_and_may_fit(kernel, kind):
    present = tiles.load_table("generic").get((kernel, kind), Tile(64, 64, 32, 4, 2))
    found = tune.candidates(kernel, kind, present, 232448, 30)
    assert found[0] == present and len(found) == len(set(found)) == 31
    few = tune.candidates(kernel, kind, present, 20000, 10**6)
    assert (
        len(few) < len(tune.candidates(kernel, kind, present, 232448, 10**6)) or kernel == "expand"
    )


def test_a_tile_ends_with_its_context():
    before = tiles.load_table("generic")["project", "half"]
    with tune.using("generic", "project", "half", Tile(16, 16, 16, 4, 1)):
        assert tiles.load_table("generic")["project", "half"] == Tile(16, 16, 16, 4, 1)
    assert tiles.load_table("generic")["project", "half"] == before


SPILLS = """
from argparse import Namespace
from pathlib import Path
import torch
from pera_kernels.kernels import tiles
from pera_kernels.kernels.tiles import Tile
from tools import compile_report, tune
compile_report.here = lambda: ("sm_90", 132)
tiles.architecture = lambda device: "sm_90"
if __name__ == "__main__":
    with compile_report.compilers(2) as pool:
        sweep = tune.Sweep(Namespace(out=Path(".")), torch.device("cpu"), pool)
        sound, spills = Tile(64, 64, 64, 8, 3, 3), Tile(64, 128, 128, 4, 2)
        problem = tune.Job("contract", "full", 16, "bf16")
        kept = sweep._compiled("contract", "half", [sound, spills], [problem])
        assert kept == [sound], kept
        assert "spills" in sweep._unclean("contract", "half", spills)
"""


@pytest.mark.slow
def test_tiles_that_spill_are_dropped(tmp_path):
    (tmp_path / "spills.py").write_text(SPILLS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "spills.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kernels", "projekt"], "'projekt' is none of"),
        (["--ranks", "0"], "not a list of whole numbers"),
        ([], "unset TRITON_INTERPRET"),
        (["--dry", "--write"], "give another folder as --tables"),
    ],
)
@needs_the_interpreter
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err
