"""``tools/gpu_check.sh`` without a GPU: usage, its parts and markers with a stand-in for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = ("check", "bench", "layer", "tune")
# Writes its arguments down; fails where one of them is $FAIL.
STAND_IN = """#!/bin/sh
echo "$@" | head -n 1 >>"$CALLS"
for word in "$@"; do
    [ "$word" = "$FAIL" ] && exit 3
done
exit 0
"""


@pytest.fixture
def check(tmp_path):
    """Run the script with a Python that does nothing; returns (process, what Python was called
    with).
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text(STAND_IN)
    (folder / "python3").chmod(0o755)

    def run(*words, fail=""):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = os.pathsep.join([str(folder), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "CALLS": str(calls), "FAIL": fail}
        command = ["bash", str(SCRIPT), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        return done, calls.read_text().splitlines()

    return run


def test_syntax():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    "words", [(), ("check",), ("everything", "out"), ("check", "out", "more"), ("check", "--fast")]
)
def test_bad_usage(words, check, tmp_path):
    done, calls = check(*words)
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("usage: tools/gpu_check.sh PART OUT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    if shutil.which("python3") is None:
        pytest.skip("no python3 on the path")
    done = subprocess.run(
        ["bash", str(SCRIPT), "check", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu_check: no GPU")


def test_a_part_that_passed_is_skipped_next_time(check, tmp_path):
    out = tmp_path / "out"
    done, calls = check("tune", out)
    assert done.returncode == 0
    assert [call.split()[:2] for call in calls[1:]] == [["-m", "tools.tune"]]
    assert "--resume" in calls[1] and "--write" in calls[1]
    done, calls = check("tune", out)
    assert done.returncode == 0 and len(calls) == 1 and "before" in done.stdout
    done, calls = check("tune", out, "--again")
    assert done.returncode == 0 and len(calls) == 2


def test_a_part_that_failed_runs_again_and_the_others_go_on(check, tmp_path):
    out = tmp_path / "out"
    done, calls = check("all", out, fail="benchmarks.host")
    assert done.returncode == 1
    assert "FAILED  host (exit 3), see bench.txt" in done.stdout
    modules = {call.split()[1] for call in calls if call.startswith("-m")}
    assert modules >= {"pytest", "tools.verify", "benchmarks", "benchmarks.decoder", "tools.tune"}
    assert {path.name for path in out.iterdir()} == {
        *(f"{part}.txt" for part in PARTS),
        *(f".done-{part}" for part in PARTS if part != "bench"),
    }
    done, calls = check("all", out)
    assert done.returncode == 0
    assert {call.split()[1] for call in calls[1:]} == {
        "tools.tune.precompile",
        "benchmarks.kernels",
        "benchmarks.host",
        "benchmarks",
    }


def test_options_of_the_tools_exist(check, tmp_path):
    """The script's command lines are what the tools take: each says that there is no GPU, or fails
    later, but does not refuse an option.
    """
    from benchmarks import __main__ as suite
    from benchmarks import host, kernels
    from benchmarks.decoder import __main__ as decoder
    from tools.tune import __main__ as tune
    from tools.tune import precompile

    parsers = {
        "tools.tune": tune._parser(),
        "tools.tune.precompile": precompile._parser(),
        "benchmarks.kernels": kernels._parser(),
        "benchmarks.host": host._parser(),
        "benchmarks.decoder": decoder._parser(),
        "benchmarks": suite._parser(),
    }
    _, calls = check("all", tmp_path / "out")
    seen = set()
    for call in calls:
        _, name, *words = [*call.split(), ""]
        if name in parsers:
            words = ["cpu" if word == "cuda" else word for word in words if word]
            parsers[name].parse_args(words)
            seen.add(name)
    assert seen == set(parsers)
