"""The fine-tune on several processes: the curve of one, checkpoints, a rank that ends."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the tools need matplotlib")
pytest.importorskip("rich", reason="the tools need rich")
pytest.importorskip("tqdm", reason="the tools need tqdm")

from pera_kernels.testing import judge
from tests import finetune_cases as cases
from tools.finetune import __main__ as program
from tools.finetune.ranks import lost_a_rank

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "6", "--pretrain-steps", "3", "--rank", "3", "--terms", "full"]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Of one process, in float32 and in float64."""
    one = cases.losses(tmp_path_factory.mktemp("one"))
    torch.set_default_dtype(torch.float64)
    try:
        truth = cases.losses(tmp_path_factory.mktemp("truth"))
    finally:
        torch.set_default_dtype(torch.float32)
    return one, truth


def assert_same_curve(found, curves):
    one, truth = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    found = torch.tensor(found, dtype=torch.float64)
    verdict = judge("loss", found.float(), one.float(), truth, torch.float32)
    assert verdict.passed, verdict


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), "tp"])
def test_the_curve_is_that_of_one_process(two_ranks, averages, how, curves, tmp_path):
    for found in two_ranks.run(cases.losses, str(tmp_path), how):
        assert_same_curve(found, curves)


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_through_peft(two_ranks, averages, how, curves, tmp_path):
    pytest.importorskip("peft")
    first, second = two_ranks.run(cases.losses, str(tmp_path), how, peft=True)
    assert first == second
    # PEFT draws A on its own; the base was trained alike.
    assert_same_curve(first[:4], [curve[:4] for curve in curves])
    assert (tmp_path / "adapter_pera_full" / "adapter_model.safetensors").exists()


def test_a_run_that_ended_goes_on_with_other_ranks(two_ranks, one_rank, averages, curves, tmp_path):
    two_ranks.run(cases.stopped, str(tmp_path), "fsdp", 5)
    ((folder, found),) = one_rank.run(cases.resumed, str(tmp_path), None)
    assert folder == "pera_full-4"
    assert_same_curve(found, curves)


@pytest.mark.slow
def test_one_process_goes_on_on_two(two_ranks, curves, tmp_path):
    cases.stopped(tmp_path, None, 3)
    for folder, found in two_ranks.run(cases.resumed, str(tmp_path), "tp"):
        assert folder == "pera_full-2"
        assert_same_curve(found, curves)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, ["--parallel", "ddp"], "torchrun --nproc-per-node=2 -m tools.finetune --parallel ddp"),
        ({}, ["--parallel", "zero"], "invalid choice: 'zero'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "there are 2 processes: say --parallel ddp"),
        (
            {"WORLD_SIZE": "3", "RANK": "0"},
            ["--parallel", "ddp"],
            "must be a multiple of the 3 processes; got 8",
        ),
        (
            {"WORLD_SIZE": "8", "RANK": "0"},
            ["--parallel", "tp"],
            "tp splits 4 heads, which 8 processes do not divide",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            ["--parallel", "tp", "--peft"],
            "goes with --parallel ddp or fsdp",
        ),
        ({}, ["--resume"], "there is no checkpoint in"),
    ],
)
def test_bad_use_is_refused_in_one_line(
    environment, options, message, tmp_path, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refusal:
        program.main([*options, "--out", str(tmp_path)])
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, capsys):
    cases.stopped(tmp_path, None, 3)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        program.main(["--resume", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert "was made with rank 3" in error and error.count("\n") == 1


def resume_options(out):
    sizes = ["--steps", "6", "--pretrain-steps", "3", "--batch", "4", "--rank", "3", "--seed", "5"]
    return [
        *sizes,
        "--terms",
        "full",
        "--lr-h",
        "10",
        "--lr",
        "1e-2",
        "--resume",
        "--out",
        str(out),
    ]


def test_what_cannot_be_gone_on_from_is_refused(tmp_path, monkeypatch, capsys):
    cases.stopped(tmp_path, None, 3)
    capsys.readouterr()

    def refused(*options):
        with pytest.raises(SystemExit) as refusal:
            program.main([*resume_options(tmp_path), *options])
        error = capsys.readouterr().err
        assert refusal.value.code == 2 and error.count("\n") == 1
        return error

    # The whole texts, where the checkpoint's job had a part of them.
    assert "was made with texts of digest" in refused()
    monkeypatch.setattr(program, "load_corpora", cases.corpora)
    assert "was made with adapters of 'pera_kernels'" in refused("--peft")
    pointer = tmp_path / "checkpoint" / "latest.json"
    whole = pointer.read_text()
    pointer.write_text(whole[:-20])
    assert "cannot read" in refused()
    pointer.write_text(whole.replace("pera_full-2", "pera_full-4"))
    assert "it names no folder that is there" in refused()
    pointer.write_text(whole)
    (tmp_path / "base.pt").unlink()
    assert "there is no checkpoint in" in refused()


def test_a_job_that_begins_anew_forgets_the_checkpoint(tmp_path):
    cases.stopped(tmp_path, None, 3)
    made = cases.job(tmp_path, every=100)
    assert made.checkpoints.latest() is not None
    made.train()
    assert made.checkpoints.latest()["folder"] == "pera_full-6"
    cases.stopped(tmp_path, None, 1)
    assert made.checkpoints.latest() is None


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("the pretraining diverged: there is nothing to adapt"), False),
    ],
)
def test_only_the_group_says_that_a_rank_is_lost(error, lost):
    assert lost_a_rank(error) is lost


