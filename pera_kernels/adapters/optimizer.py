"""Parameter groups for ``torch.optim``: the coefficients h learn at a rate of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checks import check_rate
from .inject import require_adapters

__all__ = ["grouped", "parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, *, lr_h: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim``: the factors, and the coefficients h at their own rate.

    A product of two factor entries is small at the usual initialisation (about 1 / (3 N)), so an
    ``h`` that moves at the rate of the factors leaves the quadratic part invisible: rates 30 to 300
    times ``lr`` are worth trying, with :meth:`PeraLinear.quadratic_share` as the gauge.

    Args:
        lr: rate of A, B and of any other trainable parameter of the model (in a group of its own).
        lr_h: rate of h; None means ``lr``.
        weight_decay: of every group but that of h, which is never decayed.

    Returns:
        Groups with ``"name"`` "factors", "coefficients" and "other", those that are not empty.

    Raises:
        ValueError: a rate that is negative or not finite, or a model without a trainable adapter.
    """
    layers = require_adapters(model, "train").values()
    factors = [p for m in layers for p in (m.pera_A, m.pera_B)]
    hs = [m.pera_h for m in layers if m.pera_h is not None]
    return grouped(model, factors, hs, lr, lr_h, weight_decay)


def grouped(
    model: nn.Module,
    factors: Sequence[nn.Parameter],
    hs: Sequence[nn.Parameter],
    lr: float,
    lr_h: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups` from the adapters' parameters, those that train.

    Raises:
        TypeError, ValueError: a rate that does not fit, or none of the parameters trains.
    """
    lr_h = lr if lr_h is None else lr_h
    for name, rate in (("lr", lr), ("lr_h", lr_h), ("weight_decay", weight_decay)):
        check_rate(name, rate)
    adapter = {id(p) for p in (*factors, *hs)}
    # A parameter that several layers share is in a group once.
    factors = [p for p in dict.fromkeys(factors) if p.requires_grad]
    hs = [p for p in dict.fromkeys(hs) if p.requires_grad]
    if not factors and not hs:
        raise ValueError(
            f"model has no adapter that trains: all are frozen; got {type(model).__name__}"
        )
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in adapter]
    groups: list[dict[str, Any]] = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {"name": "coefficients", "params": hs, "lr": lr_h, "weight_decay": 0.0},
        {"name": "other", "params": other, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
