"""Pretraining and every adaptation in turn, with what has been reached kept in a folder."""

import dataclasses
import time
from pathlib import Path

import torch

import pera_kernels as pk
from tools.finetune.data import Corpora, as_tokens, consecutive_windows
from tools.finetune.measure import environment
from tools.finetune.report import Results, plot_losses, write_results
from tools.finetune.train import Adaptation, Pretraining, Settings, methods_to_compare


class Job:
    """One comparison of methods, from pretraining to the last adapter."""

    def __init__(
        self, settings: Settings, device: torch.device, out: Path, corpora: Corpora
    ) -> None:
        self.settings = settings
        self.device = device
        self.out = out
        self.corpora = corpora
        self.environment = environment(device)
        self.started = time.time()
        self.status = "interrupted"
        self.pretraining = Pretraining(settings, device)
        self.adaptations: list[Adaptation] = []

    def train(self) -> None:
        """Trains everything, one method after the other; each is saved however it ends."""
        model = self.pretraining.model
        training = as_tokens(self.corpora.training)
        held_out = consecutive_windows(as_tokens(self.corpora.held_out), model.context)
        held_out = held_out.to(self.device)
        try:
            self.pretraining.train(as_tokens(self.corpora.source), held_out)
            for method in methods_to_compare(self.settings, model):
                self.adaptations.append(Adaptation(model, method, self.settings))
                self.adaptations[-1].train(training, held_out)
                self.save()
            self.status = "finished"
        finally:
            self.save()

    def results(self) -> Results:
        """Everything there is to know about this job, as JSON values."""
        return {
            "status": self.status,
            "seconds": time.time() - self.started,
            "settings": dataclasses.asdict(self.settings),
            "environment": self.environment,
            "corpora": self.corpora.describe(),
            "base": dataclasses.asdict(self.pretraining.run),
            "methods": [dataclasses.asdict(adaptation.run) for adaptation in self.adaptations],
        }

    def save(self) -> None:
        """Writes results.json, the base model, and the adapter that was trained last."""
        if self.adaptations:
            adaptation = self.adaptations[-1]
            pk.save_adapter(
                adaptation.model,
                self.out / f"adapter_{adaptation.method.key}",
                base_model="base.pt beside this folder",
            )
            if len(self.adaptations) == 1:
                torch.save(self.pretraining.model.state_dict(), self.out / "base.pt")
        write_results(self.results(), self.out / "results.json")

    def plot(self) -> None:
        """Writes loss.png."""
        plot_losses(self.results(), self.out / "loss.png")