def start(command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A group of its own: nothing is left over.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def end(process, seconds=240):
    """The exit status and what was written."""
    try:
        text, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


def torchrun(*options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node=2", "-m", "tools.finetune", *options]


def readme_commands():
    text = (ROOT / "README.md").read_text()
    section = re.search(r"\n## Several GPUs\n(.*?)\n## ", text, re.DOTALL)[1]
    lines = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    return [line.partition("#")[0].strip() for line in lines]


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path):
    commands = readme_commands()
    assert len(commands) == 3
    for number, command in enumerate(commands):
        words = shlex.split(command)
        folder = str(Path(sys.executable).parent)
        words[0] = f"{folder}/{words[0]}"
        out = tmp_path if "--resume" in words else tmp_path / str(number)
        if "--resume" in words:
            out = tmp_path / "0"
        elif words[0].endswith("torchrun"):
            words.insert(1, "--standalone")
        small = [*SMALL, "--device", "cpu", "--out", str(out), "--checkpoint-every", "3"]
        status, text = end(start([*words, *small]))
        assert status == 0, text
        assert (out / "results.json").exists() and "Written to" in text


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_it_goes_on(tmp_path, rank):
    steps = ["--steps", "100", "--pretrain-steps", "3", "--rank", "3", "--terms", "full"]
    own = [*steps, "--device", "cpu", "--out", str(tmp_path), "--checkpoint-every", "5"]
    run = start(torchrun("--parallel", "ddp", *own))
    pointer = tmp_path / "checkpoint" / "latest.json"
    began = time.monotonic()
    while not pointer.exists() and time.monotonic() - began < 200 and run.poll() is None:
        time.sleep(0.1)
    assert pointer.exists(), end(run, 1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[rank]), signal.SIGKILL)
    status, text = end(run, 200)
    assert status != 0
    assert re.search(
        rf"(Rank {1 - rank} stopped because another rank ended|Interrupted).*"
        r"the last checkpoint, step \d+ of PERA full, is in .*--resume goes on",
        text,
    ), text
    # The survivor says one line, and ends by itself.
    assert "KeyboardInterrupt" not in text and "Unable to shutdown process" not in text, text
    status, text = end(start(torchrun("--parallel", "fsdp", "--resume", *own)), 400)
    assert status == 0, text
