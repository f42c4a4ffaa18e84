"""Put adapters into a model, and find them and their parameters again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..module import AdapterOptions, PeraLinear
from ..terms import Terms
from . import shared_inputs as sharing
from .shared_inputs import SHARED_INPUTS

ModelT = TypeVar("ModelT", bound=nn.Module)

__all__ = ["adapted_modules", "adapter_parameters", "inject"]


def _matches(name: str, targets: Sequence[str] | re.Pattern[str]) -> bool:
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _check_targets(target_modules: Sequence[str] | str) -> Sequence[str] | re.Pattern[str]:
    if isinstance(target_modules, str):
        try:
            return re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                "target_modules must be a regular expression or a list of names; "
                f"{target_modules!r} does not compile: {error}"
            ) from error
    names = list(target_modules) if isinstance(target_modules, (list, tuple, set)) else None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            "target_modules must be a non-empty list of module names or one regular expression; "
            f"got {target_modules!r}"
        )
    return names


def _is_linear_like(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features"))


def _targets(
    model: nn.Module, wanted: Sequence[str] | re.Pattern[str]
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, parent, layer) of every module to replace; nothing is changed yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, layer in modules.items():
        if not name or not _matches(name, wanted):
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(layer, PeraLinear):
            raise ValueError(f"{name} is a PeraLinear already; each layer takes one adapter")
        if not _is_linear_like(layer):
            if isinstance(wanted, re.Pattern):
                continue
            raise ValueError(
                f"{name} is a {type(layer).__name__}, not a linear layer: an adapter needs "
                "in_features and out_features"
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its weight without "
                "calling it: an adapter there would be ignored"
            )
        found.append((name, parent, layer))
    return found


def inject(
    model: ModelT,
    target_modules: Sequence[str] | str,
    r: int = 16,
    *,
    alpha: float | None = None,
    terms: Terms = "full",
    dropout: float = 0.0,
    init: str = "kaiming",
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
    plan: str = "auto",
    shared_inputs: Sequence[Sequence[str]] = SHARED_INPUTS,
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`PeraLinear` in place and freeze everything
    else.

    Args:
        target_modules: a list of names, each matching whole trailing segments of a module's path
            (``"v_proj"`` matches ``layers.0.attn.v_proj``, not ``my_v_proj``), or a string: a
            regular expression that must match a whole path; it passes over modules that are not
            linear.
        r, alpha, terms, dropout, init, adapter_dtype, backend, plan: see :class:`PeraLinear`.
        shared_inputs: names of children of one module that it calls on the same tensor, by groups;
            they are computed together (see :func:`pera_kernels.shared_inputs`); ``()`` for none.

    Returns:
        The same model. Adapters that were there before stay as they are, and trainable.

    Raises:
        TypeError, ValueError: an option that does not fit, nothing matches, or a match cannot be
            adapted; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    wanted = _check_targets(target_modules)
    groups = sharing.check_shared_inputs(shared_inputs)
    options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan)
    found = _targets(model, wanted)
    if not found:
        linear = [n for n, m in model.named_modules() if n and _is_linear_like(m)]
        shown = ", ".join(linear[:8]) + (", ..." if len(linear) > 8 else "")
        raise ValueError(
            f"target_modules={target_modules!r} matches no module of {type(model).__name__}; "
            f"its linear layers are: {shown or 'none'}"
        )
    adopt(model, found, dict.fromkeys((name for name, _, _ in found), options), groups)
    return model


def named_places(
    model: nn.Module, layers: Iterable[nn.Module]
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, parent, layer) of every place in ``model`` where one of ``layers`` stands."""
    wanted = {id(layer) for layer in layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        (name, modules[name.rpartition(".")[0]], layer)
        for name, layer in modules.items()
        if name and id(layer) in wanted
    ]


def adopt(
    model: nn.Module,
    places: Sequence[tuple[str, nn.Module, nn.Module]],
    options: Mapping[str, AdapterOptions],
    groups: Sequence[tuple[str, ...]] = SHARED_INPUTS,
) -> None:
    """Put adapters with these options, which are by name, in these places and freeze everything
    else. If one cannot be made, nothing is changed.
    """
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    # A layer that stands under two names keeps doing so: one adapter for both.
    adapted: dict[nn.Module, PeraLinear] = {}
    try:
        for name, _, layer in places:
            if layer not in adapted and name in options:
                adapted[layer] = PeraLinear.adapting(layer, options[name])
    except BaseException:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    keep = {id(p) for p in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in keep:
            parameter.requires_grad_(False)
    for name, parent, layer in places:
        setattr(parent, name.rpartition(".")[2], adapted[layer])
    sharing.shared_inputs(model, groups)


def adapted_modules(model: nn.Module) -> dict[str, PeraLinear]:
    """The model's :class:`PeraLinear` layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PeraLinear)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every adapter's A, B and h, each once."""
    for layer in adapted_modules(model).values():
        yield layer.pera_A
        yield layer.pera_B
        if layer.pera_h is not None:
            yield layer.pera_h
