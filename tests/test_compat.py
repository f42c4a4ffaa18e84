"""The package with something missing or broken, and the script that tries the declared versions."""

import json
import shutil
import sys

import pytest

from tools import compat, environments
from tools.rows import write

COMPILER = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="a driver that fails needs Linux and a C compiler",
)


def scenario(name):
    return next(s for s in compat.SCENARIOS if s.name == name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(s.name, marks=COMPILER if s.driver == "fails" else ()) for s in compat.SCENARIOS],
)
def test_imports_computes_and_refuses_triton_with_the_reason(name, tmp_path):
    row = compat.Row("here", "", "", "", "", "imports")
    triton = compat.installed(sys.executable, row).triton != "none"
    assert compat.try_import(scenario(name), sys.executable, tmp_path, triton=triton) == ""


def test_a_wrong_reason_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "NO_GPU", "no such words")
    problem = compat.try_import(scenario("no-gpu"), sys.executable, tmp_path)
    assert problem.startswith("AssertionError: the reason given is: backend='triton' cannot run")


def test_an_import_of_something_hidden_is_reported(tmp_path):
    hidden = compat.Scenario("no-numbers", hidden=("fractions",), devices="")
    assert "No module named 'fractions'" in compat.try_import(hidden, sys.executable, tmp_path)


def test_every_row_has_its_name_and_known_checks():
    assert len(set(compat.names())) == len(compat.names())
    for row in compat.COMBINATIONS:
        assert row.checks and set(row.checks) <= set(compat.CHECKS), row.name
        for name in (path for path in compat.SUITE if path.endswith(".py")):
            assert (compat.ROOT / name).exists(), name


def test_the_declared_floor_is_a_row():
    declared = (compat.ROOT / "pyproject.toml").read_text()
    floor = next(row for row in compat.COMBINATIONS if row.name == "floor")
    for package in ("torch", "triton", "numpy"):
        assert f'"{package}>={getattr(floor, package).removesuffix(".0")}' in declared, package
    assert f'requires-python = ">={floor.python}"' in declared


def test_list(capsys):
    assert compat.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in compat.names()) and "2.8.0" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "floor,nothing"], "--only: no row nothing; there are floor,"),
        (["--only", ","], "--only: no row named"),
        (["--out", "."], "--out must be a file"),
        (["--keep", __file__], "--keep a folder"),
        (["floor"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        compat.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_python_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(environments.Unavailable, match="^Python 3.99 is not installed here$"):
        environments.find_python("3.99")
    row = compat.Combination("future", "3.99")
    got = compat.run_combination(row, tmp_path, tmp_path / "environment", tmp_path)
    assert (got.status, got.torch, got.failed) == ("not installable", "newest", 0)
    assert got.reason == "Python 3.99 is not installed here"


def test_this_python_is_found():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert str(environments.find_python(version)) == sys.executable


@pytest.mark.parametrize("status, code", [("pass", 0), ("not installable", 0), ("fail", 1)])
def test_rows_and_exit_status(status, code, tmp_path, monkeypatch, capsys):
    def run_import(scenario, work):
        assert work.is_dir()
        return compat.Row(f"import-{scenario.name}", "3", "2", "1", "0", "imports", status, "so")

    monkeypatch.setattr(compat, "run_import", run_import)
    monkeypatch.setattr(compat, "copy_source", lambda target: None)
    out = tmp_path / "new" / "rows.jsonl"
    for _ in range(2):
        assert compat.main(["--only", "import-no-gpu,import-no-triton", "--out", str(out)]) == code
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["import-no-gpu", "import-no-triton"]
    assert {row["status"] for row in rows} == {status} and all(row["date"] for row in rows)
    assert "import-no-triton" in capsys.readouterr().out


def test_other_rows_of_a_file_stay(tmp_path):
    out = tmp_path / "rows.jsonl"
    write(out, [{"name": "a", "status": "pass"}, {"name": "b", "status": "pass"}])
    write(out, [{"name": "a", "status": "fail"}])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"name": "a", "status": "fail"}, {"name": "b", "status": "pass"}]


def test_report_of_pytest(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_a[1]"><failure/></testcase><testcase name="test_a[2]"><error/>'
        '</testcase><testcase name="test_b"/><testcase name="test_c"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert compat.read_report(report, 1) == compat.Outcome(1, 2, 1, "test_a (2)")
    report.write_text('<testsuite><testcase name="test_b"/></testsuite>')
    assert compat.read_report(report, 0) == compat.Outcome(1)
    assert compat.read_report(report, 3).problem == "pytest ended with 3"


def test_a_problem_without_a_failed_test_fails_the_row():
    row = compat.Row("floor", "", "", "", "", "suite")
    bad = compat.judged(row, [compat.Outcome(5), compat.Outcome(1, problem="ended with 3")], ["n"])
    assert (bad.status, bad.reason, bad.passed) == ("fail", "ended with 3; n", 6)
    good = compat.judged(row, [compat.Outcome(5, 0, 2)], [])
    assert (good.status, good.reason, good.skipped) == ("pass", "", 2)


def test_one_line_tells_the_error_without_addresses():
    text = (
        "noise\nERROR: Could not fetch https://index.example/simple/torch: gone\n[notice] new pip"
    )
    assert environments.one_line(text) == "Could not fetch torch: gone"
    assert environments.one_line("a\nModuleNotFoundError: No module named 'x'\n  hint") == (
        "ModuleNotFoundError: No module named 'x'"
    )
    assert (
        environments.one_line("File '/home/someone/lib/site.py' is gone")
        == "File 'site.py' is gone"
    )
    assert environments.one_line(" \n") == "it said nothing"


@pytest.mark.parametrize(
    "required, expected",
    [
        (['nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"'], "-cu12==12.8.90"),
        (['cuda-toolkit[cublas,cudart]==13.2.2; platform_system == "Linux"'], "[cudart]==13.2.2"),
    ],
)
def test_the_runtime_of_cuda_is_installed_for_real(required, expected):
    [name] = environments.cuda_runtime(["filelock", *required])
    assert name.endswith(expected)


@COMPILER
def test_stand_ins_for_missing_libraries(tmp_path):
    """A library that needs one that is not there loads beside its stand-in."""
    if shutil.which("readelf") is None:
        pytest.skip("stand-ins need readelf")
    lib = tmp_path / "torch" / "lib"
    lib.mkdir(parents=True)
    sources = {
        "libcublas.so.99": "int cublasHello(void) { return 7; }",
        "libtorch_x.so": "int cublasHello(void); int hello(void) { return cublasHello(); }",
    }
    (tmp_path / "v.map").write_text("libcublas.so.99 { global: *; };")
    for name, source in sources.items():
        (tmp_path / "s.c").write_text(source)
        extra = (
            ["-Wl,-soname,libcublas.so.99", f"-Wl,--version-script,{tmp_path}/v.map"]
            if "cublas.so" in name
            else [lib / "libcublas.so.99", "-Wl,-rpath,$ORIGIN"]
        )
        options = ["cc", "-shared", "-fPIC", tmp_path / "s.c", *extra, "-o", lib / name]
        assert environments.run(options, "import").returncode == 0
    (lib / "libcublas.so.99").unlink()
    load = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).hello())"
    command = [sys.executable, "-c", load, lib / "libtorch_x.so"]
    assert "libcublas.so.99: cannot open" in environments.run(command, "import").stderr
    assert environments.stand_in_libraries(tmp_path) == ["libcublas.so.99"]
    assert environments.run(command, "import").stdout.strip() == "100"
