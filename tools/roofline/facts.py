"""What the compiler made of each launch, kept in one file for each version of Triton."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton.language as tl

from pera_kernels.kernels.launch import Launch

from ..compile_report import compile_all, compilers, specialised
from ..problems import Job

__all__ = ["Fact", "Facts", "compile_missing", "fact_of", "newest", "read"]


@dataclass(frozen=True)
class Fact:
    """What the compiler made of a launch, which ``key`` names; counts of instructions are those in
    its code.
    """

    arch: str
    kernel: str
    key: str
    registers: int
    spills: int
    shared: int
    tensor_core: int
    barriers: int
    problem: str = ""


Facts = dict[tuple[str, str], Fact]


def newest(folder: Path) -> Path:
    """The file of the newest Triton."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.stem)]

    return max(folder.glob("triton-*.jsonl"), key=version)


def read(path: Path) -> Facts:
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Fact(**json.loads(line)) for line in lines]
    return {(fact.arch, fact.key): fact for fact in found}


def fact_of(facts: Facts, arch: str, launch: Launch) -> Fact | None:
    """None if it is not what was compiled."""
    return facts.get((arch, _key(launch)))


def compile_missing(path: Path, launches: Iterable[tuple[Launch, Job, str]], jobs: int) -> None:
    """Complete a file for these launches, and leave out what is not among them."""
    facts = read(path)
    wanted: dict[tuple[str, str], Any] = {}
    for own, job, arch in launches:
        work = (specialised(own.kernel, own.arguments), job, arch)
        wanted.setdefault((arch, _key(own)), work)
    missing = {name: work for name, work in wanted.items() if name not in facts}
    print(f"{len(missing)} of {len(wanted)} launches to compile")
    with compilers(jobs) as pool:
        results = compile_all(pool, missing.values())
        for name, (launch, row) in zip(missing, results, strict=True):
            numbers = (row.registers, row.spill_bytes, row.shared_bytes)
            counts = (row.tensor_core, row.barriers)
            facts[name] = Fact(name[0], launch.kernel, name[1], *numbers, *counts, row.problem)
    kept = sorted((facts[name] for name in wanted), key=lambda f: (f.arch, f.kernel, f.key))
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in kept))


def _key(launch: Launch) -> str:
    """Another one where the compiler would be given something else."""
    own = specialised(launch.kernel, launch.arguments)
    text = repr((own.kernel, own.arguments, _source(launch.kernel)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _source(kernel: Any) -> str:
    """The code of a kernel, and of all that it calls, without comments and docstrings, and the
    constants that they name.
    """
    found: dict[str, str] = {}

    def visit(own: Any) -> None:
        if own.fn.__name__ in found:
            return
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(own.fn))).body[0]
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        found[own.fn.__name__] = ast.unparse(tree)
        for name in own.fn.__code__.co_names:
            used = own.fn.__globals__.get(name)
            if hasattr(used, "fn"):
                visit(used)
            elif isinstance(used, tl.constexpr):
                found[name] = repr(used.value)

    visit(kernel)
    return "\n".join(found.values())
