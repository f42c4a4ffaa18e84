"""Parameter groups of a PEFT model, for the coefficients' own learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from pera_kernels.adapters.optimizer import Trained, grouped, rms_A

from .layer import PeraLayer

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_h: float | None = None,
    eps: float | None = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """:func:`pera_kernels.parameter_groups` for a model with PEFT's PERA layers.

        groups = parameter_groups(model, 1e-4)  # weight_decay= here, not in TrainingArguments
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
    adapters = [
        Trained(
            [layer.pera_A[name], layer.pera_B[name]],
            layer.pera_h[name] if name in layer.pera_h else None,
            rms_A(layer.init[name], layer.r[name], layer.in_features),
        )
        for layer in layers
        for name in layer.pera_A
    ]
    if not any(p.requires_grad for own in adapters for p in (*own.factors, own.h) if p is not None):
        raise ValueError(
            "model has no trainable adapter, for all its PERA adapters are frozen: an adapter that "
            "is loaded trains with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return grouped(model, adapters, lr, lr_h, eps, weight_decay)
