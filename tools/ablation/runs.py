"""One training run, and which runs there are: rates are chosen first, then every seed trains."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

import pera_kernels as pk
from pera_kernels.cli import describe
from pera_kernels.terms import coefficient_count, expanded_rank
from tools.ablation.task import Task
from tools.finetune.train import distinct, matched_rank, warmup_then_cosine

__all__ = ["FULL", "LABELS", "Method", "Row", "Trial", "methods", "remaining", "train"]

Row = dict[str, Any]
# The seed of the runs that choose rates; no result has it.
CHOICE_SEED = 1000
# Multiples of the default rate of h to choose from, at the rate that was chosen for A and B.
MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0)
# Parts of a run, whose mean losses make its curve; its training loss is that of the last third.
PARTS = 30
# Runs whose singular values are kept.
WITH_SPECTRUM = {("lora", 16), ("full", 16), ("full_fine_tuning", 0)}
LABELS = {
    "lora": "LoRA",
    "full": "PERA full",
    "full_default": "PERA full, default rate of h",
    "square": "PERA square-only",
    "cross": "PERA cross-only",
    "lora_parameters": "LoRA, no fewer parameters",
    "lora_half_more": "LoRA, half as many ranks again",
    "lora_expanded": "LoRA of the expanded rank",
    "full_fine_tuning": "Full fine-tuning",
}


@dataclass(frozen=True)
class Method:
    """A method that is compared at rank ``r``; ``rank`` is its adapter's own.

    ``terms`` is None for full fine-tuning of the same layers.
    """

    key: str
    r: int
    terms: Literal["full", "square", "cross", "linear"] | None
    rank: int

    @property
    def label(self) -> str:
        return LABELS[self.key]

    @property
    def has_h(self) -> bool:
        return self.terms is not None and coefficient_count(self.rank, self.terms) > 0


@dataclass(frozen=True)
class Trial:
    """One training run; ``multiple`` is of the default rate of h."""

    method: Method
    lr: float
    multiple: float
    seed: int

    def key(self) -> tuple[Any, ...]:
        return (self.method.key, self.method.r, self.lr, self.multiple, self.seed)


FULL = Method("full_fine_tuning", 0, None, 0)


def methods(task: Task, r: int) -> list[Method]:
    """What is compared at rank r: LoRA in several sizes, and PERA's three terms."""
    shapes = [layer.weight.shape for layer in adapted(task, r=1, terms="linear")[1].values()]
    found = [
        Method("lora", r, "linear", r),
        Method("full", r, "full", r),
        Method("square", r, "square", r),
        Method("cross", r, "cross", r),
        Method("lora_parameters", r, "linear", matched_rank(shapes, r)),
        Method("lora_half_more", r, "linear", math.ceil(1.5 * r)),
        Method("lora_expanded", r, "linear", expanded_rank(r)),
    ]
    return [method for method in distinct(found) if method.rank < task.width]


def adapted(task: Task, **options: Any) -> tuple[nn.Module, dict[str, pk.PeraLinear]]:
    """The task's model with adapters."""
    model = pk.inject(task.model(), task.targets, modules_to_save=task.trained_beside, **options)
    return model, pk.adapted_modules(model)


def remaining(task: Task, rows: Sequence[Row], ranks: Sequence[int], seeds: int) -> Iterator[Trial]:
    """The trials without a row that are known so far: a choice is known when its runs are done."""
    done = {row_key(row): row for row in rows if row["task"] == task.name}
    for method in (*(m for r in ranks for m in methods(task, r)), FULL):
        lr, multiple, missing = _choose(task, method, done)
        if not missing:
            own = range(seeds if method is not FULL else 1)
            missing = [Trial(method, lr, multiple, seed) for seed in own]
            if method.key == "full" and multiple != 1.0:
                default = replace(method, key="full_default")
                missing += [Trial(default, lr, 1.0, seed) for seed in own]
        yield from (trial for trial in missing if trial.key() not in done)


def row_key(row: Row) -> tuple[Any, ...]:
    return (row["method"], row["r"], row["lr"], row["multiple"], row["seed"])


