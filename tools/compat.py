"""The declared ranges, tried: each combination of versions in an environment of its own.

Builds of PyTorch for CUDA need no GPU here, nor gigabytes of CUDA packages: their libraries are
replaced by stand-ins whose functions all fail, and what runs is PyTorch's CPU code. Where pip finds
a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) it takes that. The rows "import-..." try this
interpreter with something missing or broken.

    python -m tools.compat --list                what there is
    python -m tools.compat                       all of it: an hour, some GB of downloads
    python -m tools.compat --only floor,newest   these
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.results import commit

from .environments import (
    Unavailable,
    cuda_runtime,
    find_python,
    new_environment,
    one_line,
    pip_install,
    run,
    stand_in_libraries,
)
from .rows import table, write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "compat.jsonl"

PASS, FAIL, NOT_INSTALLABLE = "pass", "fail", "not installable"

# A few quick files for each concern; the interpreter under inductor is the slowest of them.
SUITE = (
    *(f"tests/test_{name}.py" for name in ("terms", "reference", "bad_input", "module")),
    *(f"tests/test_{name}.py" for name in ("autograd", "dropout", "checkpoint", "compile")),
    *("-k", "not (inductor and triton)"),
)
REPORT = (
    *("--terms", "full", "--ranks", "16", "--dtypes", "bf16", "--jobs", "1"),
    *("--kernels", "expand", "project A dropout", "accumulate", "contract dB dh", "compose"),
)
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Combination:
    """What to install, and what to try with it."""

    name: str
    python: str
    torch: str = "newest"
    triton: str = "newest"
    numpy: str = "newest"
    checks: tuple[str, ...] = ("suite",)
    others: tuple[str, ...] = ("pytest", "safetensors")
    archs: tuple[str, ...] = ARCHS
    note: str = ""


BOTH = ("suite", "compile")
COMBINATIONS = (
    Combination(
        "floor",
        "3.10",
        "2.8.0",
        "3.4.0",
        "1.26.0",
        BOTH,
        ("pytest==8.0.0", "safetensors==0.4.5"),
        ARCHS[:-1],
        "not compiled for gfx942: this Triton has no AMD linker in its wheel",
    ),
    Combination("torch-2.11", "3.11", "2.11.0", "3.6.0", "2.3.5"),
    Combination("triton-3.5", "3.11", "2.13.0", "3.5.1", "2.3.5", BOTH),
    Combination("triton-3.6", "3.11", "2.13.0", "3.6.0", "2.3.5", BOTH),
    Combination(
        "triton-3.6-numpy-2.4",
        "3.11",
        "2.13.0",
        "3.6.0",
        "2.4.6",
        ("compile",),
        note="compiled only: the interpreter of Triton 3.6.0 breaks with NumPy >= 2.4",
    ),
    Combination("triton-3.7", "3.11", "2.13.0", "3.7.1", "2.4.6", BOTH),
    Combination("numpy-1.26", "3.11", "2.13.0", "3.7.1", "1.26.4"),
    Combination("numpy-2.0", "3.11", "2.13.0", "3.7.1", "2.0.2"),
    Combination("python-3.10", "3.10"),
    Combination("newest", "3.11", checks=(*BOTH, "imports")),
    Combination("python-3.12", "3.12"),
    Combination("python-3.13", "3.13"),
    Combination("no-triton", "3.11", "2.13.0", "none", checks=("imports",)),
)


@dataclass(frozen=True)
class Scenario:
    """An import with something missing or broken."""

    name: str
    hidden: tuple[str, ...] = ()
    devices: str | None = None
    driver: str = ""


SCENARIOS = (
    Scenario("no-triton", hidden=("triton",)),
    Scenario("no-gpu", devices=""),
    Scenario("junk-devices", devices="no-such-device,-7"),
    Scenario("broken-driver", driver="fails"),
    Scenario("junk-driver", driver="junk"),
    Scenario(
        "no-extras",
        hidden=("safetensors", "peft", "transformers", "rich", "tqdm", "matplotlib"),
    ),
)
NO_TRITON = "the triton package is not installed"
NO_GPU = "need Triton's interpreter"

# Arguments: what backend="triton" must say, packages to hide, "1" if there must be no GPU.
IMPORT_CHECK = """
import importlib.machinery, sys
words, hidden, gpuless = sys.argv[1], set(sys.argv[2].split(",")), sys.argv[3] == "1"
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None:
        None if name.partition(".")[0] in hidden else find(name, path, target)
)
import torch
import pera_kernels as pk
from pera_kernels.backends import resolve
loaded = hidden & set(sys.modules)
assert not loaded, f"imported although hidden: {loaded}"
assert not (gpuless and torch.cuda.is_available()), "there is a GPU all the same"
assert resolve("auto", torch.device("cpu"), (torch.float32,)) == "torch"
layer = pk.PeraLinear(8, 6, r=2)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.normal_()
A, B, h = layer.pera_A, layer.pera_B, layer.pera_h
x = torch.randn(5, 8)
results = []
for y in (
    layer(x),
    pk.reference.pera_linear(x, layer.weight, A, B, h, layer.bias, scale=layer.scale),
):
    results.append([y, *torch.autograd.grad(y.square().sum(), (A, B, h))])
