"""Parameter groups for ``torch.optim``: the coefficients h learn at a rate of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..checks import check_rate
from ..module import quadratic_share
from ..terms import Terms
from .inject import require_adapters

__all__ = ["NEGLIGIBLE", "Trained", "grouped", "parameter_groups", "warn_of_idle_products"]

# A quadratic share under which an adapter is a LoRA.
NEGLIGIBLE = 0.01

# AdamW moves an entry by about lr a step. Over 75 to 1000 steps the entries of B were seen to grow
# to 4 to 13 lr, in longer runs slowly further: the table of rates in docs/ablation.md.
B_IN_RATES = 8.0
# With this part of the factors' step on normalised products, they were seen to end at a quarter to
# one and a half times the linear part: the same table.
PART = 0.1


class Trained(NamedTuple):
    """Parameters of one adapter, and the root mean square that its A starts with."""

    factors: list[nn.Parameter]
    h: nn.Parameter | None
    rms_A: float


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_h: float | None = None,
    eps: float | None = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW and its like, with a learning rate of their own for the h.

    A product of factor entries is far smaller than the entries, so an ``h`` that moves at ``lr``
    changes nothing. By default every layer's h moves as a coefficient of normalised products would
    at a tenth of ``lr``: h = q / (rms(A) β²), where β = 8 ``lr`` is what entries of B grow to.
    That is a rate of 0.1 ``lr`` / (rms(A) β²) for h. It was tried at several widths, ranks and
    lengths with ``lr`` near LoRA's best; at a quarter of that, B outgrows β, and the products BA
    (docs/choosing.md). :meth:`PeraLinear.quadratic_share` is the gauge; to change it, multiply
    ``group["lr"]`` of the groups named ``"coefficients"``.

    Args:
        lr: rate of A, B and of any other trainable parameter of the model (in a group of its own).
        lr_h: one rate for the h of all layers, in place of that rule.
        eps: the optimizer's, which the rule scales for h as it scales the rate: gradients of h can
            be below 1e-8, which would stop it. None leaves it out, for optimizers without a single
            ``eps`` (Adafactor).
        weight_decay: of every group but those of h, which is never decayed. It counts, not the
            optimizer's own.

    Returns:
        Groups with ``"name"`` "factors", "coefficients" (one for each rate) and "other", those that
        are not empty.

    Raises:
        ValueError: a rate that is negative or not finite, or a model without a trainable adapter.
    """
    layers = require_adapters(model, "train").values()
    adapters = [
        Trained(
            [layer.pera_A, layer.pera_B],
            layer.pera_h,
            rms_A(layer.init, layer.r, layer.in_features),
        )
        for layer in layers
    ]
    return grouped(model, adapters, lr, lr_h, eps, weight_decay)


def rms_A(init: object, r: int, in_features: int) -> float:
    """The root mean square of A's entries at initialisation (see :class:`PeraLinear`)."""
    return 1.0 / r if init == "gaussian" else (3.0 * in_features) ** -0.5


def grouped(
    model: nn.Module,
    adapters: Iterable[Trained],
    lr: float,
    lr_h: float | None,
    eps: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups`, of those parameters that train.

    Raises:
        TypeError, ValueError: a rate that does not fit, or none of the parameters trains.
    """
    given = {"lr": lr, "lr_h": lr_h, "eps": eps, "weight_decay": weight_decay}
    for name, rate in given.items():
        if rate is not None or name in ("lr", "weight_decay"):
            check_rate(name, rate)
    # A parameter that several layers share is in a group once.
    factors: dict[nn.Parameter, None] = {}
    coefficients: dict[nn.Parameter, dict[str, float]] = {}
    for adapter in adapters:
        factors.update(dict.fromkeys(p for p in adapter.factors if p.requires_grad))
        if adapter.h is not None and adapter.h.requires_grad:
            coefficients.setdefault(adapter.h, rates_of_h(lr, lr_h, eps, adapter.rms_A))
    if not factors and not coefficients:
        raise ValueError(
            f"model has no adapter that trains: all are frozen; got {type(model).__name__}"
        )
    adapter_parameters = {id(p) for p in (*factors, *coefficients)}
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in adapter_parameters]
    decayed = {"lr": lr, "weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"name": "factors", "params": list(factors), **decayed},
        *by_rate(coefficients),
        {"name": "other", "params": other, **decayed},
    ]
    return [group for group in groups if group["params"]]


def by_rate(coefficients: dict[nn.Parameter, dict[str, float]]) -> list[dict[str, Any]]:
    """One group for each rate that a layer's h has."""
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for h, rates in coefficients.items():
        empty = {"name": "coefficients", "params": [], **rates, "weight_decay": 0.0}
        groups.setdefault(tuple(rates.values()), empty)["params"].append(h)
    return list(groups.values())


def rates_of_h(lr: float, lr_h: float | None, eps: float | None, rms_A: float) -> dict[str, float]:
    """``lr`` and ``eps`` of one layer's h: AdamW's on q, where h = q / (rms(A) β²)."""
    if lr_h is not None:
        return {"lr": lr_h}
    # At lr = 0 nothing moves, whatever size is.
    size = rms_A * (B_IN_RATES * lr) ** 2 or 1.0
    rates = {"lr": PART * lr / size}
    return rates if eps is None else {**rates, "eps": eps * size}


def warn_of_idle_products(adapters: Iterable[tuple[Tensor, Tensor, Tensor, Terms]]) -> None:
    """Warn where the products of trained A, B, h, terms are next to nothing beside BA in all."""
    trained = [own for own in adapters if own[1].any()]
    # The first layer whose products count ends it.
    if trained and all(quadratic_share(*own) < NEGLIGIBLE for own in trained):
        warnings.warn(
            f"so far the products are less than {100 * NEGLIGIBLE:g} % of BA in every layer: the "
            "adapter is a LoRA. The coefficients h need a learning rate of their own, which "
            "parameter_groups(model, lr) of pera_kernels or of pera_kernels.peft gives to an "
            "optimizer",
            stacklevel=3,
        )
