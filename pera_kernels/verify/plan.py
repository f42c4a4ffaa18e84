"""Which cases are run: everything that was asked for, or a default that turns over what is dear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from pera_kernels.backends import unavailable
from pera_kernels.terms import Terms, expanded_rank
from pera_kernels.testing import Case

__all__ = ["DTYPES", "OPS", "RANKS", "Request", "Task", "coverage", "plan"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DEFAULT_DTYPES = ("float32", "bfloat16", "float16")
RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 64)
# What each op's name means; the three in the middle are pera_linear computed in another way.
OPS: dict[str, dict[str, Any]] = {
    "pera_linear": {},
    "dropout": {"dropout_p": 0.25},
    "composed": {"plan": "composed"},
    "mixed": {"adapter_dtype": torch.float32},
    "delta_weight": {"op": "delta_weight"},
}
# Of these Triton gets one in turn at each terms, rank and dtype: a kernel takes seconds to
# interpret, and to compile.
ROTATED = {
    "cpu": ("pera_linear", "delta_weight", "dropout", "composed", "mixed"),
    "cuda": ("dropout", "composed", "mixed"),
}

Shape = tuple[int, int, int]
# (T, N, M), one in turn: ragged tiles, many features (project splits N), few of everything
# (contract splits K), many tokens (contract splits T).
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((33, 70, 50), (9, 140, 20), (17, 40, 24), (260, 20, 17)),
    "cuda": ((1000, 333, 517), (70, 2056, 264), (33, 70, 50), (4096, 512, 512)),
}
# Interpreted, large ranks, and small ones with their many draws, get a shape that is soon done.
TURNING_RANKS, SMALL_SHAPE = range(4, 13), (9, 24, 20)


@dataclass(frozen=True)
class Request:
    """What was asked for; None leaves the choice to the plan."""

    device: str
    backends: tuple[str, ...] | None
    terms: tuple[str, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    ops: tuple[str, ...] | None = None
    shapes: tuple[Shape, ...] | None = None
    seed: int = 0
    exhaustive: bool = False

    @property
    def used_backends(self) -> tuple[str, ...]:
        return self.backends or ("triton", "torch")

    @property
    def used_ops(self) -> tuple[str, ...]:
        return self.ops or tuple(OPS)

    @property
    def rotated_ops(self) -> tuple[str, ...]:
        """Of which ops Triton gets only one in turn."""
        return () if self.ops or self.exhaustive else ROTATED[self.device]

    @property
    def used_shapes(self) -> tuple[Shape, ...]:
        return self.shapes or SHAPES[self.device]

    @property
    def rotates_shapes(self) -> bool:
        return self.shapes is None and not self.exhaustive


@dataclass(frozen=True)
class Task:
    """One case under its op's name, and the backends to judge on it."""

    op: str
    case: Case
    backends: tuple[str, ...]

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        return f"{self.case.T}x{self.case.N}x{self.case.M}"

    def reason(self, backend: str, device: str) -> str | None:
        """Why ``backend`` cannot run this case on ``device``; None if it can."""
        dtypes = (self.case.dtype, self.case.factor_dtype)
        return unavailable(backend, torch.device(device), dtypes)


def plan(request: Request) -> list[Task]:
    """The tasks of a request, ordered as the table is: op, dtype, terms, rank."""
    tasks = []
    for op in request.used_ops:
        for at_dtype, dtype in enumerate(request.dtypes):
            if not _applies(op, dtype):
                continue
            rotated = [name for name in request.rotated_ops if _applies(name, dtype)]
            for at_terms, terms in enumerate(request.terms):
                for at_rank, r in enumerate(request.ranks):
                    turn = at_rank + at_terms + at_dtype
                    backends = request.used_backends
                    if op in rotated and op != rotated[turn % len(rotated)]:
                        backends = tuple(b for b in backends if b != "triton")
                    shapes = request.used_shapes
                    if request.rotates_shapes:
                        shapes = (_shape_in_turn(request, r, turn + at_terms),)
                    for T, N, M in shapes:
                        case = Case(
                            terms=cast(Terms, terms),
                            r=r,
                            T=T,
                            N=N,
                            M=M,
                            dtype=DTYPES[dtype],
                            seed=request.seed,
                            **OPS[op],
                        )
                        if backends:
                            tasks.append(Task(op, case, backends))
    return tasks


def _applies(op: str, dtype: str) -> bool:
    """float32 adapters are a case of their own only under half-precision activations."""
    return op != "mixed" or dtype in ("bfloat16", "float16")


def _shape_in_turn(request: Request, r: int, turn: int) -> Shape:
    if request.device == "cpu" and r not in TURNING_RANKS:
        return SMALL_SHAPE
    return request.used_shapes[turn % len(request.used_shapes)]


def groups(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that share compiled kernels (terms, rank, dtype) together, the longest groups first."""
    found: dict[tuple[str, int, torch.dtype], list[Task]] = {}
    for task in tasks:
        found.setdefault((task.case.terms, task.case.r, task.case.dtype), []).append(task)
    return sorted(
        found.values(), key=lambda group: -expanded_rank(group[0].case.r, group[0].case.terms)
    )


def coverage(request: Request) -> list[str]:
    """What the plan covers and what it only samples, in words."""

    def names(shapes: Sequence[Shape]) -> str:
        return ", ".join("x".join(map(str, shape)) for shape in shapes)

    rotated = request.rotated_ops if "triton" in request.used_backends else ()
    lines = [
        f"terms {', '.join(request.terms)}; ranks {' '.join(map(str, request.ranks))}; "
        f"{', '.join(request.dtypes)}",
    ]
    for backend in request.used_backends:
        turning = rotated if backend == "triton" else ()
        whole = [op for op in request.used_ops if op not in turning]
        parts = [f"{', '.join(whole)} at each combination of these"] if whole else []
        if turning:
            parts.append(f"one in turn of {', '.join(turning)} at each (--exhaustive: all)")
        lines.append(f"{backend}: {'; '.join(parts)}")
    if request.rotates_shapes:
        line = f"tokens x in x out: one in turn of {names(request.used_shapes)}"
        if request.device == "cpu":
            least, most = TURNING_RANKS[0], TURNING_RANKS[-1]
            line += f" for r = {least} to {most}, {names([SMALL_SHAPE])} for others"
        lines.append(line)
    else:
        lines.append(f"tokens x in x out: {names(request.used_shapes)}")
    return lines