for got, expected in zip(*results):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
try:
    pk.PeraLinear(8, 6, r=2, backend="triton")
except ValueError as error:
    assert words in str(error), f"the reason given is: {error}"
else:
    raise AssertionError("backend='triton' was accepted")
"""


@dataclass(frozen=True)
class Row:
    """One line of the matrix; versions are those that were installed."""

    name: str
    python: str
    torch: str
    triton: str
    numpy: str
    checks: str
    status: str = PASS
    reason: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one check counted, and what went wrong."""

    passed: int
    failed: int = 0
    skipped: int = 0
    problem: str = ""


def make_environment(combination: Combination, folder: Path) -> tuple[Path, bool]:
    """The environment's interpreter, and whether libraries of PyTorch are stand-ins."""
    python = folder / "bin" / "python"
    marker = folder / ".ready"
    if marker.exists():
        return python, marker.read_text() == "stand-ins"
    new_environment(folder, find_python(combination.python))
    stand_ins = install(python, combination)
    marker.write_text("stand-ins" if stand_ins else "")
    return python, stand_ins


def install(python: Path, combination: Combination) -> bool:
    """Everything a row needs; PyTorch without its GPU packages, which are several GB."""

    def exact(name: str, version: str) -> str:
        return name if version == "newest" else f"{name}=={version}"

    pip_install(python, "--no-deps", exact("torch", combination.torch))
    ask = "import importlib.metadata as m; print(*m.requires('torch') or (), sep='\\n')"
    required = run([python, "-c", ask], "import").stdout.splitlines()
    required = [line for line in required if "extra ==" not in line]
    gpu = re.compile(r"(nvidia|cuda|triton|pytorch.triton|intel)[\w-]*", re.IGNORECASE)
    light = [line for line in required if not gpu.match(line)]
    triton = [] if combination.triton == "none" else [exact("triton", combination.triton)]
    numpy = exact("numpy", combination.numpy)
    pip_install(python, numpy, *triton, *combination.others, *light)
    done = run([python, "-c", "import torch"], "import")
    if done.returncode == 0:
        return False
    if not any(line.startswith(("nvidia", "cuda")) for line in required):
        raise Unavailable(f"import torch: {one_line(done.stderr)}")
    pip_install(python, *cuda_runtime(required))
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    stand_in_libraries(Path(run([python, "-c", where], "import").stdout.strip()))
    done = run([python, "-c", "import torch"], "import")
    if done.returncode:
        raise Unavailable(f"import torch with stand-ins: {one_line(done.stderr)}")
    return True


def check_suite(python: Path, combination: Combination, source: Path, work: Path) -> Outcome:
    report = work / "junit.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    caches = {"TRITON_CACHE_DIR": f"{work}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor"}
    done = run([python, "-m", "pytest", *options, *SUITE], "suite", source, **caches)
    if not report.exists():
        return Outcome(0, 1, problem=f"pytest: {one_line(done.stderr + done.stdout)}")
    return read_report(report, done.returncode)


