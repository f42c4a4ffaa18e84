"""Put what a file holds into a model: into new adapters, or into those that it has."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from ..checks import FLOATING, check_model, naming, some
from ..linear import features
from ..module import PARTS, AdapterOptions, PeraLinear
from ..sharded import shape_of, write
from .checkpoint import AdapterFile, digest_of, read_adapter, refuse_listed, tensor_name, unwrapped
from .inject import adapted_modules, adopt, base_name, named_places, refuse_parallel
from .merge import unload
from .ranks import together
from .trained import Places

__all__ = ["Incompatible", "load_adapter", "place", "places_of_others"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class Incompatible(NamedTuple):
    """Keys of the model that the file has not, and of the file that the model has not."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_adapter(
    model: ModelT,
    folder: str | os.PathLike[str],
    strict: bool = True,
    *,
    overwrite: bool = False,
    backend: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> Incompatible:
    """Put the adapter in ``folder`` into ``model``, in place, and whatever else the folder holds.

    A plain model gets the adapters that the checkpoint has, of the ranks that its tensors have, as
    by :func:`pera_kernels.inject`. A model with adapters has them filled: terms and shapes must
    agree, and alpha becomes that of the checkpoint. Other parameters that trained (a head) are
    written to those of the same name, which train from then on.

    Args:
        strict: raise if the model or the checkpoint has adapters that the other has not; else these
            are left alone and returned. Tensors of another shape are refused in any case.
        overwrite: fill adapters that hold something already (B is not zero).
        backend, adapter_dtype: of the layers that are made; see :class:`PeraLinear`. A checkpoint
            in half precision is promoted to float32 unless ``adapter_dtype`` says otherwise.

    Returns:
        ``(missing_keys, unexpected_keys)``: adapters' tensors of the model that the checkpoint has
        not, and the other way round.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_adapter`; or the checkpoint does not fit the
            model: what is missing, unexpected or of another shape is listed. The model is
            unchanged.
    """
    check_model(model)
    with together(model, "load_adapter") as group:
        with group.failing_together():
            read = read_adapter(folder)
        group.refuse_different("the files", digest_of(read))
        return place(model, read, strict, overwrite, backend, adapter_dtype)


def place(
    model: nn.Module,
    adapter: AdapterFile,
    strict: bool,
    overwrite: bool,
    backend: str,
    adapter_dtype: torch.dtype | None = None,
) -> Incompatible:
    """:func:`load_adapter` of what was read."""
    inner = unwrapped(model)
    if not adapted_modules(inner):
        refuse_parallel(model)
        return _inject(inner, adapter, strict, backend, adapter_dtype)
    if adapter_dtype is not None:
        raise ValueError(
            f"adapter_dtype goes with a model without adapters; got {adapter_dtype} for one whose "
            "adapters have their dtype already"
        )
    return _fill(inner, adapter, strict, overwrite)


def places_of_others(model: nn.Module, adapter: AdapterFile) -> Places:
    """Where what trained beside the adapters goes in a model."""
    of_peft = adapter.config.get("peft_type") is not None
    return Places(model, adapter.parameters, adapter.frozen, of_peft)


def _keys(adapter: AdapterFile, names: list[str]) -> list[str]:
    return [
        tensor_name(name, part) for name in names for part in PARTS if part in adapter.tensors[name]
    ]


def _inject(
    model: nn.Module,
    adapter: AdapterFile,
    strict: bool,
    backend: str,
    adapter_dtype: torch.dtype | None,
) -> Incompatible:
    # Of a wrapper and what it wraps, which have one name, the inner one comes last.
    modules = {base_name(n): m for n, m in model.named_modules(remove_duplicate=False)}
    unexpected = [name for name in adapter.tensors if not name or name not in modules]
    misshapen = []
    for name, own in adapter.tensors.items():
        layer = modules.get(name)
        if name in unexpected or layer is None:
            continue
        has = features(layer)
        wants = (own["pera_A"].shape[1], own["pera_B"].shape[0])
        if has != wants:
            kind = type(layer).__name__
            misshapen.append(f"{name} (adapter of {wants}, {kind} of {has})")
    fitting = [name for name in adapter.tensors if name not in unexpected]
    others = places_of_others(model, adapter)
    misshapen += others.misshapen
    if misshapen or (strict and (unexpected or others.unexpected)) or not fitting:
        refuse_listed(
            f"the adapter in {adapter.path} does not fit this {type(model).__name__}",
            {
                "modules that the model lacks": unexpected,
                "parameters that the model lacks": others.unexpected,
                "of another shape (in, out)": misshapen,
            },
        )
    options = {}
    for name in fitting:
        stored = adapter.tensors[name]["pera_A"].dtype
        dtype = adapter_dtype or _adapter_dtype(modules[name], stored)
        options[modules[name]] = AdapterOptions(
            **adapter.options[name], adapter_dtype=dtype, backend=backend
        )
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    adapted = adopt(model, named_places(model, options), options)
    try:
        for name in fitting:
            for part, tensor in adapter.tensors[name].items():
                write(adapted[modules[name]], part, tensor)
        others.write()
    except BaseException:
        unload(model, merge=False)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    return Incompatible([], _keys(adapter, unexpected) + others.unexpected)


