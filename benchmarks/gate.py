"""The numeric rule on the very layers that are timed, at the very sizes, before they are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pera_kernels.verify.numerics import Case, Inputs, draws, judge, make_inputs, run

from .layers import Contender, Layer

__all__ = ["Gate", "Judgement", "outputs"]


@dataclass(frozen=True)
class Judgement:
    """The largest error over what the rule allows (None: nothing to compare), and why it failed."""

    error_ratio: float | None = None
    failure: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Judgement:
        """Whatever a contender raises, another project's code among them, is its failure: it stands
        in the rows, and the exit status is 1.
        """
        return cls(failure=f"{type(error).__name__}: {error}".splitlines()[0])


@dataclass(frozen=True)
class _Draw:
    case: Case
    inputs: Inputs
    reference: dict[str, torch.Tensor]
    truth: dict[str, torch.Tensor]


class Gate:
    """``numerics.check`` for any contender of a case: same inputs, same draws, same rule.

    What has to be matched is computed once for all contenders that are judged alike, and only for
    those at a time: at the largest sizes the float64 truth takes gigabytes.
    """

    def __init__(self, case: Case, device: torch.device, inputs: Inputs | None = None) -> None:
        """``inputs`` are those of the case's own seed, where they have been made already."""
        self.case = case
        self.device = device
        self._drawn = {} if inputs is None else {case.seed: inputs}

    def judge_all(self, contenders: Sequence[Contender]) -> dict[str, Judgement]:
        """By name, in the order given. An exception in a contender is a failure too."""
        groups: dict[Case | None, list[Contender]] = {}
        for contender in contenders:
            groups.setdefault(contender.judged_as(self.case), []).append(contender)
        found = {}
        for judged, group in groups.items():
            expected = [] if judged is None else self._expected(judged)
            for contender in group:
                found[contender.name] = _judge(contender, expected)
        return {contender.name: found[contender.name] for contender in contenders}

    def _expected(self, judged: Case) -> list[_Draw]:
        expected = []
        for number in range(draws(judged)):
            seed = judged.seed + 1000 * number
            if seed not in self._drawn:
                self._drawn[seed] = make_inputs(replace(self.case, seed=seed), self.device)
            case, inputs = replace(judged, seed=seed), _as_judged(judged, self._drawn[seed])
            reference = run(case, inputs, "reference")
            truth = run(case, inputs, "reference", exact=True)
            expected.append(_Draw(case, inputs, reference, truth))
        return expected


def _as_judged(judged: Case, inputs: Inputs) -> Inputs:
    """The same numbers for contenders with other adapters: another dtype, or no coefficients."""
    dtype, h = judged.factor_dtype, inputs.h
    return replace(
        inputs,
        A=inputs.A.to(dtype),
        B=inputs.B.to(dtype),
        h=None if judged.terms == "linear" or h is None else h.to(dtype),
    )


def outputs(layer: Layer, case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of what the layer trains; the seed chooses the dropout mask."""
    x = inputs.x.detach().clone().requires_grad_()
    leaves = {"dx": x, **layer.trains}
    torch.manual_seed(case.seed)
    y = layer.module(x)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _judge(contender: Contender, expected: list[_Draw]) -> Judgement:
    if not expected:
        return Judgement()
    try:
        got = []
        for draw in expected:
            layer = contender.build(draw.case, draw.inputs)
            got.append(outputs(layer, draw.case, draw.inputs))
    except Exception as error:
        return Judgement.of(error)
    absent = set(expected[0].truth) - set(got[0])
    if layer.trains and absent:
        return Judgement(failure=f"no {', '.join(sorted(absent))}")
    verdicts = [
        judge(
            name,
            torch.stack([values[name] for values in got]),
            torch.stack([draw.reference[name] for draw in expected]),
            torch.stack([draw.truth[name] for draw in expected]),
            expected[0].case.dtype,
        )
        for name in got[0]
    ]
    failed = [str(v) for v in verdicts if v.notes or v.ratio > contender.allowed]
    return Judgement(max(verdict.ratio for verdict in verdicts), "; ".join(failed) or None)
