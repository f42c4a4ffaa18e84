"""The first task: the byte-level transformer of the fine-tune, from Python source to English."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.ablation.task import Batch, Task
from tools.finetune import data
from tools.finetune.measure import bits_per_byte
from tools.finetune.model import TARGET_MODULES, ByteTransformer
from tools.finetune.train import Pretraining, Settings

__all__ = ["Topics"]


class Topics(Task):
    """Next bytes of `pydoc_data.topics`, after a pretraining on the standard library's source.

    Topics are split by name and no paragraph is in two parts. The test part is what
    ``tools.finetune`` holds out; the validation part is a ninth of what it trains on.
    """

    name = "topics"
    steps = 300
    rates = (0.0067, 0.01, 0.015, 0.022, 0.033)
    rates_of_full = (0.001, 0.002, 0.004, 0.008, 0.016)
    targets = TARGET_MODULES

    def __init__(
        self, cache: Path, width: int = 128, pretrain_steps: int = 700, batch: int = 8
    ) -> None:
        self.width = width
        self.batch = batch
        self.parts = {name: data.as_tokens(text) for name, text in topic_parts().items()}
        settings = Settings(1, (), 1, pretrain_steps, batch, lr=1.0, lr_h=None, seed=0)
        pretraining = Pretraining(settings, torch.device("cpu"), width)
        self.base = pretraining.model
        saved = cache / f"topics-{width}-{pretrain_steps}.pt"
        if saved.exists():
            self.base.load_state_dict(torch.load(saved, weights_only=True))
            self.base.requires_grad_(False)
            return
        source = data.as_tokens(data.standard_library_source(data.SOURCE_BYTES))
        pretraining.train(source, self.windows("validation"))
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(self.base.state_dict(), saved)

    def windows(self, part: str) -> Tensor:
        return data.consecutive_windows(self.parts[part], self.base.context)

    def model(self) -> ByteTransformer:
        return copy.deepcopy(self.base)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        training, context = self.parts["training"], self.base.context
        while True:
            yield data.random_batch(training, self.batch, context, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / math.log(2)

    def evaluate(self, model: nn.Module, part: str) -> float:
        return bits_per_byte(model, self.windows(part))


def topic_parts() -> dict[str, bytes]:
    """The three parts; a topic's paragraphs are in the first part that has them."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {"test": [], "validation": [], "training": []}
    names = {0: "test", 1: "validation"}
    for topic in sorted(topics):
        place = zlib.crc32(topic.encode()) % data.HELD_OUT_ONE_IN
        parts[names.get(place, "training")].append(topics[topic])
    seen: set[str] = set()
    return {part: data.unseen_paragraphs(texts, seen).encode() for part, texts in parts.items()}
