"""What is timed: a contender builds a layer for a case, and is judged before any clock starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels import backends
from tools.numerics import Case, Inputs, draws, judge, make_inputs, run

__all__ = ["CONTENDERS", "FROZEN", "Contender", "Gate", "Layer", "find", "outputs", "select"]

FROZEN = "frozen"


@dataclass(frozen=True)
class Layer:
    """A module ``(T, N)`` -> ``(T, M)`` and what it trains, named by the gradient: dA, dB, dh."""

    module: nn.Module
    trains: dict[str, torch.Tensor]


def _always(case: Case) -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    ``build`` takes a case and its inputs, whose tensors it may share but not change.
    ``unavailable`` says why it cannot run a case on a device, ``left_out`` why it is not timed
    there unless asked for by name. ``judged_as`` is the case whose plain reference it must match;
    None for the frozen layer, which has nothing to match. A layer that copies from the host or
    synchronises on every call is not ``capturable`` in a CUDA graph.
    """

    name: str
    plan: str
    build: Callable[[Case, Inputs], Layer]
    unavailable: Callable[[Case, torch.device], str | None]
    judged_as: Callable[[Case], Case | None]
    left_out: Callable[[Case], str | None] = _always
    capturable: bool = True


def _frozen_linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _adapted(
    case: Case, inputs: Inputs, weight: torch.Tensor, backend: str, plan: str
) -> pk.PeraLinear:
    layer = pk.PeraLinear.from_linear(
        _frozen_linear(weight, inputs.bias),
        case.r,
        alpha=case.scale * case.r,
        terms=case.terms,
        dropout=case.dropout_p,
        adapter_dtype=case.factor_dtype,
        backend=backend,
        plan=plan,
    )
    with torch.no_grad():
        layer.pera_A.copy_(inputs.A)
        layer.pera_B.copy_(inputs.B)
        if layer.pera_h is not None and inputs.h is not None:
            layer.pera_h.copy_(inputs.h)
    return layer


def _frozen() -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        return Layer(_frozen_linear(inputs.weight, inputs.bias), {})

    return Contender(FROZEN, "dense", build, lambda case, device: None, lambda case: None)


def _merged() -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        layer = _adapted(case, inputs, inputs.weight.clone(), "auto", "auto")
        layer.merge(keep_base=False)
        return Layer(layer, {})

    def unavailable(case: Case, device: torch.device) -> str | None:
        return "a merged layer has no dropout" if case.dropout_p > 0.0 else None

    return Contender(
        "merged", "dense", build, unavailable, lambda case: replace(case, plan="composed")
    )


def _pera(name: str, backend: str, plan: str, capturable: bool = True) -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        layer = _adapted(case, inputs, inputs.weight, backend, plan)
        trains: dict[str, torch.Tensor] = {"dA": layer.pera_A, "dB": layer.pera_B}
        if layer.pera_h is not None:
            trains["dh"] = layer.pera_h
        return Layer(layer, trains)

    def unavailable(case: Case, device: torch.device) -> str | None:
        if plan == "composed" and case.dropout_p > 0.0:
            return "the composed plan takes no dropout"
        if backend == "triton" and device.type == "cpu":
            return "its kernels need a GPU; interpreted kernels are never timed"
        return backends.unavailable(backend, device, (case.dtype, case.factor_dtype))

    def left_out(case: Case) -> str | None:
        if plan == "composed" and case.dtype.itemsize < 4:
            return f"it rounds W0 + ΔW to {case.dtype}; --only {name} times it all the same"
        return None

    return Contender(
        name,
        plan,
        build,
        unavailable,
        lambda case: replace(case, plan=plan),
        left_out,
        capturable,
    )


CONTENDERS: tuple[Contender, ...] = (
    _frozen(),
    _merged(),
    # The reference makes its index table on the host in every call.
    _pera("reference", "reference", "factored", capturable=False),
    _pera("torch", "torch", "factored"),
    _pera("torch-composed", "torch", "composed"),
    _pera("triton", "triton", "factored"),
    _pera("triton-composed", "triton", "composed"),
)


def select(
    case: Case, device: torch.device, only: tuple[str, ...] | None
) -> tuple[list[Contender], dict[str, str]]:
    """Who is timed, and why others who were meant are not. The frozen layer always is."""
    chosen, reasons = [], {}
    for contender in CONTENDERS:
        if only is not None and contender.name not in (FROZEN, *only):
            continue
        reason = contender.unavailable(case, device)
        if reason is None and only is None:
            reason = contender.left_out(case)
        if reason is None:
            chosen.append(contender)
        else:
            reasons[contender.name] = reason
    return chosen, reasons


def find(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)


def outputs(layer: Layer, case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of what the layer trains; the seed chooses the dropout mask."""
    x = inputs.x.detach().clone().requires_grad_()
    leaves = {"dx": x, **layer.trains}
    torch.manual_seed(case.seed)
    y = layer.module(x)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@dataclass(frozen=True)
class _Draw:
    case: Case
    inputs: Inputs
    reference: dict[str, torch.Tensor]
    truth: dict[str, torch.Tensor]


class Gate:
    """The numeric rule on the very layers that are timed, at the very sizes.

    It is ``tools.numerics.check`` for any contender: same inputs, same draws, same verdicts. What
    a case must give is computed once for all its contenders.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._draws: dict[Case, list[_Draw]] = {}

    def _expected(self, case: Case) -> list[_Draw]:
        if case not in self._draws:
            self._draws[case] = []
            for number in range(draws(case)):
                drawn = replace(case, seed=case.seed + 1000 * number)
                inputs = make_inputs(drawn, self.device)
                reference = run(drawn, inputs, "reference")
                truth = run(drawn, inputs, "reference", exact=True)
                self._draws[case].append(_Draw(drawn, inputs, reference, truth))
        return self._draws[case]

    def failure(self, contender: Contender, case: Case) -> str | None:
        """Why the contender may not be timed; None if it may. An exception is a failure too."""
        judged = contender.judged_as(case)
        if judged is None:
            return None
        expected = self._expected(judged)
        try:
            got = []
            for draw in expected:
                layer = contender.build(draw.case, draw.inputs)
                got.append(outputs(layer, draw.case, draw.inputs))
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        absent = set(expected[0].truth) - set(got[0])
        if layer.trains and absent:
            return f"no {', '.join(sorted(absent))}"
        verdicts = [
            judge(
                name,
                torch.stack([values[name] for values in got]),
                torch.stack([draw.reference[name] for draw in expected]),
                torch.stack([draw.truth[name] for draw in expected]),
                case.dtype,
            )
            for name in got[0]
        ]
        return "; ".join(str(v) for v in verdicts if not v.passed) or None
