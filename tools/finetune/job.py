"""Pretraining and every adaptation in turn, with what has been reached kept in a folder."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.finetune.adapters import Adapters
from tools.finetune.checkpoint import Checkpoints
from tools.finetune.data import Corpora, as_tokens, consecutive_windows
from tools.finetune.measure import environment
from tools.finetune.ranks import Ranks
from tools.finetune.report import Results, plot_losses, write_results
from tools.finetune.train import Adaptation, Method, Pretraining, Run, Settings, methods_to_compare


class Job:
    """One comparison of methods, from pretraining to the last adapter.

    `every` is how many steps of adaptation are between checkpoints; None means that there are none.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        out: Path,
        corpora: Corpora,
        adapters: Adapters | None = None,
        ranks: Ranks | None = None,
        every: int | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self.out = out
        self.corpora = corpora
        self.adapters = adapters or Adapters()
        self.ranks = ranks or Ranks()
        self.every = every
        self.checkpoints = Checkpoints(out / "checkpoint", self.ranks)
        self.environment = environment(device)
        self.started = time.time()
        self.status = "interrupted"
        self.pretraining = Pretraining(settings, device)
        self.runs: list[Run] = []
        self.adaptation: Adaptation | None = None

    def train(self, told: dict[str, Any] | None = None) -> None:
        """Trains everything, one method after the other; each is saved however it ends.

        `told` is what the last checkpoint told, to go on from it.
        """
        training = as_tokens(self.corpora.training)
        held_out = consecutive_windows(
            as_tokens(self.corpora.held_out), self.pretraining.model.context
        )
        held_out = held_out.to(self.device)
        try:
            if told is None:
                self.pretraining.train(as_tokens(self.corpora.source), held_out, self.ranks)
                self.checkpoints.forget()
                if self.every is not None:
                    self.save_base()
            else:
                self.restore(told)
            done = {run.key for run in self.runs}
            for method in methods_to_compare(self.settings, self.pretraining.model):
                if method.key not in done:
                    self.adapt(method, training, held_out, told)
                    told = None
            self.status = "finished"
        finally:
            if self.ranks.count == 1:
                self.save()
            self.write()

    def adapt(
        self, method: Method, training: Tensor, held_out: Tensor, told: dict[str, Any] | None
    ) -> None:
        """Trains one method, from the beginning or from a checkpoint."""
        model = self.pretraining.model
        self.adaptation = now = Adaptation(model, method, self.settings, self.adapters, self.ranks)
        if told is not None and told["run"]["key"] == method.key:
            now.run = Run(**told["run"])
            self.checkpoints.load(now.wrapped, now.optimizer, told["folder"])
        finished, self.runs = self.runs, [*self.runs, now.run]

        def reached(step: int) -> None:
            if self.every is not None and (step % self.every == 0 or step == self.settings.steps):
                self.checkpoints.save(
                    now.wrapped,
                    now.optimizer,
                    f"{method.key}-{step}",
                    {
                        "conditions": self.conditions(),
                        "base": dataclasses.asdict(self.pretraining.run),
                        "finished": [dataclasses.asdict(run) for run in finished],
                        "run": dataclasses.asdict(now.run),
                    },
                )

        now.train(training, held_out, reached)
        self.save()
        self.write()

    def conditions(self) -> dict[str, Any]:
        """What a checkpoint and the job that goes on from it have in common, as JSON values."""
        texts = json.dumps(self.corpora.describe(), sort_keys=True)
        own = {
            **dataclasses.asdict(self.settings),
            "adapters_of": self.adapters.source,
            "texts_of_digest": hashlib.sha256(texts.encode()).hexdigest()[:8],
        }
        return json.loads(json.dumps(own))  # type: ignore[no-any-return]

    def restore(self, told: dict[str, Any]) -> None:
        """The base model and what was finished before a checkpoint."""
        model = self.pretraining.model
        model.load_state_dict(torch.load(self.out / "base.pt", map_location=self.device))
        model.requires_grad_(False)
        self.pretraining.run = Run(**told["base"])
        self.runs = [Run(**run) for run in told["finished"]]

    def results(self) -> Results:
        """Everything there is to know about this job, as JSON values."""
        results = {
            "status": self.status,
            "seconds": time.time() - self.started,
            "settings": dataclasses.asdict(self.settings),
            "environment": self.environment,
            "corpora": self.corpora.describe(),
            "base": dataclasses.asdict(self.pretraining.run),
            "methods": [dataclasses.asdict(run) for run in self.runs],
        }
        if self.ranks.count > 1:
            results["parallel"] = {"how": self.ranks.parallel, "ranks": self.ranks.count}
        return results

    def save(self) -> None:
        """Writes the base model and the adapter that was trained last; on every rank, where each
        has a part of it.
        """
        if self.adaptation is None:
            return
        if self.ranks.saves:
            folder = self.out / f"adapter_{self.adaptation.method.key}"
            self.adapters.save(self.adaptation.model, folder, self.ranks.is_first)
        if len(self.runs) == 1:
            self.save_base()

    def save_base(self) -> None:
        """Writes the base model, in one piece."""
        if self.ranks.is_first:
            partial = self.out / "base.partial"
            torch.save(self.pretraining.model.state_dict(), partial)
            partial.replace(self.out / "base.pt")

    def write(self) -> None:
        """Writes results.json."""
        if self.ranks.is_first:
            write_results(self.results(), self.out / "results.json")

    def plot(self) -> None:
        """Writes loss.png."""
        if self.ranks.is_first:
            plot_losses(self.results(), self.out / "loss.png")
