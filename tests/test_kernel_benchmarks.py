"""``benchmarks.kernels`` and ``benchmarks.host``: what their rows say, without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the triton package")

from benchmarks import host, kernels, results  # noqa: E402
from benchmarks.kernels import Measured, bench_kernels, verdict  # noqa: E402
from tools.tune import measure  # noqa: E402
from tools.tune.problems import Problem  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def measured(milliseconds, problem, tflops=800.0, gbps=4000.0):
    return Measured("accumulate", problem, measure.Timed((milliseconds,) * 3), tflops, gbps)


def test_work_of_kernels():
    accumulate = Problem("accumulate", T=100, N=64, r=4)
    assert accumulate.bytes() == 2 * (2 * 100 * 64 + 100 * 16 + 16 * 64)
    assert accumulate.flops() == 2 * 100 * 14 * 64
    project = Problem("project", "mixed", T=100, N=64, r=4)
    assert project.bytes() == 2 * (100 * 64 + 100 * 16) + 4 * (4 * 64)
    contract = Problem("contract", "single", T=100, N=64, r=4)
    assert contract.bytes() == 4 * (100 * 64 + 100 * 16 + 2 * 4 * 64 + 2 * 10)
    assert Problem("sum", T=10, r=4, parts=3).bytes() == 10 * 16 * (3 * 4 + 2)


@pytest.mark.parametrize(
    "milliseconds, tflops, expected",
    [
        (0.04, 800.0, "memory-bound, met"),
        (0.05, 800.0, "memory-bound, MISSED"),
        (0.05, 10.0, "compute-bound"),
    ],
)
def test_verdicts(milliseconds, tflops, expected):
    problem = Problem("accumulate", T=8192, N=4096)
    assert problem.bytes() / 4000e9 == pytest.approx(0.0345e-3, rel=0.02)
    assert verdict(measured(milliseconds, problem, tflops)) == expected
    assert verdict(measured(0.05, replace(problem, T=16))) == "short"


def test_a_layer_has_every_kernel_once():
    half = bench_kernels(kernels.NAMES, 512, (1024, 2048), 16, "full", "half")
    assert tuple(half) == kernels.NAMES
    assert half["project-A"].N == 1024 and half["project-B"].N == 2048
    mixed = bench_kernels(kernels.NAMES, 512, (1024, 2048), 16, "full", "mixed")
    assert set(kernels.NAMES) - set(mixed) == set(kernels.WITHOUT_MIXED)


def test_rows_of_judged_and_timed_kernels(triton_backend, device, monkeypatch):
    """All kernels on tiny operands; one is spoiled and must not be timed."""
    group = {
        name: replace(problem, N=problem.N and 40, M=problem.M and 24)
        for name, problem in bench_kernels(kernels.NAMES, 19, (40, 24), 5, "full", "half").items()
    }
    original = measure.wrong

    def spoiled(problem, *rest):
        return ["too far"] if problem.kernel == "sum" else original(problem, *rest)

    def time_calls(calls, rounds):
        for own in calls.values():
            for call in own:
                call()
        return {name: measure.Timed((0.01,) * rounds) for name in calls}

    monkeypatch.setattr(measure, "wrong", spoiled)
    monkeypatch.setattr(measure, "time_calls", time_calls)
    monkeypatch.setattr(
        measure, "operand_sets", lambda problem, device: [measure.Operands(problem, device)]
    )

    class Ceilings:
        def gbps(self):
            return 4000.0

        def tflops(self, dtype):
            assert dtype == torch.bfloat16
            return 800.0

    rows = kernels._run(group, "bfloat16", 3, device, results.host(device), Ceilings())
    failed = [row for row in rows if row.status == "failed"]
    assert [(row.contender, row.note) for row in failed] == [("kernel:sum", "too far")]
    timed = {row.contender: row for row in rows if row.status == "timed"}
    assert set(timed) == {f"kernel:{name}" for name in kernels.NAMES if name != "sum"}
    row = timed["kernel:project-A"]
    assert row.gbps == pytest.approx(group["project-A"].bytes() / 1e-5 / 1e9, rel=1e-4)
    assert row.phase == "kernel" and row.graph and row.m == 0
    assert all(len(kernels._show(row)) < 120 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_need_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        kernels.main([])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no GPU here" in line


def test_parts_add_up():
    names = ("module", "function", "op", "direct", "base")
    samples = {(name, "forward"): [100.0 - 10 * k, 200.0 - 20 * k] for k, name in enumerate(names)}
    found = host.parts(samples, "forward")
    assert found["checks"] == [10.0, 20.0] and found["base product"] == [60.0, 120.0]
    assert found["Triton"] == [0.0, 0.0]
    for k in range(2):
        assert sum(found[part][k] for part in host.PARTS) == found["total"][k]
    samples["silent", "forward"] = [65.0, 125.0]
    on_gpu = host.parts(samples, "forward")
    assert on_gpu["Triton"] == [5.0, 15.0] and on_gpu["launch path"] == [5.0, 5.0]


def test_host_tool_runs_on_a_cpu(tmp_path):
    path = tmp_path / "host.jsonl"
    words = ["--device", "cpu", "--T", "2", "--features", "32", "--rounds", "3"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host", *words, "--out", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_name = {(row["contender"], row["phase"]): row for row in rows}
    assert ("host:nn.Linear", "forward") in by_name and ("host:LoRA", "backward") in by_name
    for phase in ("forward", "backward"):
        assert by_name["host:PeraLinear launch path", phase]["host_us"] > 0
        assert by_name["host:PeraLinear total", phase]["note"] == "kernels replaced by nothing"
    assert "launch path" in done.stdout


def test_host_tool_refuses_bad_arguments(capsys):
    for words, message in ((["--T", "0"], "--T"), (["--terms", "cubic"], "'cubic' is none of")):
        with pytest.raises(SystemExit) as stop:
            host.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
