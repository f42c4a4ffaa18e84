"""The numeric rule, shared by the tests, ``verify`` and the benchmarks' correctness gate.

Truth is the float64 reference on the same rounded inputs. The maximum and the RMS error of a
candidate must each be at most twice the error of the plain reference run in the working dtype,
plus a floor: four ulps of the output's largest value for the maximum, one ulp of its RMS value for
the RMS. The ratio of two errors of a handful of numbers says little, so a case with few
coefficients is judged on several draws of its inputs together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import pera_kernels as pk
from pera_kernels.terms import Terms, coefficient_count

__all__ = [
    "Case",
    "Inputs",
    "Verdict",
    "check",
    "draws",
    "judge",
    "make_inputs",
    "poisoned_memory",
    "run",
]

FACTOR = 2.0
FLOOR_ULPS_MAX = 4.0
FLOOR_ULPS_RMS = 1.0
POOLED_COEFFICIENTS = 32
MAX_DRAWS = 8


@dataclass(frozen=True)
class Case:
    """One problem: its sizes, terms, dtypes (``adapter_dtype=None`` means ``dtype``), its plan, and
    what it keeps for the backward.
    """

    op: str = "pera_linear"
    terms: Terms = "full"
    r: int = 4
    T: int = 33
    N: int = 70
    M: int = 50
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    plan: str = "factored"
    scale: float = 0.7
    seed: int = 0
    keep: str = "u"

    @property
    def factor_dtype(self) -> torch.dtype:
        return self.adapter_dtype or self.dtype


@dataclass
class Inputs:
    """Tensors of a case, rounded to its dtypes; ``dy`` is the gradient of the output."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    h: torch.Tensor | None
    dy: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """How far one output is from the truth, beside the working-dtype reference."""

    name: str
    max_error: float
    rms_error: float
    reference_max: float
    reference_rms: float
    floor_max: float
    floor_rms: float
    worst_index: tuple[int, ...] = ()
    worst_got: float = math.nan
    worst_truth: float = math.nan
    notes: tuple[str, ...] = ()
    count: int = 0  # of the values compared, in all draws together

    @property
    def ratio(self) -> float:
        """The larger of the two errors over what the rule allows; at most 1 passes."""
        return max(
            _over(self.max_error, FACTOR * self.reference_max + self.floor_max),
            _over(self.rms_error, FACTOR * self.reference_rms + self.floor_rms),
        )

    @property
    def passed(self) -> bool:
        return not self.notes and self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.max_error:.3e} (reference {self.reference_max:.3e}), "
            f"rms {self.rms_error:.3e} (reference {self.reference_rms:.3e}), "
            f"floors {self.floor_max:.1e} and {self.floor_rms:.1e}, worst at {self.worst_index}: "
            f"got {self.worst_got:.7g}, truth {self.worst_truth:.7g} {'; '.join(self.notes)}"
        )


