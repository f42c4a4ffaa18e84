"""What is shipped, and what it stands on.

Builds the sdist, and the wheel from it; looks into both; installs each in an environment of its own
and uses it from another folder. For every dependency that the wheel declares, core and extras: its
licence against a list of permissive ones, and pip-audit. What could not be checked is a row that
says so; with --strict it fails.

    python -m tools.supply_chain [--out FILE] [--strict]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from email import message_from_string
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.results import commit

from .compat import FAIL, PASS, ROOT
from .environments import Unavailable, new_environment, one_line, pip_install, run
from .rows import table, write

RESULTS = ROOT / "tests" / "results" / "supply_chain.jsonl"
NOT_CHECKED = "not checked"

# Licences that a dependency may have, and why.
ALLOWED = {
    "0BSD": "permissive, asks for nothing",
    "Apache-2.0": "permissive, this project's own",
    "Apache-2.0 WITH LLVM-exception": "Apache-2.0 that asks for less",
    "BSD-2-Clause": "permissive, notice only",
    "BSD-3-Clause": "permissive, notice only",
    "BSL-1.0": "permissive, no notice with binaries",
    "CC0-1.0": "public domain",
    "ISC": "permissive, notice only",
    "MIT": "permissive, notice only",
    "PSF-2.0": "permissive, Python's own",
    "Zlib": "permissive, no notice with binaries",
}
# Only in extras: copyleft of single files, which are installed beside the package, unchanged.
ALLOWED_IN_EXTRAS = {"MPL-2.0": "file by file; neither changed nor shipped by this project"}

# What metadata says that is no SPDX identifier.
SPELLINGS = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}

# Sentences by which a licence's text is known, where the metadata only names the file.
TEXTS = {
    "Apache-2.0": ("Apache License", "Version 2.0, January 2004"),
    "MIT": ("Permission is hereby granted, free of charge", "without restriction"),
    "BSD-3-Clause": ("Redistribution and use in source and binary forms", "Neither the name of"),
}

SMOKE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch
import pera_kernels as pk
from pera_kernels import configs
source, version = Path(sys.argv[1]), sys.argv[2]
home = Path(pk.__file__).parent
assert home.is_relative_to(sys.prefix), f"imported from outside the environment: {home}"
assert pk.__version__ == version, pk.__version__
layer = pk.PeraLinear(24, 12, r=3)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.normal_()
x = torch.randn(5, 24, requires_grad=True)
inputs = (x, layer.pera_A, layer.pera_B, layer.pera_h)
reference = pk.reference.pera_linear(
    x, layer.weight, *inputs[1:], layer.bias, scale=layer.scale
)
outputs = [[y, *torch.autograd.grad(y.square().sum(), inputs)] for y in (layer(x), reference)]
for got, expected in zip(*outputs):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
tables = {path.name for path in configs.TABLES.iterdir()}
assert tables == {path.name for path in source.iterdir()} and tables, tables
assert all(configs.load_table(name.removesuffix(".json")) for name in tables)
assert (home / "py.typed").exists()
command = [sys.executable, "-m", "pera_kernels", "info", "--json"]
told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
assert told["pera_kernels"] == version and told["backends"]["torch"] is None, told
"""


@dataclass(frozen=True)
class Row:
    """One thing that was checked."""

    check: str
    name: str
    status: str
    detail: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> str:
        return f"{self.check} {self.name}"


@dataclass(frozen=True)
class Declared:
    """A dependency, its range, and the extras that ask for it; "" is the core."""

    name: str
    range: str
    extras: tuple[str, ...]

    @property
    def core(self) -> bool:
        return "" in self.extras


