"""A representative subset of the compile report: no spills, fits, tensor cores."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the compile report needs the triton package")

from tools import instructions  # noqa: E402


def run_report(*options):
    """In a process of its own: these tests may run with interpreted kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_report", "--jobs", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def assert_clean(options, least):
    done = run_report(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with a problem" in done.stdout
    assert done.stdout.count(" ok\n") >= least


@pytest.mark.slow
def test_shipped_configurations_are_clean():
    assert_clean(("--terms", "full", "--ranks", "16", "--dtypes", "bf16", "--archs", "sm_90"), 9)


@pytest.mark.slow
def test_the_contraction_at_r_32_does_not_spill_on_other_architectures():
    """It has the most registers; ``nox -s compile_report`` compiles all of it."""
    kernels = ("--kernels", "contract", "contract G")
    adapters = ("--terms", "full", "--ranks", "32", "--dtypes", "bf16+fp32")
    assert_clean((*kernels, *adapters, "--archs", "sm_80", "sm_100", "gfx942"), 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--terms", "full", "--ranks", "8", "--dtypes", "bf16+fp32", "--archs", "sm_80"),
        ("--terms", "square", "--ranks", "64", "--dtypes", "fp16", "--archs", "sm_89", "sm_100"),
        ("--terms", "cross", "--ranks", "4", "--dtypes", "fp32", "--archs", "gfx942"),
        ("--terms", "full", "--ranks", "32", "--dtypes", "fp32", "--archs", "sm_100"),
    ],
    ids=lambda o: " ".join(o[1::2]),
)
def test_more_shipped_configurations_are_clean(options):
    assert_clean(options, 9)


def test_a_configuration_that_spills_is_reported(tmp_path):
    """The check can fail: a tile far too large for its warps must be named."""
    code = (
        "import sys\n"
        "from pera_kernels.kernels import tiles\n"
        "tiles.load_table('sm_90')['contract', 'half'] = tiles.Tile(64, 128, 128, 4, 2)\n"
        "from tools.compile_report import main\n"
        "sys.exit(main(['--terms', 'full', '--ranks', '16', '--dtypes', 'bf16', '--archs', 'sm_90',"
        " '--kernels', 'contract dB', '--jobs', '1']))\n"
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
    [(("--ranks", "0"), "--ranks: must be >= 1"), (("--archs", "sm_10"), "invalid choice")],
)
def test_bad_arguments(options, words):
    done = run_report(*options)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.slow
def test_a_cache_is_filled_and_machine_instructions_are_counted(tmp_path):
    layer = ("--kernels", "layer", "--terms", "full", "--ranks", "4", "--dtypes", "bf16")
    few = ("--archs", "sm_90", "--tokens", "16", "--shapes", "64x48")
    done = run_report("--precompile", *layer, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    # Three launches forward and six backward, some of them twice.
    assert " of 7 distinct launches compiled for sm_90" in done.stdout
    done = run_report("--instructions", *layer[2:], *few[:2], "--kernels", "accumulate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "instructions of a warp" in done.stdout and "multiply-adds on matrix" in done.stdout


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   FFMA R8, R8, R9, RZ ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP ;
"""


def test_a_listing_is_counted():
    loop, rest = instructions.count(LISTING)
    assert loop == instructions.Count(4, 2 * 16 * 8 * 16, 0, 32 * 16, 1, 0)
    assert rest == instructions.Count(6, 0, 32, 32 * 8 + 32 * 16, 1, 1)
    group = "/*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;\n/*0010*/ EXIT ;"
    loop, rest = instructions.count(group)
    assert rest.matrix == 64 * 128 * 16 // 4 and loop == instructions.Count()
    with pytest.raises(ValueError, match="no instructions"):
        instructions.count("")
