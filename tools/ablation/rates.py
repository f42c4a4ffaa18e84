"""Rules for the learning rate of h, in settings of other widths, ranks, rates and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pera_kernels as pk
from tools import rows
from tools.ablation.runs import Row, adapted, fit
from tools.ablation.task import Task
from tools.ablation.topics import Topics
from tools.ablation.verses import Verses

__all__ = ["RULES", "SETTINGS", "Normalised", "measure"]

SEED = 1000


@dataclass(frozen=True)
class Setting:
    """Where a rule is tried."""

    name: str
    task: str
    lr: float
    r: int = 16
    width: int = 128
    steps: int | None = None


SETTINGS = (
    Setting("width 64", "topics", 0.015, width=64),
    Setting("width 128", "topics", 0.015),
    Setting("width 256", "topics", 0.008, width=256),
    Setting("lr / 4", "topics", 0.00375),
    Setting("rank 4", "topics", 0.015, r=4),
    Setting("75 steps", "topics", 0.015, steps=75),
    Setting("1000 steps", "topics", 0.015, steps=1000),
    Setting("verses, width 384", "verses", 0.002),
    Setting("verses, lr / 2", "verses", 0.001),
)


class Normalised:
    """Before and after every step of an optimizer, h = q / (rms(A) rms(B)²): AdamW trains q."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[pk.PeraLinear]) -> None:
        self.layers = [(layer, layer.pera_h) for layer in layers if layer.pera_h is not None]
        optimizer.register_step_pre_hook(self.to_q)
        optimizer.register_step_post_hook(self.to_h)

    @staticmethod
    def size(layer: pk.PeraLinear) -> torch.Tensor:
        return layer.pera_A.square().mean().sqrt() * layer.pera_B.square().mean()

    @torch.no_grad()
    def to_q(self, *_: Any) -> None:
        for layer, h in self.layers:
            # While B is zero h is, and has no gradient.
            if h.grad is not None and (size := self.size(layer)) > 0.0:
                h.mul_(size)
                h.grad.div_(size)

    @torch.no_grad()
    def to_h(self, *_: Any) -> None:
        for layer, h in self.layers:
            if h.any():
                h.div_(self.size(layer))


# A multiple of lr, or None for the default.
RULES: dict[str, float | None] = {
    "LoRA": None,
    "30 × lr": 30.0,
    "1000 × lr": 1000.0,
    "30000 × lr": 30000.0,
    "default": None,
    "normalised at every step": 0.1,
}


def run(task: Task, setting: Setting, rule: str) -> Row:
    """Train once by a rule; the loss is that of the validation part."""
    torch.manual_seed(SEED)
    terms = "linear" if rule == "LoRA" else "full"
    model, layers = adapted(task, r=setting.r, terms=terms)
    multiple = RULES[rule]
    lr_h = None if multiple is None else multiple * setting.lr
    groups = pk.parameter_groups(model, setting.lr, lr_h=lr_h)
    optimizer = torch.optim.AdamW(task.rated(groups))
    if rule == "normalised at every step":
        Normalised(optimizer, list(layers.values()))
    steps = setting.steps or task.steps
    label = f"{setting.name}, {rule}"
    row = {"setting": setting.name, "task": setting.task, "rule": rule, "lr": setting.lr}
    row |= {"r": setting.r, "width": task.width}
    row |= fit(task, model, list(layers.values()), optimizer, steps, SEED, label)
    row["B_in_lr"] = sum(rms(layer.pera_B) for layer in layers.values()) / len(layers) / setting.lr
    return {**row, "validation": task.evaluate(model, "validation")}


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def measure(folder: Path) -> None:
    """Train full PERA by each rule in each setting; what has a row is not run again."""
    file = folder / "rates.jsonl"
    for setting in SETTINGS:
        done = {row["rule"] for row in rows.read(file) if row["setting"] == setting.name}
        left = [rule for rule in RULES if rule not in done]
        if not left:
            continue
        cache = folder / "cache"
        task = Verses(cache) if setting.task == "verses" else Topics(cache, setting.width)
        for rule in left:
            rows.append(file, run(task, setting, rule))
