"""Break the package one statement at a time and see that the tests notice.

python -m tools.mutate              every mutant; rows go to tests/results/mutations.jsonl
python -m tools.mutate --list       what each of them breaks; runs nothing

Each mutant is one replaced text in a temporary copy of the tree, and a selection of the normal
suite that must fail on it. First the selections must pass without a change. Exit status: 0 every
mutant was killed, 1 one survived, 2 the table or a run is in error.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import OneLineParser
from benchmarks.results import host

from .mutants import MUTANTS, Mutant
from .rows import write

__all__ = ["MUTANTS", "Mutant", "Result", "check", "main"]

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pera_kernels", "tests", "tools", "benchmarks")
RESULTS = Path("tests") / "results" / "mutations.jsonl"
TIMEOUT = 300.0
BASELINE_TIMEOUT = 1800.0
STATUSES = ("killed", "timeout", "survived", "error")


class MutationError(Exception):
    """The table does not fit the tree, or the tests do not pass without a mutant."""


@dataclass(frozen=True)
class Result:
    """What became of a mutant; ``killed_by`` is the first test that failed."""

    name: str
    file: str
    breaks: str
    killed_by: str | None
    status: str
    seconds: float
    commit: str | None
    date: str


def mutated(mutant: Mutant, root: Path) -> str:
    """The file's text with the mutant in it.

    Raises:
        MutationError: the old text does not occur exactly once, or the new one is not Python.
    """
    path = root / mutant.file
    if not path.is_file():
        raise MutationError(f"mutant {mutant.name}: there is no file {mutant.file}")
    source = path.read_text(encoding="utf-8")
    if (count := source.count(mutant.old)) != 1:
        raise MutationError(
            f"mutant {mutant.name}: its old text occurs {count} times in {mutant.file}, not once: "
            f"{mutant.old!r}"
        )
    text = source.replace(mutant.old, mutant.new)
    try:
        changed = ast.dump(ast.parse(text)) != ast.dump(ast.parse(source))
    except SyntaxError as error:
        raise MutationError(
            f"mutant {mutant.name}: {mutant.file} is not Python then: {error}"
        ) from error
    if not changed:
        raise MutationError(f"mutant {mutant.name}: it changes nothing in {mutant.file}")
    return text


def check(mutants: Sequence[Mutant], root: Path = ROOT) -> None:
    """Raise :class:`MutationError` unless names are unique and every mutant applies."""
    repeated = [name for name, count in Counter(m.name for m in mutants).items() if count > 1]
    if repeated:
        raise MutationError(f"mutant {repeated[0]}: the name stands twice in the table")
    for mutant in mutants:
        mutated(mutant, root)


@contextlib.contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """A copy of what the tests need, as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for name in COPIED:
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", RESULTS.name)
                shutil.copytree(root / name, tree / name, ignore=ignored)
        shutil.copy(root / "pyproject.toml", tree)
        yield tree


def _pytest(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """(exit status, output) of pytest; None for a run that was cut off."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    # No bytecode: a mutant of the same size and second would be taken for what it replaced.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            # Also what the tests started themselves.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def _tail(output: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-lines:])


def baseline(mutants: Sequence[Mutant], root: Path) -> float:
    """Run the selections of all mutants on an unchanged copy; returns the seconds it took.

    Raises:
        MutationError: they do not pass.
    """
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    start = time.monotonic()
    with _copy(root) as tree:
        status, output = _pytest(tree, tests, BASELINE_TIMEOUT)
    if status != 0:
        what = "take too long" if status is None else f"end with status {status}"
        raise MutationError(f"without a mutant the tests {what}\n{_tail(output)}")
    return time.monotonic() - start


def judge(mutant: Mutant, root: Path, origin: dict[str, Any]) -> tuple[Result, str]:
    """The result of one mutant, and the output of its tests."""
    start = time.monotonic()
    with _copy(root) as tree:
        (tree / mutant.file).write_text(mutated(mutant, root), encoding="utf-8")
        status, output = _pytest(tree, mutant.tests, TIMEOUT)
    seconds = round(time.monotonic() - start, 1)
    word = {None: "timeout", 0: "survived", 1: "killed"}.get(status, "error")
    first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    killed_by = first[1] if first and word == "killed" else None
    return (
        Result(mutant.name, mutant.file, mutant.breaks, killed_by, word, seconds, **origin),
        output,
    )


def _table(results: Sequence[Result]) -> str:
    """Mutants by file and status."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.file, Counter())[result.status] += 1
    width = max(len(file) for file in [*counts, "total"])
    lines = [f"{'file':<{width}}" + "".join(f"{status:>10}" for status in STATUSES)]
    for file, own in [*counts.items(), ("total", sum(counts.values(), Counter()))]:
        lines.append(f"{file:<{width}}" + "".join(f"{own[status]:>10}" for status in STATUSES))
    return "\n".join(lines)


def run(mutants: Sequence[Mutant], root: Path, out: Path) -> int:
    """Baseline, then every mutant; returns the exit status."""
    check(mutants, root)
    print(f"{len(mutants)} mutants; first their tests without any", flush=True)
    print(f"passed in {baseline(mutants, root):.0f} s", flush=True)
    here = host(torch.device("cpu"))
    origin = {"commit": here.commit, "date": here.date}
    results = []
    width = max(len(mutant.name) for mutant in mutants)
    for number, mutant in enumerate(mutants, 1):
        result, output = judge(mutant, root, origin)
        results.append(result)
        write(out, [asdict(result)])
        print(
            f"{number:>3}/{len(mutants)} {result.name:<{width}} {result.status:<8} "
            f"{result.seconds:>6.1f} s  {result.killed_by or result.breaks}",
            flush=True,
        )
        if result.status == "error":
            print(_tail(output), flush=True)
    print(_table(results))
    seen = {result.status for result in results}
    return 2 if "error" in seen else int("survived" in seen)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m tools.mutate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME,...", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="names, files and what they break")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where rows go ({RESULTS})")
    return parser


def main(
    argv: Sequence[str] | None = None,
    mutants: Sequence[Mutant] = MUTANTS,
    root: Path = ROOT,
) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.only is not None:
        wanted = [name.strip() for name in arguments.only.split(",")]
        unknown = [name for name in wanted if name not in {mutant.name for mutant in mutants}]
        if unknown:
            _parser().error(f"there is no mutant {unknown[0]!r}: see --list")
        mutants = [mutant for mutant in mutants if mutant.name in wanted]
    try:
        if arguments.list:
            check(mutants, root)
            for mutant in mutants:
                print(f"{mutant.name:<28} {mutant.file}: {mutant.breaks}")
            return 0
        return run(mutants, root, arguments.out or root / RESULTS)
    except MutationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