def _adapter_dtype(layer: nn.Module, stored: torch.dtype) -> torch.dtype:
    """At least float32; float64 goes with float64 only."""
    weight = getattr(layer, "weight", None)
    own = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
    if torch.float64 in (own, stored) and own in FLOATING:
        return torch.promote_types(own, torch.float32)
    return torch.promote_types(stored, torch.float32)


def _fill(model: nn.Module, adapter: AdapterFile, strict: bool, overwrite: bool) -> Incompatible:
    layers = {base_name(name): layer for name, layer in adapted_modules(model).items()}
    missing = [name for name in layers if name not in adapter.tensors]
    unexpected = [name for name in adapter.tensors if name not in layers]
    both = [name for name in layers if name in adapter.tensors]
    misshapen = []
    for name in both:
        layer, own = layers[name], adapter.tensors[name]
        if layer.terms != adapter.options[name]["terms"]:
            misshapen.append(
                f"{name} (terms {adapter.options[name]['terms']!r} for a layer of {layer.terms!r})"
            )
            continue
        for part, tensor in own.items():
            if getattr(layer, part) is not None and layer._parameters.get(part) is None:
                misshapen.append(
                    f"{tensor_name(name, part)} (computed from other tensors in this model)"
                )
                continue
            has = shape_of(getattr(layer, part)) if getattr(layer, part) is not None else None
            if has != tuple(tensor.shape):
                misshapen.append(f"{tensor_name(name, part)} ({tuple(tensor.shape)} for {has})")
    missing_keys = [
        tensor_name(n, part)
        for n in missing
        for part in PARTS
        if getattr(layers[n], part) is not None
    ]
    others = places_of_others(model, adapter)
    misshapen += others.misshapen
    unexpected_keys = _keys(adapter, unexpected) + others.unexpected
    unexpected += others.unexpected
    if others.missing and adapter.config.get("format_version") == 1:
        # Such files hold adapters alone.
        warnings.warn(
            f"{adapter.path} holds adapters alone; {some(others.missing)} of this model, which "
            "train, stay as they are",
            stacklevel=4,
        )
    else:
        missing_keys += others.missing
        missing += others.missing
    if misshapen or (strict and (missing or unexpected)) or not both:
        refuse_listed(
            f"the adapter in {adapter.path} does not fit the adapters of this "
            f"{type(model).__name__}",
            {
                "missing in the file": missing_keys,
                "unexpected": unexpected_keys,
                "of another shape": misshapen,
            },
        )
    held = [name for name in both if not overwrite and bool(layers[name].whole_factors().B.any())]
    if held:
        refuse_listed(
            "the model's adapters hold something already; load_adapter(..., overwrite=True) "
            "replaces it",
            {"adapters": held},
        )
    # Everything that can fail happens before the first change.
    for name in both:
        with naming(name):
            layers[name].check_unmergeable()
    moved = {name: _moved(layers[name], adapter.tensors[name]) for name in both}
    for name, own in moved.items():
        layers[name].unmerge()
        layers[name].alpha = float(adapter.options[name]["alpha"])
        layers[name].init = adapter.options[name].get("init", layers[name].init)
        for part, tensor in own.items():
            write(layers[name], part, tensor)
    others.write()
    return Incompatible(missing_keys, unexpected_keys)


def _moved(layer: PeraLinear, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as a layer holds its own; on the CPU where it is offloaded."""
    A = layer.pera_A
    return {
        part: tensor.to(tensor.device if A.is_meta else A.device, getattr(layer, part).dtype)
        for part, tensor in tensors.items()
    }
