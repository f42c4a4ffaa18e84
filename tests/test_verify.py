"""``pera_kernels verify``: what it covers, what it prints, and that it notices a broken kernel."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pera_kernels import testing
from pera_kernels.__main__ import main
from pera_kernels.backends import unavailable
from pera_kernels.cli import arguments, verify
from pera_kernels.cli.commands import COMMANDS
from pera_kernels.cli.verify import OPS, RANKS, SHAPES, Result, Task
from pera_kernels.terms import TERMS
from pera_kernels.testing import Case, Verdict

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--jobs", "0", "--terms", "full", "--ranks", "5", "--shapes", "9x21x13"]
TORCH = [*TINY, "--backend", "torch", "--dtypes", "float32", "--ops", "pera_linear"]
# One wrong token each, and the op that must show it. The last one leaves memory unwritten.
MUTATIONS = {
    "partner": ("pair_tiles.py", "(block - 1, 0)) % R", "(block, 0)) % R", "pera_linear"),
    "dropout scale": ("accumulate.py", "acc * keep_scale, 0.0", "acc, 0.0", "dropout"),
    "last row": ("contract.py", "(offs_r < R)[None, :]", "(offs_r < R - 1)[None, :]", "mixed"),
}


def planned(*options):
    """The tasks of a command line."""
    given = arguments.build(COMMANDS).parse_args(["verify", *options])
    return [task for group in verify.plan(given) for task in group]


@pytest.fixture
def interpreter():
    reason = unavailable("triton", torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_covers_every_terms_rank_dtype_op_and_shape(device):
    tasks = planned("--device", device)
    for backend in verify.BACKENDS:
        own = [task for task in tasks if task.backend == backend]
        combinations = {(task.case.terms, task.case.r, task.dtype) for task in own}
        assert len(combinations) == len(TERMS) * len(RANKS) * 3
        for op in OPS:
            assert {task.case.terms for task in own if task.op == op} == set(TERMS)
            assert {task.case.r for task in own if task.op == op} == set(RANKS)
            shapes = {(task.case.T, task.case.N, task.case.M) for task in own if task.op == op}
            assert shapes == set(SHAPES[device])
    assert len(set(tasks)) == len(tasks)


def test_what_is_asked_for_is_not_sampled():
    options = ["--device", "cpu", "--terms", "full", "--ranks", "2", "3", "--dtypes", "bfloat16"]
    tasks = planned(*options, "--ops", *OPS, "--shapes", "3x4x5", "6x7x8", "6x7x8")
    assert len(tasks) == len(OPS) * 2 * 2 * len(verify.BACKENDS)
    tasks = planned(*options, "--exhaustive")
    assert len(tasks) == len(OPS) * 2 * len(SHAPES["cpu"]) * len(verify.BACKENDS)


def test_default_shapes_reach_every_split(interpreter):
    from pera_kernels.kernels.contract import _contract_tile
    from pera_kernels.kernels.launch import recorded

    with recorded() as calls:
        for T, N, M in SHAPES["cpu"]:
            case = Case(terms="cross", r=12, T=T, N=N, M=M, dtype=torch.bfloat16)
            testing.run(case, testing.make_inputs(case), "triton")
    projections, contractions = (
        [call.arguments for call in calls if call.kernel.__name__ == name]
        for name in ("project_kernel", "contract_kernel")
    )
    assert any(a["n_per_split"] < a["N"] for a in projections), "features were not split"
    names = _contract_tile.arg_names[1:]
    jobs = [dict(zip(names, job, strict=False)) for a in contractions for job in a["jobs"]]
    assert any(job["t_per_split"] < job["T"] for job in jobs), "tokens were not split"
    assert any(a["PIECES"] * a["BLOCK_K"] < a["LANES"] for a in contractions), "nor lanes"


def test_what_it_prints(capsys):
    assert main(["verify", *TORCH]) == 0
    text = capsys.readouterr()
    assert "\x1b" not in text.out and "\r" not in text.out and text.err == ""
    lines = text.out.splitlines()
    assert "torch: pera_linear" in lines and "tokens x in x out: 9x21x13" in lines
    (line,) = [line for line in lines if line.startswith("pass ")]
    assert line.endswith("pera_linear full r=5 float32 torch 9x21x13") and len(line) <= 100
    assert "pera_linear torch: 1 cases, 5 outputs, 0 failed, 0 unavailable; " in text.out
    assert main(["verify", *TORCH, "--failures"]) == 0
    assert "\npass " not in capsys.readouterr().out


def test_failures_are_told_in_words_and_fail(monkeypatch, capsys):
    def broken(case, backend, device):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(testing, "check", broken)
    assert main(["verify", *TORCH, "--failures"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no such kernel\n" in text
    assert "--ops pera_linear --terms full --ranks 5 --dtypes float32 --shapes 9x21x13" in text
    assert "all: 1 cases, 0 outputs, 1 failed" in text


def test_a_gpu_error_breaks_the_process_and_what_follows_says_so(monkeypatch):
    def broken(case, backend, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(testing, "check", broken)
    monkeypatch.setattr(verify, "_broken", "")
    group = [Task("pera_linear", "torch", Case(r=r)) for r in (1, 2)]
    first, second = next(verify.measure([group], "cpu", jobs=0))
    assert first.error.startswith("RuntimeError: CUDA error: an illegal memory access")
    assert second.error.startswith("not run, an earlier case broke the process: RuntimeError")
    assert first.failed and second.failed


class EndsItsProcess:
    """A task that ends the process which receives it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_is_reported():
    (results,) = verify.measure([[EndsItsProcess()]], "cpu", jobs=1)
    assert [r.error for r in results] == ["not run, or cut off: one of the processes died"]
    assert results[0].failed


