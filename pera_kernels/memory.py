"""Whether two tensors lie in the same memory, and who else holds a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .sharded import is_dtensor, is_partition

__all__ = ["Span", "Tie", "overlap", "refuse_tied", "span_of"]


class Span(NamedTuple):
    """The bytes of a storage that a tensor may touch."""

    storage: int
    first: int
    end: int


def span_of(tensor: Any) -> Span | None:
    """Where a tensor lies; None without memory of its own kind, that can be compared. A shard or a
    partition stands for itself.
    """
    if is_dtensor(tensor) or is_partition(tensor):
        return Span(id(tensor), 0, 1)
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return None
    if not tensor.numel() or tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(tensor.untyped_storage().data_ptr(), first, first + (int(last) + 1) * size)


def overlap(a: Span | None, b: Span | None) -> bool:
    """Whether a write to one may change the other."""
    if a is None or b is None:
        return False
    return a.storage == b.storage and a.first < b.end and b.first < a.end


class Tie(NamedTuple):
    """A parameter or buffer of another module that lies in the memory of a layer's weight."""

    module: nn.Module
    part: str
    name: str


def refuse_tied(weight: torch.Tensor, tied: Iterable[Tie]) -> None:
    """Raise if one of those that shared a weight when it was adapted still does."""
    spans = {tie.name: span_of(getattr(tie.module, tie.part, None)) for tie in tied}
    others = [name for name, span in spans.items() if overlap(span_of(weight), span)]
    if others:
        raise ValueError(
            f"merging would change {', '.join(others)} as well, because the weight is shared; "
            "untie it first"
        )