def _choose(
    task: Task, method: Method, done: Mapping[tuple[Any, ...], Row]
) -> tuple[float, float, list[Trial]]:
    """The best rates so far, and the trials that have to run before they are the best of all."""

    def search(grid: Sequence[float], trial: Callable[[float], Trial]) -> tuple[float, list[Trial]]:
        """The best of the middle three, and of those beyond while the best is at an end."""
        middle = len(grid) // 2
        first, last = middle - 1, middle + 1
        while True:
            tried = {at: trial(grid[at]) for at in range(first, last + 1)}
            if missing := [own for own in tried.values() if own.key() not in done]:
                return grid[middle], missing
            losses = {at: done[own.key()]["validation"] for at, own in tried.items()}
            # A run that diverged has no loss; of equals the one in the middle counts.
            ranked = {at: math.inf if loss is None else loss for at, loss in losses.items()}
            best = min(ranked, key=lambda at: (ranked[at], abs(at - middle)))
            wider = max(0, first - (best == first)), min(len(grid) - 1, last + (best == last))
            if wider == (first, last):
                return grid[best], []
            first, last = wider

    rates = task.rates_of_full if method is FULL else task.rates
    lr, missing = search(rates, lambda lr: Trial(method, lr, 1.0, CHOICE_SEED))
    if missing or not method.has_h:
        return lr, 1.0, missing
    return lr, *search(MULTIPLES, lambda multiple: Trial(method, lr, multiple, CHOICE_SEED))


def train(task: Task, trial: Trial, steps: int) -> Row:
    """Train once. A choice is evaluated on the validation part, a result on the test part."""
    method = trial.method
    row: Row = {
        "task": task.name,
        "method": method.key,
        "r": method.r,
        "rank": method.rank,
        "lr": trial.lr,
        "multiple": trial.multiple,
        "seed": trial.seed,
    }
    names = list(adapted(task, r=1, terms="linear")[1]) if method.terms is None else []
    torch.manual_seed(trial.seed)
    if method.terms is None:
        model, layers = task.model().float(), dict[str, pk.PeraLinear]()
        weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
        start = [weight.detach().clone() for weight in weights]
        beside = [p for name in task.trained_beside for p in model.get_submodule(name).parameters()]
        groups: list[dict[str, Any]] = [
            {"name": "factors", "params": weights, "lr": trial.lr},
            {"name": "other", "params": beside, "lr": trial.lr},
        ]
    else:
        model, layers = adapted(task, r=method.rank, terms=method.terms)
        groups = pk.parameter_groups(model, trial.lr)
    label = f"{method.label} {method.rank}, lr {trial.lr:g} × {trial.multiple:g}, {trial.seed}"
    part = "validation" if trial.seed == CHOICE_SEED else "test"
    optimizer = torch.optim.AdamW(task.rated(groups, trial.multiple), weight_decay=0.0)
    row |= fit(task, model, list(layers.values()), optimizer, steps, trial.seed, label)
    row[part] = task.evaluate(model, part)
    kept = trial.seed == 0 and (method.key, method.r) in WITH_SPECTRUM
    if kept and math.isfinite(row[part]):
        with torch.no_grad():
            if method.terms is None:
                updates = [weight - old for weight, old in zip(weights, start, strict=True)]
            else:
                updates = [layer.delta_weight() for layer in layers.values()]
        row["spectra"] = [torch.linalg.svdvals(update).tolist() for update in updates]
        row["shapes"] = [list(update.shape) for update in updates]
    return row


def fit(
    task: Task,
    model: nn.Module,
    layers: Sequence[pk.PeraLinear],
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    label: str,
) -> Row:
    """Train with a warm-up and a cosine, on the seed's batches; what was seen on the way.

    ``shares`` are the layers' mean quadratic shares after every fifth of the steps.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_cosine(step, steps)
    )
    losses: list[float] = []
    shares: list[float] = []
    fifths = {round(steps * n / 5) for n in range(1, 6)}
    batches = itertools.islice(task.batches(seed), steps)
    for step, batch in enumerate(tqdm(batches, desc=label, total=steps, disable=None), start=1):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if step in fifths and any(layer.pera_h is not None for layer in layers):
            shares.append(statistics.fmean(layer.quadratic_share() for layer in layers))
    return {
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": [statistics.fmean(part) for part in parts(losses)],
        "training": statistics.fmean(losses[-max(1, steps // 3) :]),
        "shares": shares,
        "torch": torch.__version__,
        "commit": describe.commit(),
    }


def parts(losses: Sequence[float]) -> list[Sequence[float]]:
    """The losses in ``PARTS`` parts of one length, or one by one where there are fewer."""
    size = max(1, len(losses) // PARTS)
    return [losses[start : start + size] for start in range(0, len(losses), size)]
