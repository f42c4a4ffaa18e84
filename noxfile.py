"""What is run beside ``pytest``: lint, other versions, the package, an audit, compiled kernels.

    nox --list                      every session
    nox -s lint package             these
    nox -s "tests(oldest)"          one combination of versions

PyTorch's CPU builds keep environments small: where pip does not find them by itself, set
PIP_EXTRA_INDEX_URL to PyTorch's index of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.sessions = ["lint", "package"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
TORCH, NUMPY = "torch==2.13.0", "numpy<2.4"
# What pyproject.toml promises, from the oldest to whatever is newest today.
VERSIONS = {
    "oldest": (
        *("torch==2.8.0", "triton==3.4.0", "numpy==1.26.0", "pytest==8.0.0"),
        *("safetensors==0.4.5", "peft==0.21.0", "transformers==4.57.3"),
    ),
    "numpy-2.0": (TORCH, "triton==3.7.1", "numpy==2.0.2"),
    # The interpreter of Triton 3.6.0 breaks with NumPy >= 2.4; its compiler does not care.
    "triton-3.6": (TORCH, "triton==3.6.0", NUMPY),
    "newest": ("torch", "triton", "numpy", "peft", "transformers"),
}
PYTHONS = {"oldest": "3.10", "numpy-2.0": "3.11", "triton-3.6": "3.11", "newest": "3.13"}
# One file for each concern; the interpreter under inductor is the slowest of the rest.
QUICK = (
    *(f"tests/test_{name}.py" for name in ("terms", "reference", "bad_input", "module")),
    *(f"tests/test_{name}.py" for name in ("autograd", "dropout", "checkpoint", "compile")),
    *(f"tests/test_{name}.py" for name in ("peft", "export")),
    *("-k", "not (inductor and triton)"),
)
COMPILERS = ("triton==3.6.0", "triton==3.7.1", "triton")
PERMISSIVE = (
    *("Apache", "BSD", "MIT", "ISC", "Python Software Foundation", "PSF", "Zlib", "CC0"),
    *("0BSD", "BSL", "Unlicense", "HPND"),
    # File by file; neither changed nor shipped by this project.
    *("MPL-2.0", "Mozilla Public License 2.0"),
    # What PyTorch for CUDA brings; not shipped by this project.
    "NVIDIA",
)
SMOKE = """
import sys, pathlib, torch, pera_kernels as pk
from pera_kernels.kernels import tiles
home = pathlib.Path(pk.__file__).parent
assert home.is_relative_to(sys.prefix), f"imported from outside the environment: {home}"
assert (home / "py.typed").exists() and all(map(tiles.load_table, sys.argv[1:]))
layer = pk.PeraLinear(24, 12, r=3)
torch.nn.init.normal_(layer.pera_B)
torch.nn.init.normal_(layer.pera_h)
x, (A, B, h) = torch.randn(5, 24), (layer.pera_A, layer.pera_B, layer.pera_h)
truth = pk.reference.pera_linear(x, layer.weight, A, B, h, layer.bias, scale=layer.scale)
outputs = ([y, *torch.autograd.grad(y.sum(), (A, B, h))] for y in (layer(x), truth))
for got, expected in zip(*outputs):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
"""


@nox.session
@nox.parametrize(
    ["python", "versions"],
    [nox.param(PYTHONS[name], versions, id=name) for name, versions in VERSIONS.items()],
)
def tests(session: nox.Session, versions: tuple[str, ...]) -> None:
    """A few quick files for each concern, on one combination of versions."""
    session.install("-e", ".[test]", *versions)
    session.run("pytest", *(session.posargs or QUICK))


@nox.session
def slow(session: nox.Session) -> None:
    """What takes long: thousands of random cases, whole models, kernels in the interpreter."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def parallel(session: nox.Session) -> None:
    """Several processes: compiled models, the fine-tune by torchrun and accelerate, a rank that is
    killed.
    """
    session.install("-e", ".[test]")
    files = ("tests/test_parallel.py", "tests/test_finetune_parallel.py")
    session.run("pytest", "-m", "slow", *(session.posargs or files))


@nox.session
def zero(session: nox.Session) -> None:
    """Training and every call under DeepSpeed's ZeRO, on two processes without GPUs."""
    session.install("-e", ".[test]", "deepspeed")
    session.run("pytest", "-m", "slow", "tests/test_zero.py", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break kernels, orders and autograd one line at a time: a test must notice."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tools.mutants", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, types, and the order of imports."""
    session.install("-e", ".[test]", TORCH)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def package(session: nox.Session) -> None:
    """Build sdist and wheel, try the wheel outside of the checkout, check all licences."""
    session.install("build", "twine", "pip-licenses")
    folder = Path(session.create_tmp()).resolve()
    for old in folder.iterdir():
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(folder))
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    (wheel,) = folder.glob("*.whl")
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(f"{wheel}[checkpoints,cli,peft,demo,bench]", TORCH)
    tables = (path.stem for path in (ROOT / "pera_kernels" / "kernels" / "tiles").iterdir())
    session.chdir(folder)
    session.run("python", "-c", SMOKE, *tables)
    session.run("python", "-m", "pera_kernels", "info")
    allowed = ";".join(PERMISSIVE)
    session.run("pip-licenses", "--partial-match", f"--allow-only={allowed}", silent=True)


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of everything that an installation with all extras brings."""
    session.install("-e", ".[cli,peft,demo,bench]", "pip-audit", TORCH)
    frozen = session.run("pip", "freeze", "--exclude-editable", silent=True)
    listed = Path(session.create_tmp()) / "requirements.txt"
    # Advisories know no local versions, such as those of PyTorch's CPU builds.
    listed.write_text(re.sub(r"(\+\w+| @ .*)$", "", str(frozen), flags=re.MULTILINE))
    # Strict: what could not be looked up is a failure.
    session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", str(listed))


@nox.session
@nox.parametrize("triton", COMPILERS, ids=["3.6.0", "3.7.1", "newest"])
def compile_report(session: nox.Session, triton: str) -> None:
    """What the compiler of one Triton makes of every kernel, architecture, rank, terms and dtype:
    no new spill, tensor cores. Hours on two cores; options of the report narrow it.
    """
    session.install("-e", ".", TORCH, NUMPY, triton)
    options = session.posargs or ("--problems",)
    session.run("python", "-m", "tools.compile_report", *options, env={"TRITON_INTERPRET": "0"})


@nox.session
@nox.parametrize("triton", COMPILERS, ids=["3.6.0", "3.7.1", "newest"])
def binder(session: nox.Session, triton: str) -> None:
    """Every launch through Triton's own binder and launcher, over a stand-in for the driver."""
    session.install("-e", ".", "pytest", TORCH, NUMPY, triton)
    session.run("pytest", "-m", "slow", "tests/test_binder.py", *session.posargs)
