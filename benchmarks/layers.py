"""What a contender is: a name, a plan, and a way to build the layer that is judged and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pera_kernels.verify.numerics import Case, Inputs

__all__ = ["FROZEN", "Contender", "Layer", "frozen_linear"]

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
    None for the frozen layer, which has nothing to match. ``allowed`` is the largest error ratio
    that passes: 1 is the numeric rule. A layer that copies from the host or synchronises on every
    call is not ``capturable`` in a CUDA graph, and one whose backward runs only once for a forward
    does not ``repeats_backward``: that phase is not timed.
    """

    name: str
    plan: str
    build: Callable[[Case, Inputs], Layer]
    unavailable: Callable[[Case, torch.device], str | None]
    judged_as: Callable[[Case], Case | None]
    left_out: Callable[[Case], str | None] = _always
    capturable: bool = True
    repeats_backward: bool = True
    allowed: float = 1.0


def frozen_linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """An ``nn.Linear`` that shares these and trains neither."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
