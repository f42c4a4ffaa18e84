"""Who competes: the frozen layer, our reference, backends and plans, and the peers."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels import backends
from pera_kernels.terms import Terms
from pera_kernels.verify.numerics import Case, Inputs

from .layers import FROZEN, Contender, Layer, frozen_linear
from .peers import PEERS

__all__ = ["CONTENDERS", "FROZEN", "Contender", "Layer", "find", "select"]


def _adapted(
    case: Case, inputs: Inputs, weight: torch.Tensor, backend: str, plan: str
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
    )
    with torch.no_grad():
        layer.pera_A.copy_(inputs.A)
        layer.pera_B.copy_(inputs.B)
        if layer.pera_h is not None and inputs.h is not None:
            layer.pera_h.copy_(inputs.h)
    return layer


def _frozen() -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        return Layer(frozen_linear(inputs.weight, inputs.bias), {})

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
        if backend == "auto":
            return None
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
        # "auto" may choose a plan only where it is as accurate as "factored".
        lambda case: replace(case, plan="composed" if plan == "composed" else "factored"),
        left_out,
        capturable,
    )


class CompiledReference(nn.Module):
    """The reference under ``torch.compile``: one graph for every layer of the same settings."""

    def __init__(self, layer: pk.PeraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.layer
        dropout_p = own.dropout if self.training else 0.0
        call = _compiled_reference(own.scale, own.terms, dropout_p)
        return call(x, own.weight, own.pera_A, own.pera_B, own.pera_h, own.bias)


@functools.cache
def _compiled_reference(
    scale: float, terms: Terms, dropout_p: float
) -> Callable[..., torch.Tensor]:
    return torch.compile(
        functools.partial(
            pk.pera_linear, scale=scale, terms=terms, dropout_p=dropout_p, backend="reference"
        ),
        fullgraph=True,
        dynamic=False,
    )


def _reference_compiled() -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        plain = find("reference").build(case, inputs)
        assert isinstance(plain.module, pk.PeraLinear)
        return Layer(CompiledReference(plain.module), plain.trains)

    def unavailable(case: Case, device: torch.device) -> str | None:
        if device.type == "cpu" and not _cpp_compiler():
            return "torch.compile needs a C++ compiler for the CPU"
        return None

    return Contender(
        "reference-compiled",
        "factored",
        build,
        unavailable,
        # Compiled code draws random numbers of its own, so it is judged without dropout.
        lambda case: replace(case, dropout_p=0.0),
        # Like the reference it copies its index table from the host in every call.
        capturable=False,
        # Compiled code frees or overwrites what its forward kept.
        repeats_backward=False,
    )


def _cpp_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return any(shutil.which(name) for name in names if name)


CONTENDERS: tuple[Contender, ...] = (
    _frozen(),
    _merged(),
    # The reference makes its index table on the host in every call.
    _pera("reference", "reference", "factored", capturable=False),
    _reference_compiled(),
    *PEERS,
    # What a user gets without asking for anything.
    _pera("auto", "auto", "auto"),
    _pera("torch", "torch", "factored"),
    _pera("torch-composed", "torch", "composed"),
    _pera("triton", "triton", "factored"),
    _pera("triton-composed", "triton", "composed"),
)


def select(
    case: Case,
    device: torch.device,
    only: tuple[str, ...] | None,
    without: tuple[str, ...] = (),
) -> tuple[list[Contender], dict[str, str]]:
    """Who is timed, and why others who were meant are not. The frozen layer always is.

    ``without`` are those that the preset leaves out of this case, unless they are asked for.
    """
    chosen, reasons = [], {}
    for contender in CONTENDERS:
        if only is not None and contender.name not in (FROZEN, *only):
            continue
        reason = contender.unavailable(case, device)
        if reason is None and only is None:
            reason = contender.left_out(case)
            if contender.name in without:
                reason = "the preset leaves it out of this case"
        if reason is None:
            chosen.append(contender)
        else:
            reasons[contender.name] = reason
    return chosen, reasons


def find(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)
