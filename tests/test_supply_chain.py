"""What the wheel holds, which licences are allowed, and what counts as checked."""

import email
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("packaging", reason="the script reads requirements with packaging")

from tools import supply_chain  # noqa: E402
from tools.supply_chain import Declared, Row  # noqa: E402


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("a wheel is built with setuptools, which is not installed")
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools >= 77")
    work = tmp_path_factory.mktemp("wheel")
    supply_chain.copy_project(work / "project")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", str(work), str(work / "project")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [path] = work.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        [place] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(place).decode()
        return archive.namelist(), metadata, supply_chain.shipped(work / "project")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names, _, expected = wheel
    assert supply_chain.wheel_problems(names, expected) == []
    assert "pera_kernels/py.typed" in names
    assert {"pera_kernels/tiles/generic.json", "pera_kernels/kernels/expand.py"} <= set(names)
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"pera_kernels", *(root for root in roots if root.endswith(".dist-info"))}


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda names: names.remove("pera_kernels/py.typed"), "lacks pera_kernels/py.typed"),
        (lambda names: names.append("tests/conftest.py"), "should not hold tests/conftest.py"),
        (lambda names: names.append("benchmarks/a.py"), "should not hold benchmarks/a.py"),
        (lambda names: names.append("pera_kernels/x.pyc"), "should not hold pera_kernels/x.pyc"),
        (lambda names: names.remove("pera_kernels-1.dist-info/LICENSE"), "lacks LICENSE"),
    ],
)
def test_a_bad_wheel_is_told(change, problem):
    expected = ["pera_kernels/__init__.py", "pera_kernels/py.typed"]
    names = [*expected, "pera_kernels-1.dist-info/METADATA", "pera_kernels-1.dist-info/LICENSE"]
    assert supply_chain.wheel_problems(names, expected) == []
    change(names)
    assert supply_chain.wheel_problems(names, expected) == [problem]


def test_a_bad_sdist_is_told():
    inside = [
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "pera_kernels/__init__.py",
        "tests/test_a.py",
    ]
    names = [f"pera_kernels-1/{name}" for name in inside]
    assert supply_chain.sdist_problems(names, ["pera_kernels/__init__.py"]) == []
    problems = supply_chain.sdist_problems([*names[1:], "pera_kernels-1/a/__pycache__/b.pyc"], [])
    assert problems == ["lacks LICENSE", "should not hold a/__pycache__/b.pyc"]


def test_declared_dependencies(wheel):
    found = {d.name: d for d in supply_chain.declared(wheel[1])}
    assert {name for name, d in found.items() if d.core} == {"torch", "numpy", "triton"}
    assert found["torch"].range == ">=2.8"
    assert "checkpoints" in found["safetensors"].extras and not found["safetensors"].core
    assert {"cli", "test"} <= set(found["rich"].extras)


def test_every_declared_licence_is_allowed(wheel):
    rows = supply_chain.check_licences(supply_chain.declared(wheel[1]))
    assert [row for row in rows if row.status == "fail"] == []
    assert {row.name for row in rows if row.status == "pass"} >= {"torch", "numpy"}


@pytest.mark.parametrize(
    "expression",
    [
        "MIT",
        "Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSL-1.0",
        "GPL-3.0-only OR MIT",
        "MIT AND (GPL-3.0-only OR (ISC AND Zlib))",
        "bsd-3-clause OR MIT",
        "Apache Software License",
    ],
)
def test_allowed(expression):
    assert supply_chain.refused(expression, core=True) is None


@pytest.mark.parametrize(
    "expression, reason",
    [
        ("GPL-3.0-only", "GPL-3.0-only is not on the list"),
        ("MIT AND GPL-2.0-only", "GPL-2.0-only is not on the list"),
        ("LGPL-2.1 OR GPL-3.0", "LGPL-2.1, GPL-3.0 is not on the list"),
        ("MIT AND (GPL-2.0 OR AGPL-3.0)", "GPL-2.0, AGPL-3.0 is not on the list"),
        ("GPL-2.0 WITH LLVM-exception", "GPL-2.0 WITH LLVM-exception is not on the list"),
        ("Apache-2.0 WITH Commons-Clause", "Commons-Clause is not on the list"),
        ("MPL-2.0", "MPL-2.0 is not on the list"),
        ("", "its metadata names no licence"),
        ("MIT AND", "is no licence expression"),
        ("(MIT", "is no licence expression"),
        ("MIT OR OR ISC", "is no licence expression"),
        ("Our own licence", "is no licence expression"),
        ("NVIDIA Proprietary Software", "is no licence expression"),
    ],
)
def test_not_allowed(expression, reason):
    assert reason in supply_chain.refused(expression, core=True)