def declared(metadata: str) -> list[Declared]:
    """The dependencies in a wheel's METADATA, by name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in message_from_string(metadata).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        extra = re.search(r"extra == [\"']([^\"']+)", line)
        name = canonicalize_name(requirement.name)
        found.setdefault(name, (str(requirement.specifier), []))[1].append(
            extra[1] if extra else ""
        )
    return [Declared(name, span, tuple(extras)) for name, (span, extras) in sorted(found.items())]


def licence(package: importlib.metadata.Distribution) -> str:
    """What an installed package says of its licence: expression, classifiers, free text, or the
    text of its licence file.
    """
    stated = package.metadata.get_all
    for expression in stated("License-Expression") or []:
        return expression
    osi = "License :: OSI Approved :: "
    names = [n.removeprefix(osi) for n in stated("Classifier") or [] if n.startswith(osi)]
    if names:
        return " AND ".join(SPELLINGS.get(name.lower(), name) for name in names)
    lines = "\n".join(stated("License") or []).strip().splitlines()
    if lines:
        return SPELLINGS.get(lines[0].strip().lower(), lines[0].strip())
    for name in stated("License-File") or []:
        text = package.read_text(f"licenses/{name}") or package.read_text(name) or ""
        text = " ".join(text.split())
        known = [key for key, parts in TEXTS.items() if all(part in text for part in parts)]
        if len(known) == 1:
            return known[0]
    return ""


def refused(expression: str, core: bool) -> str | None:
    """Why a dependency of this licence may not be one; None if it may.

    Of alternatives (OR) one must be allowed, of parts (AND) each.
    """
    if not expression:
        return "its metadata names no licence"
    allowed = ALLOWED if core else {**ALLOWED, **ALLOWED_IN_EXTRAS}
    spelled = SPELLINGS.get(expression.lower(), expression)
    words = re.findall(r"[()]|[^\s()]+", spelled)
    try:
        rest, bad = _either(words, allowed)
    except (IndexError, ValueError):
        return f"{expression!r} is no licence expression"
    if rest:
        return f"{expression!r} is no licence expression"
    return f"{', '.join(dict.fromkeys(bad))} is not on the list" if bad else None


Parsed = tuple[list[str], list[str]]


def _either(words: list[str], allowed: Iterable[str]) -> Parsed:
    """The words that are left, and the identifiers that are not allowed."""
    rest, bad = _each(words, allowed)
    while rest and rest[0].upper() == "OR":
        rest, other = _each(rest[1:], allowed)
        bad = bad and other and bad + other
    return rest, bad


def _each(words: list[str], allowed: Iterable[str]) -> Parsed:
    rest, bad = _one(words, allowed)
    while rest and rest[0].upper() == "AND":
        rest, other = _one(rest[1:], allowed)
        bad = bad + other
    return rest, bad


def _one(words: list[str], allowed: Iterable[str]) -> Parsed:
    if words[0] == "(":
        rest, bad = _either(words[1:], allowed)
        if rest[0] != ")":
            raise ValueError("unbalanced")
        return rest[1:], bad
    if words[0] == ")" or words[0].upper() in ("AND", "OR", "WITH"):
        raise ValueError("an operator without its operands")
    name, rest = words[0], words[1:]
    if rest and rest[0].upper() == "WITH":
        name, rest = f"{name} WITH {rest[1]}", rest[2:]
    return rest, [] if name in allowed else [name]


def check_licences(dependencies: Sequence[Declared]) -> list[Row]:
    rows = []
    for dependency in dependencies:
        where = "core" if dependency.core else ", ".join(dependency.extras)
        try:
            package = importlib.metadata.distribution(dependency.name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row("licence", dependency.name, NOT_CHECKED, f"not installed ({where})"))
            continue
        expression = licence(package)
        problem = refused(expression, dependency.core)
        detail = f"{package.version}: {problem or expression} ({where})"
        rows.append(Row("licence", dependency.name, FAIL if problem else PASS, detail))
    return rows


def check_advisories(dependencies: Sequence[Declared], python: Path, work: Path) -> list[Row]:
    """pip-audit over the installed versions. What no service answered for was not checked."""
    versions = {}
    for dependency in dependencies:
        try:
            # A local version, such as that of a CPU build, is unknown to the advisories.
            found = importlib.metadata.version(dependency.name)
            versions[dependency.name] = found.partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    asked = work / "requirements.txt"
    asked.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    answers: dict[str, tuple[str, str]] = {}
    silent: list[str] = []
    try:
        pip_install(python, "pip-audit")
        for service in ("pypi", "osv"):
            try:
                answers = {**audit(python, asked, service), **answers}
                silent.append(f"{service} does not know it")
            except Unavailable:
                silent.append(f"{service} does not answer")
            if versions.keys() <= answers.keys():
                break
    except Unavailable as missing:
        silent.append(str(missing))
    rows = []
    for dependency in dependencies:
        name = dependency.name
        reason = f"{versions[name]}: {', '.join(silent)}" if name in versions else "not installed"
        rows.append(Row("advisories", name, *answers.get(name, (NOT_CHECKED, reason))))
    return rows


def audit(python: Path, asked: Path, service: str) -> dict[str, tuple[str, str]]:
    """Status and detail by package, of those that the service answered for."""
    options = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
    done = run([python, "-m", "pip_audit", "-r", asked, "-s", service, *options], "suite")
    return read_audit(done.stdout)


def read_audit(text: str) -> dict[str, tuple[str, str]]:
    """pip-audit's JSON; packages that it skipped are left out.

    Raises:
        Unavailable: there is no answer.
    """
    try:
        packages = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        raise Unavailable("no answer") from None
    found: dict[str, tuple[str, str]] = {}
    for package in packages:
        if "skip_reason" in package:
            continue
        advisories = [advisory["id"] for advisory in package["vulns"]]
        status = FAIL if advisories else PASS
        told = ", ".join(advisories) or "no known vulnerability"
        found[canonicalize_name(package["name"])] = (status, f"{package['version']}: {told}")
    return found


def shipped(root: Path) -> list[str]:
    """The files of the package, all of which a wheel must hold."""
    files = (path for path in (root / "pera_kernels").rglob("*") if path.is_file())
    return sorted(f.relative_to(root).as_posix() for f in files if "__pycache__" not in f.parts)


def wheel_problems(names: Sequence[str], expected: Sequence[str]) -> list[str]:
    """What a wheel lacks, and what does not belong in it."""
    lacking = sorted(set(expected) - set(names))
    info = [name for name in names if re.match(r"pera_kernels-[^/]+\.dist-info/", name)]
    other = sorted(set(names) - set(expected) - set(info))
    if not any(name.endswith("/LICENSE") for name in info):
        lacking.append("LICENSE")
    return [f"lacks {name}" for name in lacking] + [f"should not hold {name}" for name in other]


def sdist_problems(names: Sequence[str], expected: Sequence[str]) -> list[str]:
    inner = {name.partition("/")[2] for name in names}
    wanted = [*expected, "LICENSE", "README.md", "pyproject.toml"]
    lacking = [f"lacks {name}" for name in wanted if name not in inner]
    junk = re.compile(r"(^|/)(__pycache__|\.git|\.venv|build|dist)(/|$)|\.(pyc|so|jsonl)$")
    return lacking + [f"should not hold {name}" for name in sorted(inner) if junk.search(name)]


def copy_project(target: Path) -> None:
    """The project without what a build or a test left behind."""
    leave = shutil.ignore_patterns(
        "__pycache__", ".*", "*.egg-info", "build", "dist", "results", "*_out"
    )
    shutil.copytree(ROOT, target, ignore=leave)


def build(python: Path, work: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pip_install(python, "build")
    copy_project(work / "project")
    command = [python, "-m", "build", "--outdir", work / "built", work / "project"]
    done = run(command, "suite", work)
    if done.returncode:
        raise RuntimeError(one_line(done.stderr + done.stdout))
    [sdist], [wheel] = (work / "built").glob("*.tar.gz"), (work / "built").glob("*.whl")
    return sdist, wheel


def smoke(archive: Path, work: Path, version: str) -> Row:
    """Install without dependencies, which this interpreter's packages stand in for, and use it."""
    name = "wheel" if archive.suffix == ".whl" else "sdist"
    try:
        python = new_environment(work / f"environment-{name}")
        pip_install(python, "--no-deps", str(archive))
    except Unavailable as missing:
        return Row("installed", name, FAIL, str(missing))
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", where], "import").stdout.strip())
    own = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(own) + "\n")
    elsewhere = work / f"elsewhere-{name}"
    elsewhere.mkdir()
    tables = work / "project" / "pera_kernels" / "tiles"
    done = run([python, "-c", SMOKE, tables, version], "import", elsewhere)
    if done.returncode:
        return Row("installed", name, FAIL, one_line(done.stderr))
    return Row("installed", name, PASS, "import, gradients, tile tables, command line")


