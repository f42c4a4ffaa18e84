"""Parameter groups of a PEFT model, for the coefficients' own learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from pera_kernels.adapters.optimizer import grouped

from .layer import PeraLayer

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, *, lr_h: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """:func:`pera_kernels.parameter_groups` for a model with PEFT's PERA layers.

        groups = parameter_groups(model, 1e-4, lr_h=1e-2)
        Trainer(model, ..., optimizers=(torch.optim.AdamW(groups), None))

    Raises:
        ValueError: a rate that is negative or not finite, or a model without a PERA adapter that
            trains.
    """
    layers = [m for m in model.modules() if isinstance(m, PeraLayer)]
    if not layers:
        raise ValueError(
            f"model has no trainable adapter, for it has no PERA adapter at all: make one with "
            f"peft.get_peft_model(model, PeraConfig(...)); got {type(model).__name__}"
        )
    factors = [p for m in layers for own in (m.pera_A, m.pera_B) for p in own.values()]
    hs = [p for m in layers for p in m.pera_h.values()]
    if not any(p.requires_grad for p in (*factors, *hs)):
        raise ValueError(
            "model has no trainable adapter, for all its PERA adapters are frozen: an adapter that "
            "is loaded trains with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return grouped(model, factors, hs, lr, lr_h, weight_decay)
