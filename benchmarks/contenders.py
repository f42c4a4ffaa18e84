"""What a contender is, and ours: the frozen layer, the merged one, the backends, the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.kernels import interpreting
from pera_kernels.testing import Case, Inputs

__all__ = ["FROZEN", "OURS", "Contender", "Layer", "frozen_linear"]

FROZEN = "frozen"


@dataclass(frozen=True)
class Layer:
    """A module and the tensors that it trains, named by their gradient: dA, dB, dh."""

    module: nn.Module
    trains: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    ``plan`` names its work in roofline.py. ``allowed`` is the largest error ratio that passes the
    gate: 1 is the numeric rule. A layer that copies from the host or synchronises in a call is not
    ``capturable`` in a CUDA graph. One whose backward runs only once for a forward does not
    ``repeats_backward``: that phase is not timed.
    """

    name: str
    plan: str = "factored"
    allowed: float = 1.0
    capturable: bool = True
    repeats_backward: bool = True

    def build(self, case: Case, inputs: Inputs) -> Layer:
        """The layer on these inputs, whose tensors it may share but not change."""
        raise NotImplementedError

    def judged_as(self, case: Case) -> Case | None:
        """The case whose plain reference it must match; None where there is nothing to match."""
        return case

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot run this case on this device; None if it can."""
        return None


def frozen_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` that shares these and trains neither."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _pera_layer(
    case: Case, inputs: Inputs, weight: torch.Tensor, backend: str = "auto", plan: str = "auto"
) -> pk.PeraLinear:
    layer = pk.PeraLinear.from_linear(
        frozen_linear(weight, inputs.bias),
        case.r,
        alpha=case.scale * case.r,
        terms=case.terms,
        dropout=case.dropout_p,
        adapter_dtype=case.factor_dtype,
        backend=backend,
        plan=plan,
        keep=case.keep,
    )
    with torch.no_grad():
        layer.pera_A.copy_(inputs.A)
        layer.pera_B.copy_(inputs.B)
        if layer.pera_h is not None and inputs.h is not None:
            layer.pera_h.copy_(inputs.h)
    return layer


class Frozen(Contender):
    """The ``nn.Linear`` alone, y and dx: what all others are compared with."""

    def build(self, case: Case, inputs: Inputs) -> Layer:
        return Layer(frozen_linear(inputs.weight, inputs.bias), {})

    def judged_as(self, case: Case) -> None:
        return None


class Merged(Contender):
    """A ``PeraLinear`` after ``merge()``."""

    def build(self, case: Case, inputs: Inputs) -> Layer:
        layer = _pera_layer(case, inputs, inputs.weight.clone())
        layer.merge(keep_base=False)
        return Layer(layer, {})

    def judged_as(self, case: Case) -> Case:
        return replace(case, plan="composed")

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        return "a merged layer has no dropout" if case.dropout_p > 0.0 else None


@dataclass(frozen=True)
class Pera(Contender):
    """A ``PeraLinear`` of one backend and plan; "auto" is what a user gets without asking."""

    backend: str = "auto"

    def build(self, case: Case, inputs: Inputs) -> Layer:
        layer = _pera_layer(case, inputs, inputs.weight, self.backend, self.plan)
        named = {"dA": layer.pera_A, "dB": layer.pera_B, "dh": layer.pera_h}
        return Layer(layer, {name: t for name, t in named.items() if t is not None})

    def judged_as(self, case: Case) -> Case:
        # "auto" may choose a plan only where it is as accurate as "factored".
        return replace(case, plan="composed" if self.plan == "composed" else "factored")

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        if self.plan == "composed" and case.dropout_p > 0.0:
            return "the composed plan takes no dropout"
        if self.backend == "triton" and device.type == "cpu" and not interpreting():
            return "its kernels need a GPU"
        return None


class CompiledReference(Pera):
    """The plain reference under ``torch.compile``, compiled for every case."""

    def build(self, case: Case, inputs: Inputs) -> Layer:
        layer = super().build(case, inputs)
        module = torch.compile(layer.module, fullgraph=True, dynamic=False)
        assert isinstance(module, nn.Module)
        return Layer(module, layer.trains)

    def judged_as(self, case: Case) -> Case:
        # Compiled code draws random numbers of its own, so it is judged without dropout.
        return replace(case, dropout_p=0.0)


OURS: tuple[Contender, ...] = (
    Frozen(FROZEN, plan="dense"),
    Merged("merged", plan="dense"),
    # The reference makes its index table on the host in every call.
    Pera("reference", backend="reference", capturable=False),
    # Compiled code frees or overwrites what its forward kept.
    CompiledReference(
        "reference-compiled", backend="reference", capturable=False, repeats_backward=False
    ),
    Pera("auto", plan="auto"),
    Pera("torch", backend="torch"),
    Pera("torch-composed", plan="composed", backend="torch"),
    Pera("triton", backend="triton"),
    Pera("triton-composed", plan="composed", backend="triton"),
)