def read_report(report: Path, code: int) -> Outcome:
    """Counts of a JUnit file, and the functions that failed."""
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = Counter(case.get("name", "").partition("[")[0] for case in bad)
    problem = ", ".join(f"{name} ({count})" for name, count in names.items())
    if code and not bad:
        problem = f"pytest ended with {code}"
    return Outcome(len(cases) - len(bad) - skipped, len(bad), skipped, problem)


def check_compile(python: Path, combination: Combination, source: Path, work: Path) -> Outcome:
    command = [python, "-m", "tools.compile_report", *REPORT, "--archs", *combination.archs]
    done = run(command, "compile", source, TRITON_CACHE_DIR=f"{work}/triton")
    found = re.search(r"^(\d+) compilations, (\d+) with a problem", done.stdout, re.MULTILINE)
    if found is None:
        return Outcome(0, 1, problem=f"compile_report: {one_line(done.stderr)}")
    total, bad = int(found[1]), int(found[2])
    return Outcome(total - bad, bad, problem=f"{bad} compilations with a problem" if bad else "")


def check_imports(python: Path, combination: Combination, source: Path, work: Path) -> Outcome:
    problems, skipped = [], 0
    for scenario in SCENARIOS:
        try:
            problem = try_import(scenario, python, work, source, combination.triton != "none")
        except Unavailable:
            skipped += 1
            continue
        if problem:
            problems.append(f"{scenario.name}: {problem}")
    passed = len(SCENARIOS) - len(problems) - skipped
    return Outcome(passed, len(problems), skipped, "; ".join(problems))


CHECKS = {"suite": check_suite, "compile": check_compile, "imports": check_imports}


def try_import(
    scenario: Scenario, python: str | Path, work: Path, source: Path = ROOT, triton: bool = True
) -> str:
    """What is wrong with the package in this scenario; "" if nothing is.

    It must import, compute as the reference does with ``backend="auto"``, and refuse
    ``backend="triton"`` with the reason.
    """
    words = NO_GPU if triton and "triton" not in scenario.hidden else NO_TRITON
    environment = {"PYTHONPATH": str(source)}
    if scenario.devices is not None:
        environment.update(
            CUDA_VISIBLE_DEVICES=scenario.devices, HIP_VISIBLE_DEVICES=scenario.devices
        )
    if scenario.driver:
        folder = fake_driver(work / scenario.name, scenario.driver)
        before = os.environ.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)
    gpuless = scenario.devices is not None or scenario.driver
    arguments = (words, ",".join(scenario.hidden), "1" if gpuless else "")
    done = run([python, "-c", IMPORT_CHECK, *arguments], "import", work, **environment)
    return one_line(done.stderr) if done.returncode else ""


def fake_driver(folder: Path, kind: str) -> Path:
    """A folder with a libcuda.so.1 that fails to start, or that is no library at all."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if kind == "junk":
        library.write_bytes(b"not a library\n" * 64)
        return folder
    if not sys.platform.startswith("linux") or (compiler := shutil.which("cc")) is None:
        raise Unavailable("a driver that fails needs Linux and a C compiler")
    source = folder / "driver.c"
    source.write_text(
        "int cuInit(unsigned flags) { return 999; }\n"
        "int cuDriverGetVersion(int *version) { *version = 99000; return 0; }\n"
    )
    done = run([compiler, "-shared", "-fPIC", "-o", library, source], "import")
    if done.returncode:
        raise Unavailable(f"cc: {one_line(done.stderr)}")
    return folder


def installed(python: str | Path, row: Row) -> Row:
    """The row with the versions that this interpreter has."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "found = {'python': platform.python_version()}\n"
        "for name in ('torch', 'triton', 'numpy'):\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: found[name] = 'none'\n"
        "import torch; found['torch'] = torch.__version__\n"
        "print(json.dumps(found))\n"
    )
    done = run([python, "-c", code], "import")
    if done.returncode:
        raise Unavailable(f"import torch: {one_line(done.stderr)}")
    return replace(row, **json.loads(done.stdout))


