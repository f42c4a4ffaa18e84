"""Put adapters into a model, and find them and their parameters again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import nn

from .groups import group_projections
from .module import PeraLinear, check_adapter_options
from .terms import Terms

ModelT = TypeVar("ModelT", bound=nn.Module)

__all__ = ["adapted_modules", "adapter_parameters", "inject", "parameter_groups"]


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
    group: bool = True,
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`PeraLinear` in place and freeze everything
    else.

    Args:
        target_modules: a list of names, each matching whole trailing segments of a module's path
            (``"v_proj"`` matches ``layers.0.attn.v_proj``, not ``my_v_proj``), or a string: a
            regular expression that must match a whole path; it passes over modules that are not
            linear.
        r, alpha, terms, dropout, init, adapter_dtype, backend, plan: see :class:`PeraLinear`.
        group: evaluate projections together that surely share their input (see
            :func:`group_projections`).

    Returns:
        The same model. Adapters that were there before stay as they are, and trainable.

    Raises:
        TypeError, ValueError: an option that does not fit, nothing matches, or a match cannot be
            adapted; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    wanted = _check_targets(target_modules)
    check_adapter_options(r, alpha, terms, dropout, init, adapter_dtype, backend, plan)
    found = _targets(model, wanted)
    if not found:
        linear = [n for n, m in model.named_modules() if n and _is_linear_like(m)]
        shown = ", ".join(linear[:8]) + (", ..." if len(linear) > 8 else "")
        raise ValueError(
            f"target_modules={target_modules!r} matches no module of {type(model).__name__}; "
            f"its linear layers are: {shown or 'none'}"
        )
    options: dict[str, Any] = {
        "alpha": alpha,
        "terms": terms,
        "dropout": dropout,
        "init": init,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
        "plan": plan,
    }
    adopt(model, found, {name: {"r": r, **options} for name, _, _ in found}, group)
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
    options: Mapping[str, Mapping[str, Any]],
    group: bool = True,
) -> None:
    """Put adapters with the ``options`` of :meth:`PeraLinear.from_linear`, which are by name, in
    these places and freeze everything else. If one cannot be made, nothing is changed.
    """
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    # A layer that stands under two names keeps doing so: one adapter for both.
    adapted: dict[nn.Module, PeraLinear] = {}
    try:
        for name, _, layer in places:
            if layer not in adapted and name in options:
                adapted[layer] = PeraLinear.from_linear(layer, **options[name])
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
    if group:
        group_projections(model)


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


def check_rate(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0; got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")


def parameter_groups(
    model: nn.Module, lr: float, *, lr_h: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim``: the factors, and the coefficients h at their own rate.

    A product of two factor entries is small at the usual initialisation (about 1 / (3 N)), so an
    ``h`` that moves at the rate of the factors leaves the quadratic part invisible: rates 100 to
    1000 times ``lr`` are worth trying, with :meth:`PeraLinear.quadratic_share` as the gauge.

    Args:
        lr: rate of A, B and of any other trainable parameter of the model (in a group of its own).
        lr_h: rate of h; None means ``lr``.
        weight_decay: of every group but that of h, which is never decayed.

    Returns:
        Groups with ``"name"`` "factors", "coefficients" and "other", those that are not empty.

    Raises:
        ValueError: a rate that is negative or not finite, or a model without a trainable adapter.
    """
    check_rate("lr", lr)
    check_rate("weight_decay", weight_decay)
    if lr_h is not None:
        check_rate("lr_h", lr_h)
    layers = adapted_modules(model).values()
    factors = [p for m in layers for p in (m.pera_A, m.pera_B)]
    hs = [m.pera_h for m in layers if m.pera_h is not None]
    return grouped(model, factors, hs, lr, lr if lr_h is None else lr_h, weight_decay)


def grouped(
    model: nn.Module,
    factors: Sequence[nn.Parameter],
    hs: Sequence[nn.Parameter],
    lr: float,
    lr_h: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups` from the adapters' parameters, those that train.

    Raises:
        ValueError: none of them does.
    """
    adapter = {id(p) for p in (*factors, *hs)}
    factors = [p for p in factors if p.requires_grad]
    hs = [p for p in hs if p.requires_grad]
    if not factors and not hs:
        raise ValueError(
            f"model has no trainable adapter: call inject first; got {type(model).__name__}"
        )
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in adapter]
    groups: list[dict[str, Any]] = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {"name": "coefficients", "params": hs, "lr": lr_h, "weight_decay": 0.0},
        {"name": "other", "params": other, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
