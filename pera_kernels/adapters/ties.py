"""Weights that several modules hold: to change one for a layer changes it for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from ..memory import Span, Tie, overlap, span_of
from ..sharded import in_memory

__all__ = ["refuse_shared", "ties"]


def ties(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, list[Tie]]:
    """The other parameters and buffers of ``model`` in the memory of ``weights``, by name."""
    spans: dict[str, Span] = {}
    by_storage: defaultdict[int, list[tuple[Span, Tie]]] = defaultdict(list)
    # A module that stands under two names is one module, and one name of it counts.
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        for path, module in model.named_modules():
            for part, _ in kind(module, recurse=False, remove_duplicate=False):
                name = f"{path}.{part}" if path else part
                if (span := span_of(in_memory(module, part))) is not None:
                    by_storage[span.storage].append((span, Tie(module, part, name)))
                    spans[name] = span
    found = {}
    for name, weight in weights.items():
        span = spans.get(name) or span_of(weight)
        held = [] if span is None else by_storage[span.storage]
        others = [tie for other, tie in held if overlap(span, other) and tie.name != name]
        if others:
            found[name] = others
    return found


def refuse_shared(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise if another parameter or buffer of ``model`` lies in the memory of one of ``weights``:
    to change it would change both.
    """
    found = ties(model, weights)
    if found:
        told = [f"{name} is also {', '.join(t.name for t in own)}" for name, own in found.items()]
        raise ValueError(
            "merging would change other modules, because weights are shared: "
            f"{'; '.join(told)}. Untie them first"
        )
