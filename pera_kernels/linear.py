"""What a linear layer is, and whether calling it is its formula and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from .checks import FLOATING

__all__ = ["features", "is_plain_linear", "unobserved"]


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear-like module; None of another. transformers' Conv1D, whose weight is
    (in, out), is one.
    """
    n, m = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        n, m = weight.shape
    return (n, m) if isinstance(n, int) and isinstance(m, int) else None


def is_plain_linear(layer: nn.Module) -> bool:
    """An ``nn.Linear`` whose forward is F.linear on floating-point parameters and nothing else."""
    if type(layer) is not nn.Linear or layer.weight.dtype not in FLOATING:
        return False
    # A subclass of Tensor may be quantized, or a shard.
    if type(layer.weight) is not nn.Parameter:
        return False
    return unobserved(layer)


def unobserved(layer: nn.Module) -> bool:
    """Whether calling the layer is its class's forward and nothing else: no hooks, no override."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return "forward" not in layer.__dict__ and not any(hooks)
