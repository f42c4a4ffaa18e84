"""The numeric rule on the very layers that are timed, at the very sizes, before they are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pera_kernels.testing import Case, Inputs, draws, judge, make_inputs, run

from .contenders import Contender, Layer

__all__ = ["Judgement", "Outputs", "compare", "judge_all", "outputs"]

Outputs = dict[str, torch.Tensor]


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


def outputs(layer: Layer, x: torch.Tensor, dy: torch.Tensor, seed: int) -> Outputs:
    """y, dx and the gradients of what the layer trains; the seed chooses the dropout mask."""
    leaf = x.detach().clone().requires_grad_()
    leaves = {"dx": leaf, **layer.trains}
    torch.manual_seed(seed)
    y = layer.module(leaf)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare(
    got: Sequence[Outputs],
    reference: Sequence[Outputs],
    truth: Sequence[Outputs],
    dtype: torch.dtype,
    allowed: float = 1.0,
) -> Judgement:
    """The rule on every output, over all draws of the inputs together; a layer that trains nothing
    has y and dx alone.
    """
    absent = set(truth[0]) - set(got[0])
    if absent and set(got[0]) != {"y", "dx"}:
        return Judgement(failure=f"no {', '.join(sorted(absent))}")
    verdicts = []
    for name in got[0]:
        mine, plain, exact = (
            torch.stack([results[name] for results in group]) for group in (got, reference, truth)
        )
        verdicts.append(judge(name, mine, plain, exact, dtype))
    failed = [str(v) for v in verdicts if v.notes or not v.ratio <= allowed]
    return Judgement(max(verdict.ratio for verdict in verdicts), "; ".join(failed) or None)


def judge_all(
    contenders: Sequence[Contender], case: Case, inputs: Inputs, device: torch.device
) -> dict[str, Judgement]:
    """Judge everybody by name; ``inputs`` are those of the case's own seed.

    What has to be matched is computed once for all that are judged alike, and only for those at a
    time: at the largest sizes the float64 truth takes gigabytes.
    """
    groups: dict[Case | None, list[Contender]] = {}
    for contender in contenders:
        groups.setdefault(contender.judged_as(case), []).append(contender)
    found = {}
    for judged, group in groups.items():
        if judged is None:
            found.update({contender.name: Judgement() for contender in group})
            continue
        given, reference, truth = [], [], []
        for number in range(draws(judged)):
            seed = case.seed + 1000 * number
            drawn = inputs if number == 0 else make_inputs(replace(case, seed=seed), device)
            own = replace(judged, seed=seed)
            given.append((own, _as_judged(own, drawn)))
            reference.append(run(*given[-1], "reference"))
            truth.append(run(*given[-1], "reference", exact=True))
        for contender in group:
            found[contender.name] = _judge(contender, given, reference, truth)
    return found


def _as_judged(judged: Case, inputs: Inputs) -> Inputs:
    """The same numbers for contenders with other adapters: another dtype, or no coefficients."""
    dtype = judged.factor_dtype
    h = None if judged.terms == "linear" or inputs.h is None else inputs.h.to(dtype)
    return replace(inputs, A=inputs.A.to(dtype), B=inputs.B.to(dtype), h=h)


def _judge(
    contender: Contender,
    given: Sequence[tuple[Case, Inputs]],
    reference: Sequence[Outputs],
    truth: Sequence[Outputs],
) -> Judgement:
    try:
        got = [
            outputs(contender.build(case, inputs), inputs.x, inputs.dy, case.seed)
            for case, inputs in given
        ]
    except Exception as error:
        return Judgement.of(error)
    return compare(got, reference, truth, given[0][0].dtype, contender.allowed)