def test_several_processes_judge_every_task():
    groups = [[Task("delta_weight", "torch", Case(op="delta_weight", r=r))] for r in (2, 3)]
    results = [result for some in verify.measure(groups, "cpu", jobs=2) for result in some]
    assert {r.task for r in results} == {task for group in groups for task in group}
    assert not any(r.failed for r in results)


def test_a_backend_that_cannot_run_is_no_pass(capsys):
    arguments = ["verify", *TINY, "--dtypes", "float64", "--ops", "delta_weight"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "unavailable  delta_weight full r=5 float64 triton 9x21x13: it computes in" in text
    assert "delta_weight triton: 0 cases, 0 outputs, 0 failed, 1 unavailable" in text
    assert main([*arguments, "--backend", "triton"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "3x4"], "argument --shapes: '3x4' is not TOKENSxINxOUT"),
        (["--ranks", "0"], "argument --ranks: '0' is not a whole number from 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
        (["--ops", "mixed", "--dtypes", "float32"], "--ops mixed is about bfloat16 and float16"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--device", "cpu", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_failure_by_a_handful_of_values_is_judged_on_more_draws(monkeypatch):
    unlucky = Verdict("dh", 30.0, 30.0, 8.0, 4.0, 0.0, 0.0, count=8)
    verdicts = {None: unlucky, 40: replace(unlucky, max_error=1.0, rms_error=1.0)}

    def check(case, backend, device, pooled=None):
        return [verdicts[pooled]]

    monkeypatch.setattr(testing, "check", check)
    task = Task("pera_linear", "torch", Case(r=1))
    assert verify.judge(task, "cpu")[0].passed
    # Many values, or something that is not finite, are no chance.
    for reason in ({"count": 64}, {"notes": ("not finite",)}):
        verdicts[None] = replace(unlucky, **reason)
        assert not verify.judge(task, "cpu")[0].passed


def test_pooled_draws_keep_the_largest_error():
    """Of several draws the maximum stands; only the mean is averaged."""
    case = Case(r=1)
    assert testing.draws(case) == 8
    few, many = (testing.check(case, "torch", pooled=pooled) for pooled in (None, 40))
    for a, b in zip(few, many, strict=True):
        assert b.count == 5 * a.count and b.max_error >= a.max_error > 0


def test_a_task_without_verdicts_has_not_passed():
    assert Result(Task("pera_linear", "torch", Case())).failed


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "partner" else pytest.mark.slow) for name in MUTATIONS],
)
def test_a_broken_kernel_is_noticed(name, tmp_path, interpreter):
    file, right, wrong, op = MUTATIONS[name]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pera_kernels", tmp_path / "pera_kernels", ignore=ignore)
    path = tmp_path / "pera_kernels" / "kernels" / file
    source = path.read_text()
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong))
    done = subprocess.run(
        [sys.executable, "-m", "pera_kernels", "verify", *TINY, "--backend", "triton"]
        + ["--ops", op, "--dtypes", "bfloat16", "--failures"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "all: 1 cases" in done.stdout and ", 1 failed" in done.stdout, done.stdout
