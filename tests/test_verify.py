"""``pera_kernels verify``: what it covers, what it prints, and that it notices a broken kernel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pera_kernels import configs
from pera_kernels.backends import unavailable
from pera_kernels.terms import TERMS
from pera_kernels.verify import measure
from pera_kernels.verify.__main__ import main
from pera_kernels.verify.numerics import Case, Verdict
from pera_kernels.verify.plan import DEFAULT_DTYPES, OPS, RANKS, SHAPES, Request, Task, plan

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--jobs", "0", "--terms", "full", "--ranks", "8", "--shapes", "9x21x13"]
TORCH = [*TINY, "--backend", "torch", "--dtypes", "float32", "--ops", "pera_linear"]
# One wrong token each, and the op that must show it. The last one leaves memory unwritten.
MUTATIONS = {
    "partner": ("common.py", "(block - 1, 0)) % R", "(block, 0)) % R", "pera_linear"),
    "dropout scale": ("accumulate.py", "acc * keep_scale, 0.0", "acc, 0.0", "dropout"),
    "last row": ("contract.py", "offs_r < MEMBERS * R", "offs_r < R - 1", "mixed"),
}


def default_request(device: str) -> Request:
    return Request(device, None, TERMS, RANKS, DEFAULT_DTYPES)


@pytest.fixture
def interpreter():
    reason = unavailable("triton", torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_covers_every_terms_rank_dtype_op_and_shape(device):
    tasks = plan(default_request(device))
    for backend in ("triton", "torch"):
        own = [task for task in tasks if backend in task.backends]
        combinations = {(task.case.terms, task.case.r, task.dtype) for task in own}
        assert len(combinations) == len(TERMS) * len(RANKS) * len(DEFAULT_DTYPES)
        shapes = {f"{T}x{N}x{M}" for T, N, M in SHAPES[device]}
        for op in OPS:
            assert {task.case.terms for task in own if task.op == op} == set(TERMS)
            assert {task.case.r for task in own if task.op == op} == set(RANKS)
            assert {task.shape for task in own if task.op == op} >= shapes
    assert len({(task.op, task.case) for task in tasks}) == len(tasks)


def test_what_is_asked_for_is_not_sampled():
    shapes = ((3, 4, 5), (6, 7, 8))
    request = Request("cpu", None, ("full",), (2, 3), ("bfloat16",), tuple(OPS), shapes)
    tasks = plan(request)
    assert len(tasks) == len(OPS) * 2 * len(shapes)
    assert all(task.backends == ("triton", "torch") for task in tasks)


def test_default_shapes_reach_every_split(interpreter):
    parts: dict[int, int] = {}

    def recorded(size: int, wanted: int, granule: int) -> tuple[int, int]:
        found = real(size, wanted, granule)
        parts[size] = max(parts.get(size, 0), found[0])
        return found

    def counted(lanes: int, block_k: int, most: int) -> int:
        found = real_pieces(lanes, block_k, most)
        parts[lanes] = max(parts.get(lanes, 0), -(-lanes // (found * block_k)))
        return found

    real, real_pieces = configs.split, configs.pieces
    with (
        mock.patch.object(configs, "split", recorded),
        mock.patch.object(configs, "pieces", counted),
    ):
        for T, N, M in SHAPES["cpu"]:
            case = Case(terms="cross", r=12, T=T, N=N, M=M, dtype=torch.bfloat16)
            rows = next(measure.measure([Task("pera_linear", case, ("triton",))], "cpu", jobs=0))
            assert [row.status for row in rows] == ["pass"], rows
    # Features in project, tokens and the 80 lanes of the expanded rank (12 + 66) in contract.
    assert parts[140] > 1 and parts[260] > 1 and parts[80] > 1, parts


def test_table_and_json(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main([*TORCH, "--json", str(file)]) == 0
    text = capsys.readouterr()
    assert "\x1b" not in text.out and "\r" not in text.out and text.err == ""
    (line,) = [line for line in text.out.splitlines() if line.startswith("pera_linear full")]
    assert " pass " in line and len(line) <= 120
    assert text.out.splitlines()[-1].startswith("1 case, 5 outputs, 0 failed; largest ratio 0.")
    found = json.loads(file.read_text())
    assert set(found["versions"]) >= {"python", "torch", "triton", "numpy", "pera_kernels"}
    (row,) = found["rows"]
    assert (row["op"], row["r"], row["N"], row["status"]) == ("pera_linear", 8, 21, "pass")
    assert [output["name"] for output in row["outputs"]] == ["y", "dx", "dA", "dB", "dh"]
    assert all(output["passed"] and output["max_error"] > 0 for output in row["outputs"])


def test_failures_are_told_in_words_and_fail(monkeypatch, capsys):
    def broken(case, backend, device):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(measure, "check", broken)
    assert main([*TORCH, "--failures"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no such kernel\n" in text
    assert "--ops pera_linear --terms full --ranks 8 --dtypes float32 --shapes 9x21x13" in text
    assert "1 case, 0 outputs, 1 failed (0 outputs, 1 error)" in text


def test_a_backend_that_cannot_run_is_no_pass(capsys):
    arguments = [*TINY, "--dtypes", "float64", "--ops", "delta_weight"]
    assert main(arguments) == 0
    assert "triton could not run 1 case: it computes in" in capsys.readouterr().out
    assert main([*arguments, "--backend", "triton"]) == 1
    assert "0 cases, 0 outputs, 0 failed, 1 case could not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "3x4"], "argument --shapes: '3x4' is not TOKENSxINxOUT"),
        (["--ranks", "0"], "argument --ranks: '0' is not a whole number >= 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number >= 0"),
        (["--ops", "mixed", "--dtypes", "float32"], "argument --ops: mixed is about"),
        (["--json", "no/such/folder/f.json"], "argument --json: no/such/folder is not"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_failure_by_a_handful_of_values_is_judged_on_more_draws(monkeypatch):
    seeds = []

    def unlucky_once(case, backend, device):
        seeds.append(case.seed)
        error = 30.0 if len(seeds) == 1 else 1.0
        return [Verdict(name, error, error, 8.0, 4.0, 0.0, 0.0, (7, 0)) for name in names]

    monkeypatch.setattr(measure, "check", unlucky_once)
    case = Case(r=1)
    names = ["dh"]
    (verdict,), draws = measure._judge(case, "torch", "cpu")
    assert draws == 40 and seeds == [0, 8000, 16000, 24000, 32000]
    # The maximum stands: only what chance can do to a mean is averaged out.
    assert verdict.max_error == 30.0 and not verdict.passed
    assert verdict.rms_error == pytest.approx(((900 + 4) / 5) ** 0.5)
    seeds.clear()
    names = ["dx"]
    assert measure._judge(case, "torch", "cpu")[1] == 8 and len(seeds) == 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, interpreter):
    file, right, wrong, op = MUTATIONS[name]
    for package in ("pera_kernels", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    path = tmp_path / "pera_kernels" / "kernels" / file
    source = path.read_text()
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong))
    done = subprocess.run(
        [sys.executable, "-m", "tools.verify", *TINY, "--backend", "triton", "--ops", op]
        + ["--dtypes", "bfloat16", "--failures"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout and "0 errors" in done.stdout, done.stdout