def _over(error: float, allowed: float) -> float:
    if math.isnan(error):
        return math.inf
    return 0.0 if error == 0.0 else error / allowed if allowed > 0.0 else math.inf


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs whose linear and quadratic parts have comparable size."""
    # Drawn on the device itself: at a benchmark's sizes a CPU would take seconds.
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int, std: float, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
        return values.mul_(std).to(dtype)

    dtype, factor = case.dtype, case.factor_dtype
    count = coefficient_count(case.r, case.terms)
    return Inputs(
        x=normal(case.T, case.N, std=1.0, dtype=dtype),
        weight=normal(case.M, case.N, std=max(case.N, 1) ** -0.5, dtype=dtype),
        bias=normal(case.M, std=1.0, dtype=dtype),
        A=normal(case.r, case.N, std=0.5, dtype=factor),
        B=normal(case.M, case.r, std=0.5, dtype=factor),
        h=None if case.terms == "linear" else normal(count, std=1.0, dtype=factor),
        dy=normal(
            *((case.M, case.N) if case.op == "delta_weight" else (case.T, case.M)),
            std=1.0,
            dtype=factor if case.op == "delta_weight" else dtype,
        ),
    )


def run(
    case: Case, inputs: Inputs, backend: str, *, exact: bool = False
) -> dict[str, torch.Tensor]:
    """The output and every gradient of a case by name; ``exact`` computes in float64.

    The dropout seed follows from the case's seed, so that every backend draws the same mask.
    """

    copies: dict[str, Any] = {
        name: None if t is None else t.detach().to(torch.float64 if exact else t.dtype, copy=True)
        for name, t in vars(inputs).items()
    }
    differentiated = ("A", "B", "h") if case.op == "delta_weight" else ("x", "A", "B", "h")
    leaves = {
        f"d{name}": copies[name].requires_grad_()
        for name in differentiated
        if copies[name] is not None
    }
    dy = copies.pop("dy")
    options: dict[str, Any] = {"scale": case.scale, "terms": case.terms, "backend": backend}
    if case.op == "delta_weight":
        y = pk.delta_weight(copies["A"], copies["B"], copies["h"], **options)
    else:
        torch.manual_seed(case.seed)
        options |= {"dropout_p": case.dropout_p, "plan": case.plan, "keep": case.keep}
        y = pk.pera_linear(**copies, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def judge(
    name: str, got: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> Verdict:
    """Apply the rule to one output; ``dtype`` is the working dtype, whose ulp sets the floor."""
    notes = []
    if got.shape != truth.shape:
        notes.append(f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}")
    if got.dtype != reference.dtype:
        notes.append(f"dtype {got.dtype} instead of {reference.dtype}")
    if notes or truth.numel() == 0:
        return Verdict(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, notes=tuple(notes))
    # On the device of what is judged: copying a benchmark's outputs takes longer than making them.
    truth = truth.to(got.device, torch.float64)
    error, reference_error = (t.to(truth).sub(truth).abs() for t in (got, reference))
    worst = int(torch.nan_to_num(error, nan=math.inf, posinf=math.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    ulp = torch.finfo(dtype).eps
    return Verdict(
        name=name,
        max_error=float(error.max()),
        rms_error=float(error.square().mean().sqrt()),
        reference_max=float(reference_error.max()),
        reference_rms=float(reference_error.square().mean().sqrt()),
        floor_max=FLOOR_ULPS_MAX * ulp * float(truth.abs().max()),
        floor_rms=FLOOR_ULPS_RMS * ulp * float(truth.square().mean().sqrt()),
        worst_index=index,
        worst_got=float(got.flatten()[worst]),
        worst_truth=float(truth.flatten()[worst]),
        notes=() if torch.isfinite(got).all() else ("not finite",),
        count=truth.numel(),
    )


def check(
    case: Case, backend: str, device: torch.device | str = "cpu", *, pooled: int | None = None
) -> list[Verdict]:
    """Run a case by truth, working-dtype reference and ``backend``; one verdict per output.

    ``pooled`` is how many draws of the inputs are judged together, ``draws(case)`` by default.
    """
    outputs: list[list[dict[str, torch.Tensor]]] = [[], [], []]
    for draw in range(pooled or draws(case)):
        drawn = replace(case, seed=case.seed + 1000 * draw)
        inputs = make_inputs(drawn, device)
        outputs[0].append(run(drawn, inputs, backend))
        outputs[1].append(run(drawn, inputs, "reference"))
        outputs[2].append(run(drawn, inputs, "reference", exact=True))
    verdicts = []
    for name in outputs[0][0]:
        got, reference, truth = (torch.stack([o[name] for o in group]) for group in outputs)
        verdicts.append(judge(name, got, reference, truth, case.dtype))
    return verdicts


def draws(case: Case) -> int:
    """How many draws are pooled: enough for ``POOLED_COEFFICIENTS`` values of dh."""
    count = coefficient_count(case.r, case.terms)
    return 1 if count == 0 else min(MAX_DRAWS, math.ceil(POOLED_COEFFICIENTS / count))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that what nobody wrote is not mistaken for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