def test_copyleft_of_single_files_only_in_extras():
    assert supply_chain.refused("MPL-2.0 AND MIT", core=False) is None
    assert "MPL-2.0 is not on the list" in supply_chain.refused("MPL-2.0 AND MIT", core=True)
    assert not set(supply_chain.ALLOWED) & set(supply_chain.ALLOWED_IN_EXTRAS)
    assert all({**supply_chain.ALLOWED, **supply_chain.ALLOWED_IN_EXTRAS}.values())


class Package:
    """An installed package, as far as its licence goes."""

    def __init__(self, metadata, files=()):
        self.metadata = email.message_from_string(metadata)
        self.files = dict(files)

    def read_text(self, name):
        return self.files.get(name)


BSD = (
    "Redistribution and use in source and binary\nforms ... Neither the name of the holder nor\n..."
)


@pytest.mark.parametrize(
    "metadata, files, expected",
    [
        ("License-Expression: MIT OR ISC\nLicense: Apache", {}, "MIT OR ISC"),
        ("Classifier: License :: OSI Approved :: Apache Software License\n", {}, "Apache-2.0"),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)\n",
            {},
            "MIT AND GNU General Public License v3 (GPLv3)",
        ),
        ("License: Apache 2.0 License\n", {}, "Apache-2.0"),
        ("License-File: LICENSE\n", {"licenses/LICENSE": BSD}, "BSD-3-Clause"),
        ("License-File: LICENSE\n", {"licenses/LICENSE": "All rights reserved"}, ""),
        ("Name: x\n", {}, ""),
    ],
)
def test_licence_of_a_package(metadata, files, expected):
    assert supply_chain.licence(Package(metadata, files)) == expected


def test_a_dependency_that_is_not_installed_is_not_checked():
    [row] = supply_chain.check_licences([Declared("no-such-package-here", ">=1", ("demo",))])
    assert (row.status, row.detail) == ("not checked", "not installed (demo)")


ANSWER = {
    "dependencies": [
        {"name": "torch", "version": "2.8.0", "vulns": [{"id": "X-1"}, {"id": "X-2"}]},
        {"name": "NumPy", "version": "2.0.0", "vulns": []},
        {"name": "triton", "skip_reason": "not found"},
    ]
}


def test_what_pip_audit_skipped_has_no_answer():
    assert supply_chain.read_audit(json.dumps(ANSWER)) == {
        "torch": ("fail", "2.8.0: X-1, X-2"),
        "numpy": ("pass", "2.0.0: no known vulnerability"),
    }
    with pytest.raises(supply_chain.Unavailable):
        supply_chain.read_audit("Traceback: no network")


def test_advisories_without_a_service_are_not_checked(tmp_path, monkeypatch):
    def audit(python, asked, service):
        assert asked.read_text().startswith("torch==") and "+" not in asked.read_text()
        if service == "osv":
            raise supply_chain.Unavailable("no answer")
        return {}

    monkeypatch.setattr(supply_chain, "pip_install", lambda *words: None)
    monkeypatch.setattr(supply_chain, "audit", audit)
    core = [Declared("torch", ">=2.8", ("",)), Declared("no-such-package-here", "", ("demo",))]
    torch, other = supply_chain.check_advisories(core, tmp_path / "python", tmp_path)
    assert torch.status == other.status == "not checked" and other.detail == "not installed"
    assert torch.detail.endswith(": pypi does not know it, osv does not answer")


@pytest.mark.parametrize(
    "status, strict, code",
    [("pass", True, 0), ("fail", False, 1), ("not checked", False, 0), ("not checked", True, 1)],
)
def test_exit_status_and_rows(status, strict, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        supply_chain, "check_all", lambda work: [Row("licence", "torch", status, "why")]
    )
    out = tmp_path / "rows.jsonl"
    arguments = ["--out", str(out), *(["--strict"] if strict else [])]
    assert supply_chain.main(arguments) == supply_chain.main(arguments) == code
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["name"], row["status"], row["detail"]) == ("torch", status, "why") and row["date"]
    assert status in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [(["--out", "."], "--out must be a file"), (["x"], "unrecognized arguments")],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        supply_chain.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
