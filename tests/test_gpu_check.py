"""``tools/gpu_check.sh`` without a GPU: usage, limits, command lines, and both runs dry."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
# Seconds of each run, and how many results may come back from it.
LONGEST = {"first": 540, "second": 210}
MOST_FILES = 8


def check(*words, **environment):
    environment = {**os.environ, "DRY": "0", **environment}
    command = ["bash", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize(
    "words", [(), ("first",), ("all", "out"), ("first", "out", "more"), ("second", "--fast")]
)
def test_bad_usage(words, tmp_path):
    done = check(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tools/gpu_check.sh first|second OUT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = check("first", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu_check: no GPU")


# Writes its arguments down; the benchmarks fail.
STAND_IN = """#!/bin/sh
echo "$@" | tr '\\n' ' ' >>"$CALLS"
echo >>"$CALLS"
[ "$2" != benchmarks ]
"""


@pytest.mark.parametrize("part", LONGEST)
def test_limits_and_command_lines(part, tmp_path):
    """With a stand-in for Python: every step is run, whatever failed before, within the time; the
    commands take the options that they are given.
    """
    from benchmarks import __main__ as layers
    from benchmarks import decoder, kernels
    from tools import compile_report, tune

    for name in ("python3", "compute-sanitizer"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = check(part, tmp_path / "out", PATH=path, CALLS=str(tmp_path / "calls"))
    assert done.returncode == 1
    limits = [
        int(seconds) for seconds in re.findall(r"^== .* \(at most (\d+) s\)$", done.stdout, re.M)
    ]
    assert len(limits) > 1 and sum(limits) <= LONGEST[part]
    parsers = {
        "benchmarks": layers.parser().parse_args,
        "benchmarks.kernels": kernels.parser().parse_args,
        "benchmarks.decoder": decoder.parser().parse_args,
        "tools.compile_report": compile_report._parser().parse_args,
        "tools.tune": tune._parser().parse_args,
    }
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    for _, module, *words in [call for call in calls if call[0] == "-m" and call[1] in parsers]:
        parsers[module](["cpu" if word == "cuda" else word for word in words])


@pytest.mark.slow
@pytest.mark.parametrize("part", LONGEST)
def test_a_dry_run(part, tmp_path):
    done = check(part, tmp_path, "--dry", PERA_COMMIT="0123456789ab")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    exits = re.findall(r"^-- exit (\d+) after", done.stdout, re.M)
    assert len(exits) > 1 and set(exits) == {"0"}
    files = list(tmp_path.iterdir())
    assert len(files) <= MOST_FILES and all(path.is_file() for path in files)
    rows = [
        json.loads(line)
        for path in files
        if path.suffix == ".jsonl"
        for line in path.read_text().splitlines()
    ]
    assert rows and {row["commit"] for row in rows} == {"0123456789ab"}
