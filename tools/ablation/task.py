"""What a task is: a frozen model, batches in a seed's order, and parts to choose and to test on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Batch", "Task"]

Batch = tuple[Tensor, ...]


class Task(ABC):
    """A frozen model and three parts of one text: to train on, to choose on, to test on."""

    name: str
    steps: int
    rates: tuple[float, ...]
    """Learning rates of A and B to choose from: the middle three, and outward from the best."""
    rates_of_full: tuple[float, ...]
    """The same for full fine-tuning."""
    targets: list[str] | str
    trained_beside: tuple[str, ...] = ()
    """Modules that train beside the adapters, in every method."""
    rate_beside: float = 0.0
    """Their learning rate."""
    width: int
    """The narrowest side of an adapted layer: a LoRA of this rank would be no low-rank update."""

    def rated(self, groups: list[dict[str, Any]], multiple: float = 1.0) -> list[dict[str, Any]]:
        """``parameter_groups`` with h at a multiple of its rate, and what is beside at its own."""
        for group in groups:
            if group["name"] == "coefficients":
                group["lr"] *= multiple
            if group["name"] == "other":
                group["lr"] = self.rate_beside
        return [group for group in groups if group["params"]]

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh copy of the frozen model; what trains beside is made from the global seed."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless batches of the training part."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: str) -> float:
        """The mean loss on the part ``"validation"`` or ``"test"``."""