def run_combination(combination: Combination, source: Path, folder: Path, work: Path) -> Row:
    """Install a combination into ``folder`` and run its checks over the code in ``source``."""
    c = combination
    row = Row(c.name, c.python, c.torch, c.triton, c.numpy, "+".join(c.checks))
    try:
        python, stand_ins = make_environment(combination, folder)
        row = installed(python, row)
    except Unavailable as problem:
        return replace(row, status=NOT_INSTALLABLE, reason=str(problem))
    outcomes = [CHECKS[check](python, combination, source, work) for check in combination.checks]
    notes = ["CUDA libraries are stand-ins"] if stand_ins else []
    notes += [combination.note] if combination.note else []
    return judged(row, outcomes, notes)


def run_import(scenario: Scenario, work: Path) -> Row:
    """A scenario with this interpreter."""
    row = Row(f"import-{scenario.name}", platform.python_version(), "", "", "", "imports")
    try:
        row = installed(sys.executable, row)
        problem = try_import(scenario, sys.executable, work, triton=row.triton != "none")
    except Unavailable as missing:
        return replace(row, status=NOT_INSTALLABLE, reason=str(missing))
    outcome = Outcome(0, 1, problem=problem) if problem else Outcome(1)
    return judged(row, [outcome], [])


def judged(row: Row, outcomes: Sequence[Outcome], notes: Sequence[str]) -> Row:
    failed = sum(outcome.failed for outcome in outcomes)
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    return replace(
        row,
        status=FAIL if failed or problems else PASS,
        reason="; ".join([*problems, *notes]),
        passed=sum(outcome.passed for outcome in outcomes),
        failed=failed,
        skipped=sum(outcome.skipped for outcome in outcomes),
    )


def copy_source(target: Path) -> None:
    """What the checks run on: every row sees the same code, whatever is edited meanwhile."""
    leave = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in ("pera_kernels", "tests", "tools", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=leave)
    shutil.copy2(ROOT / "pyproject.toml", target)


def names() -> list[str]:
    return [c.name for c in COMBINATIONS] + [f"import-{s.name}" for s in SCENARIOS]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", metavar="NAME,...", help="these rows")
    add(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="JSON lines (tests/results/compat.jsonl)",
    )
    add("--keep", type=Path, metavar="DIR", help="keep the environments, and use those kept before")
    add("--list", action="store_true", help="name the rows and stop")
    given = parser.parse_args(argv)
    given.only = names() if given.only is None else [n for n in given.only.split(",") if n]
    unknown = [name for name in given.only if name not in names()]
    if unknown or not given.only:
        parser.error(
            f"--only: no row {', '.join(unknown) or 'named'}; there are {', '.join(names())}"
        )
    if given.out.is_dir() or (given.keep and given.keep.exists() and not given.keep.is_dir()):
        parser.error("--out must be a file and --keep a folder")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = _arguments(argv)
    if given.list:
        rows = [{**asdict(c), "checks": "+".join(c.checks)} for c in COMBINATIONS]
        print(table(rows, ("name", "python", "torch", "triton", "numpy", "checks")))
        print("\n".join(names()[len(rows) :]))
        return 0
    version, today = (commit() or ""), datetime.date.today().isoformat()
    done: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        copy_source(source)
        for name in given.only:
            started = time.monotonic()
            work = Path(temporary) / name
            work.mkdir()
            scenario = next((s for s in SCENARIOS if f"import-{s.name}" == name), None)
            if scenario is not None:
                row = run_import(scenario, work)
            else:
                combination = next(c for c in COMBINATIONS if c.name == name)
                kept = (given.keep / name).absolute() if given.keep else None
                row = run_combination(combination, source, kept or work / "environment", work)
            shutil.rmtree(work)
            seconds = round(time.monotonic() - started, 1)
            row = replace(row, seconds=seconds, commit=version, date=today)
            done.append(row)
            write(given.out, [asdict(row)])
            print(f"{row.name}: {row.status} {row.reason}", file=sys.stderr, flush=True)
    columns = ("name", "python", "torch", "triton", "numpy", "checks", "status")
    counts = ("passed", "failed", "skipped", "seconds", "reason")
    print(table([asdict(row) for row in done], columns + counts))
    return 1 if any(row.status == FAIL for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