def check_archives(python: Path, work: Path) -> tuple[list[Row], str]:
    """Rows of the two archives, and the wheel's METADATA."""
    sdist, wheel = build(python, work)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [place] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(place).decode()
    with tarfile.open(sdist) as packed:
        members = [member.name for member in packed.getmembers() if member.isfile()]
    expected = shipped(work / "project")
    rows = []
    for kind, found, size in (
        ("wheel", wheel_problems(names, expected), len(names)),
        ("sdist", sdist_problems(members, expected), len(members)),
    ):
        rows.append(
            Row("contents", kind, FAIL if found else PASS, "; ".join(found) or f"{size} files")
        )
    version = message_from_string(metadata)["Version"]
    rows += [smoke(archive, work, version) for archive in (wheel, sdist)]
    return rows, metadata


def check_all(work: Path) -> list[Row]:
    try:
        python = new_environment(work / "tools")
        rows, metadata = check_archives(python, work)
    except Unavailable as missing:
        return [Row("contents", "wheel and sdist", NOT_CHECKED, str(missing))]
    except RuntimeError as problem:
        return [Row("contents", "wheel and sdist", FAIL, f"build: {problem}")]
    dependencies = declared(metadata)
    return [
        *rows,
        *check_licences(dependencies),
        *check_advisories(dependencies, python, work),
    ]


def failed(rows: Iterable[Row], strict: bool) -> bool:
    bad = {FAIL, NOT_CHECKED} if strict else {FAIL}
    return any(row.status in bad for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.supply_chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out_help = "JSON lines (tests/results/supply_chain.jsonl)"
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help=out_help)
    parser.add_argument("--strict", action="store_true", help="what was not checked is a failure")
    given = parser.parse_args(argv)
    if given.out.is_dir():
        parser.error(f"--out must be a file; {given.out} is a folder")
    version, today = (commit() or ""), datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as work:
        rows = [replace(row, commit=version, date=today) for row in check_all(Path(work))]
    write(given.out, [{"key": row.key, **asdict(row)} for row in rows], "key")
    print(table([asdict(row) for row in rows], ("check", "name", "status", "detail")))
    return 1 if failed(rows, given.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
