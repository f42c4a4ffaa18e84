"""Pretraining, and adaptation with one method at a time."""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pera_kernels.terms import coefficient_count
from tools.finetune.adapters import Adapters
from tools.finetune.data import consecutive_windows, random_batch
from tools.finetune.measure import bits_per_byte, merge_check, now, peak_memory
from tools.finetune.model import TARGET_MODULES, ByteTransformer
from tools.finetune.ranks import Ranks

Terms = Literal["linear", "square", "cross", "full"]
TERMS: tuple[Terms, ...] = get_args(Terms)
PRETRAIN_LR = 3e-3
PRETRAIN_BETAS = (0.9, 0.95)
WARMUP_STEPS = 20
HELD_OUT_POINTS = 4


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result, as given on the command line."""

    rank: int
    terms: tuple[Terms, ...]
    steps: int
    pretrain_steps: int
    batch: int
    lr: float
    lr_h: float | None
    """One rate for every h; None for the default rule of `pk.parameter_groups`."""
    seed: int


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    key: str
    label: str
    terms: Terms
    rank: int


@dataclass
class Run:
    """What one training run leaves behind, as JSON values.

    `status` becomes "finished" or "diverged" at the end; `loss` is in bits per byte, one value
    per step; `held_out` pairs a number of steps with bits per byte on the held-out text.
    """

    key: str
    label: str
    status: str = "interrupted"
    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


def methods_to_compare(settings: Settings, model: nn.Module) -> list[Method]:
    """The methods that `settings.terms` asks for, all to start from the same `model`."""
    rank = settings.rank
    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGET_MODULES and isinstance(module, nn.Linear)
    ]
    matched = matched_rank(shapes, rank)
    methods = [
        Method("lora", "LoRA", "linear", rank),
        Method("lora_matched", "LoRA, no fewer parameters", "linear", matched),
        # The rank that had full PERA's loss in docs/ablation.md, at rank 16.
        Method("lora_quarter_more", "LoRA, a quarter more ranks", "linear", math.ceil(1.25 * rank)),
        Method("lora_half_more", "LoRA, half as many ranks again", "linear", math.ceil(1.5 * rank)),
        Method("pera_square", "PERA square-only", "square", rank),
        Method("pera_cross", "PERA cross-only", "cross", rank),
        Method("pera_full", "PERA full", "full", rank),
    ]
    return [method for method in distinct(methods) if method.terms in settings.terms]


def distinct(methods: Iterable[Any]) -> list[Any]:
    """The first method of each rank and terms: at small ranks several of the LoRAs are one."""
    found: dict[tuple[str | None, int], Any] = {}
    for method in methods:
        found.setdefault((method.terms, method.rank), method)
    return list(found.values())


def matched_rank(shapes: Sequence[Sequence[int]], rank: int) -> int:
    """The smallest LoRA rank with at least the parameters of full PERA at `rank`, over layers of
    these shapes (output, input features).
    """
    coefficients = len(shapes) * coefficient_count(rank, "full")
    return rank + math.ceil(coefficients / sum(m + n for m, n in shapes))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    held_out: Tensor,
    run: Run,
    steps: int,
    settings: Settings,
    ranks: Ranks | None = None,
    reached: Callable[[int], None] | None = None,
) -> None:
    """Trains on random windows of `tokens` (length,), writing into `run` as it goes.

    `held_out` is (W, context + 1). The order of the training windows depends on the seed only. A
    run that has losses already goes on where they end. After each step `reached` is called with the
    number of steps. A loss that is not finite ends the run, which is then "diverged".
    """
    ranks, start = ranks or Ranks(), len(run.loss)
    device, context = held_out.device, held_out.shape[1] - 1
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(start):
        random_batch(tokens, settings.batch, context, generator)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_cosine(step, steps), last_epoch=start - 1
    )
    evaluated = {round(steps * point / HELD_OUT_POINTS) for point in range(HELD_OUT_POINTS)}
    shown = {"desc": run.label, "unit": "step", "dynamic_ncols": True, "initial": start}
    with tqdm(range(start, steps), total=steps, disable=not ranks.is_first, **shown) as progress:
        for step in progress:
            if step in evaluated:
                run.held_out.append((step, bits_per_byte(model, held_out)))
            batch = random_batch(tokens, settings.batch, context, generator)
            inputs, targets = (ranks.rows(part).to(device) for part in batch)
            started = now(device)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step_ms.append(1000 * (now(device) - started))
            schedule.step()
            bits = ranks.mean(loss) / math.log(2)
            if not math.isfinite(bits):
                run.status = "diverged"
                return
            run.loss.append(bits)
            progress.set_postfix_str(f"{bits:.3f} bits/byte", refresh=False)
            if reached is not None:
                reached(step + 1)
    run.held_out.append((steps, bits_per_byte(model, held_out)))
    if not math.isfinite(run.held_out[-1][1]):
        run.status = "diverged"


def warmup_then_cosine(step: int, steps: int) -> float:
    """Factor on every group's learning rate: a linear warm-up, then half a cosine to zero."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Pretraining:
    """The base model, trained on `source` and then frozen."""

    def __init__(self, settings: Settings, device: torch.device, width: int = 128) -> None:
        self.settings = settings
        self.run = Run("base", "Pretraining")
        torch.manual_seed(settings.seed)
        self.model = ByteTransformer(width=width).to(device)
        self.run.metrics["parameters"] = sum(p.numel() for p in self.model.parameters())

    def train(self, source: Tensor, held_out: Tensor, ranks: Ranks | None = None) -> None:
        """Trains on `source` (length,); `held_out` (W, context + 1) is the text to come."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=PRETRAIN_LR, betas=PRETRAIN_BETAS)
        steps, ranks = self.settings.pretrain_steps, (ranks or Ranks()).by("ddp")
        wrapped = ranks.wrap(self.model)
        fit(wrapped, optimizer, source, held_out, self.run, steps, self.settings, ranks)
        self.model.requires_grad_(False)
        if self.run.status == "diverged":
            raise RuntimeError("the pretraining diverged: there is nothing to adapt")
        self.run.metrics["held_out_bits_per_byte"] = self.run.held_out[-1][1]
        self.run.status = "finished"


class Adaptation:
    """One method on its own copy of the frozen base model."""

    def __init__(
        self,
        base: ByteTransformer,
        method: Method,
        settings: Settings,
        adapters: Adapters | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.method = method
        self.settings = settings
        self.adapters = adapters or Adapters()
        self.ranks = ranks or Ranks()
        self.run = Run(method.key, method.label)
        # The same seed at the same rank is the same A for every method; B starts at zero.
        torch.manual_seed(settings.seed)
        self.model = self.adapters.put(copy.deepcopy(base), method.rank, method.terms)
        self.run.metrics.update(
            terms=method.terms,
            rank=method.rank,
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        )
        # What differs between ranks is refused before it is hidden by the wrapper.
        self.ranks.check(self.model)
        self.wrapped = self.ranks.wrap(self.model)
        self.optimizer = torch.optim.AdamW(
            self.adapters.groups(self.model, settings.lr, settings.lr_h)
        )

    def train(
        self,
        training: Tensor,
        held_out: Tensor,
        reached: Callable[[int], None] | None = None,
    ) -> None:
        """Trains on `training` (length,), then measures it; `held_out` is (W, context + 1).

        `reached` as in :func:`fit`.
        """
        settings, device, metrics = self.settings, held_out.device, self.run.metrics
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model, steps = self.wrapped, settings.steps
        own = (self.run, steps, settings, self.ranks, reached)
        fit(model, self.optimizer, training, held_out, *own)
        metrics["step_ms"] = statistics.median(self.run.step_ms)
        metrics["peak_memory_bytes"] = peak_memory(device)
        if self.run.status == "diverged":
            return
        seen = consecutive_windows(training, held_out.shape[1] - 1, len(held_out)).to(device)
        shares = self.adapters.shares(self.model)
        metrics["training_bits_per_byte"] = bits_per_byte(self.model, seen)
        metrics["held_out_bits_per_byte"] = self.run.held_out[-1][1]
        metrics["quadratic_share"] = statistics.fmean(shares)
        metrics.update(merge_check(self.model, held_out, self.adapters))
        self.run.status = "finished"
