"""Virtual environments for the scripts that try other versions and built archives.

PyTorch for CUDA runs in them without its gigabytes of CUDA packages: stand-ins take the place of
their libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "Unavailable",
    "cuda_runtime",
    "find_python",
    "new_environment",
    "one_line",
    "pip_install",
    "run",
    "stand_in_libraries",
]

SECONDS = {"venv": 300, "pip": 1200, "import": 180, "suite": 1200, "compile": 900}


class Unavailable(Exception):
    """Something that this row needs cannot be had here."""


def one_line(text: str, limit: int = 200) -> str:
    """The last line that says something, without addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(ERROR: |\w*(Error|Exception)\b)", line)] or lines
    last = told[-1].removeprefix("ERROR: ") if told else "it said nothing"
    return re.sub(r"(\w+://|/)[^\s'\"]*/|host='[^']*'", "", last)[:limit]


def run(
    command: Sequence[object], kind: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command within its limit and without this process's settings for Python and Triton."""
    drop = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "VIRTUAL_ENV")
    own = {key: value for key, value in os.environ.items() if key not in drop}
    own.update(environment)
    words = [str(word) for word in command]
    try:
        return subprocess.run(
            words, cwd=cwd, env=own, capture_output=True, text=True, timeout=SECONDS[kind]
        )
    except subprocess.TimeoutExpired:
        late = f"Exception: {kind} took more than {SECONDS[kind]} s"
        return subprocess.CompletedProcess(words, 124, "", late)


def find_python(version: str) -> Path:
    """An interpreter of this minor version that runs: this one, on PATH, or one of pyenv's.

    Raises:
        Unavailable: there is none.
    """
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        sys.executable,
        shutil.which(f"python{version}") or "",
        *map(str, sorted(versions.glob(f"{version}*/bin/python{version}"))),
    ]
    check = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        try:
            done = run([candidate, "-c", check], "venv")
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return Path(candidate)
    raise Unavailable(f"Python {version} is not installed here")


def new_environment(folder: Path, interpreter: str | Path = sys.executable) -> Path:
    """An empty environment of this interpreter in place of what was there; its own one."""
    done = run([interpreter, "-m", "venv", "--clear", folder], "venv")
    if done.returncode:
        raise Unavailable(f"venv: {one_line(done.stderr + done.stdout)}")
    return folder / "bin" / "python"


def pip_install(python: Path, *words: str) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*pip, *words], "pip")
    if done.returncode:
        raise Unavailable(f"pip install {' '.join(words)}: {one_line(done.stderr)}")


def cuda_runtime(required: Iterable[str]) -> list[str]:
    """The one small CUDA package that is installed for real: it looks for the driver."""
    for line in required:
        plain = line.partition(";")[0].strip()
        if plain.startswith("nvidia-cuda-runtime"):
            return [plain]
        if plain.startswith("cuda-toolkit"):
            return [re.sub(r"\[.*\]", "[cudart]", plain)]
    return ["--no-deps"]


def stand_in_libraries(packages: Path) -> list[str]:
    """Libraries beside PyTorch's own for the CUDA ones that are not there; their names.

    A function that PyTorch asks of a missing library returns 100, which in CUDA's runtime says that
    there is no device. Symbols carry the versions that the loader checks.
    """
    compiler, readelf = shutil.which("cc"), shutil.which("readelf")
    if compiler is None or readelf is None:
        raise Unavailable("PyTorch for CUDA without its packages needs cc and readelf")
    lib = packages / "torch" / "lib"
    here = {path.name for path in (packages / "nvidia").rglob("lib*.so*")} | {"libcuda.so.1"}
    needed: set[str] = set()
    versions: dict[str, str] = {}
    wanted: set[tuple[str, str]] = set()
    for path in lib.glob("*.so*"):
        here.add(path.name)
        options = ("-W", "-d", "-V", "--dyn-syms")
        text = run([readelf, *options, path], "import").stdout
        needed.update(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl)\S*)\]", text))
        library = ""
        for file, version in re.findall(r"Version: 1  File: (\S+)|Name: (\S+)  Flags", text):
            if file:
                library = file
            else:
                versions[version] = library
        symbol = r" +GLOBAL +\w+ +UND (_*(?:cu|nv|nccl)\w+)@?@?([\w.]*)"
        wanted.update(re.findall(symbol, text))
    missing = sorted(needed - here)
    with tempfile.TemporaryDirectory() as work:
        source, script = Path(work) / "stand_in.c", Path(work) / "versions.map"
        for library in missing:
            own = [(name, v) for name, v in sorted(wanted) if not v or versions.get(v) == library]
            source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name, _ in own))
            by_version = {v: [n for n, w in own if w == v] for v in versions if v and own}
            blocks = [
                f"{v} {{ {'global: ' if names else ''}{''.join(n + '; ' for n in names)}}};\n"
                for v, names in by_version.items()
                if versions[v] == library
            ]
            script.write_text("".join(blocks))
            build = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", source]
            build += [f"-Wl,--version-script,{script}"] if blocks else []
            done = run([*build, "-o", lib / library], "import")
            if done.returncode:
                raise Unavailable(f"no stand-in for {library}: {one_line(done.stderr)}")
    return missing
