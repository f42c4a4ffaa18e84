"""``merge``: an adapter file added to the weights of a plain transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.checkpoint import AdapterFile
from ..adapters.load import places_of_others
from ..adapters.merge import refuse_shared
from ..checks import FLOATING
from ..functional import exact_delta_weight
from ..linear import is_plain_linear, unobserved
from ..operands import Factors
from .tables import progress

__all__ = ["add_to"]


def add_to(model: nn.Module, read: AdapterFile) -> None:
    """Copy what the file holds beside its adapters into ``model``, and add every ΔW, formed in
    float32, to its weight, which is rounded once.

    Raises:
        TypeError, ValueError: the file does not fit the model, a weight is not dense or is shared,
            or a result is not finite. The model is to be thrown away then.
    """
    weights = _weights(model, read)
    others = places_of_others(model, read)
    if others.unexpected or others.misshapen:
        wrong = ", ".join(others.unexpected + others.misshapen)
        raise ValueError(_misfit(read, model, f"the model has no parameter {wrong}"))
    for _, tensor in others.pairs:
        _check_finite("what trained beside the adapters", tensor)
    others.write()
    with torch.no_grad():
        for name, own in progress(list(read.tensors.items()), "merging"):
            weight, transposed = weights[name]
            options = read.options[name]
            delta = exact_delta_weight(
                Factors(own["pera_A"], own["pera_B"], own.get("pera_h")),
                scale=options["alpha"] / options["r"],
                terms=options["terms"],
                like=weight,
            )
            merged = ((delta.t() if transposed else delta) + weight).to(weight.dtype)
            _check_finite(f"{name}.weight", merged)
            weight.copy_(merged)


def _weights(model: nn.Module, read: AdapterFile) -> dict[str, tuple[torch.Tensor, bool]]:
    """The weight of every module in the file, and whether it is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[torch.Tensor, bool]] = {}
    for name, own in read.tensors.items():
        layer: Any = modules.get(name)
        if layer is None:
            raise ValueError(_misfit(read, model, f"the model has no module {name!r}"))
        transposed = type(layer) is Conv1D and unobserved(layer)
        weight = getattr(layer, "weight", None)
        if not (transposed or is_plain_linear(layer)) or not (
            type(weight) is nn.Parameter and weight.dtype in FLOATING
        ):
            raise TypeError(
                f"{name} must be a plain dense nn.Linear or Conv1D to merge into; it is a "
                f"{type(layer).__name__} with a weight of type {type(weight).__name__}"
            )
        has = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
        wants = (own["pera_B"].shape[0], own["pera_A"].shape[1])
        if has != wants:
            raise ValueError(
                _misfit(read, model, f"{name} is {has} (out, in), its adapter is for {wants}")
            )
        found[name] = weight, transposed
    refuse_shared(model, {f"{name}.weight": weight for name, (weight, _) in found.items()})
    return found


def _misfit(read: AdapterFile, model: nn.Module, reason: str) -> str:
    return f"the adapter in {read.path} does not fit this {type(model).__name__}: {reason}"


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name}: merging would make {count} of {tensor.numel()} values infinite or NaN"
        )
