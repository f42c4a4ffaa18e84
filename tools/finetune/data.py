"""The two corpora, both shipped with every CPython: standard-library source, and `pydoc` topics."""

import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# `pydoc_data` is the text to adapt to, `encodings` mostly tables, the others not the library.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
)
SOURCE_BYTES = 3_000_000
HELD_OUT_ONE_IN = 10


class CorpusError(RuntimeError):
    """This Python came without the text that the job trains on."""


@dataclass(frozen=True)
class Corpora:
    """Three texts as bytes: `source` to pretrain on, `training` and `held_out` to adapt to."""

    source: bytes
    training: bytes
    held_out: bytes

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Size and SHA-256 of each text: equal digests mean equal input."""
        return {
            name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            for name, text in vars(self).items()
        }


def load_corpora(source_bytes: int = SOURCE_BYTES) -> Corpora:
    """Reads all three texts from the running Python's own installation."""
    training, held_out = topic_text()
    return Corpora(standard_library_source(source_bytes), training, held_out)


def standard_library_source(limit: int) -> bytes:
    """About `limit` bytes of the standard library's `.py` files, always the same ones.

    Files come in the order of a hash of their path, so that the selection is spread over the
    library instead of ending at some letter of the alphabet.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        relative = Path(folder).relative_to(root)
        paths += [relative / name for name in files if name.endswith(".py")]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    pieces: list[bytes] = []
    total = 0
    for path in paths:
        if total >= limit:
            break
        pieces.append((root / path).read_bytes())
        total += len(pieces[-1])
    if not pieces:
        raise CorpusError("no standard-library source files found next to this Python")
    return b"\n".join(pieces)[:limit]


def topic_text() -> tuple[bytes, bytes]:
    """English of `pydoc_data.topics` as (training, held out), split by topic.

    Topics quote each other at length ("compound" contains "if", "while", ...), so no paragraph is
    used twice, and none of a held-out topic is left in the training text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError("this Python came without pydoc_data.topics") from error
    held_out_names = [name for name in sorted(topics) if is_held_out(name)]
    training_names = [name for name in sorted(topics) if not is_held_out(name)]
    seen: set[str] = set()
    held_out = unseen_paragraphs([topics[name] for name in held_out_names], seen)
    training = unseen_paragraphs([topics[name] for name in training_names], seen)
    return training.encode(), held_out.encode()


def is_held_out(topic: str) -> bool:
    """A fixed tenth of the topics by name: Python versions agree on the topics they share."""
    return zlib.crc32(topic.encode()) % HELD_OUT_ONE_IN == 0


def unseen_paragraphs(texts: list[str], seen: set[str]) -> str:
    """The paragraphs of `texts` that are not in `seen`, which grows by them."""
    kept = []
    for text in texts:
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def as_tokens(text: bytes) -> Tensor:
    """Bytes as token numbers, int64 (len(text),)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def random_batch(
    tokens: Tensor, batch: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, both (batch, context), from random places in `tokens`."""
    starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
    windows = tokens[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def consecutive_windows(tokens: Tensor, context: int, limit: int | None = None) -> Tensor:
    """(W, context + 1) windows that predict every byte at most once.

    With a `limit` smaller than what there is, that many windows evenly spaced over the text.
    """
    windows = tokens.unfold(0, context + 1, context)
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]
