"""A representative subset of the compile report: no spills, fits, tensor cores."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the compile report needs the triton package")


def run_report(*options):
    """In a process of its own: these tests may run with interpreted kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_report", "--jobs", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.parametrize(
    "options",
    [
        ("--terms", "full", "--ranks", "16", "--dtypes", "bf16", "--archs", "sm_90"),
        ("--terms", "full", "--ranks", "8", "--dtypes", "bf16+fp32", "--archs", "sm_80"),
        ("--terms", "square", "--ranks", "64", "--dtypes", "fp16", "--archs", "sm_89", "sm_100"),
        ("--terms", "cross", "--ranks", "4", "--dtypes", "fp32", "--archs", "gfx942"),
    ],
    ids=lambda o: " ".join(o[1::2]),
)
def test_shipped_configurations_are_clean(options):
    done = run_report(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with a problem" in done.stdout
    assert done.stdout.count(" ok\n") >= 9


def test_a_configuration_that_spills_is_reported(tmp_path):
    """The check can fail: a tile far too large for its warps must be named."""
    code = (
        "import sys\n"
        "from pera_kernels import configs\n"
        "configs.load_table('sm_90')['contract', 'half'] = configs.Tile(64, 128, 128, 4, 2)\n"
        "from tools.compile_report import main\n"
        "sys.exit(main(['--terms', 'full', '--ranks', '16', '--dtypes', 'bf16', '--archs', 'sm_90',"
        " '--kernels', 'contract dB dh', '--jobs', '1']))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills" in done.stdout


@pytest.mark.parametrize(
    "options, words",
    [(("--ranks", "0"), "--ranks must be >= 1"), (("--archs", "sm_10"), "invalid choice")],
)
def test_bad_arguments(options, words):
    done = run_report(*options)
    assert done.returncode == 2 and words in done.stderr
