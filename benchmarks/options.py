"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any

import torch

__all__ = ["device", "list_of", "shape"]


def list_of(
    parse: Callable[[str], Any], known: Collection[Any] | None = None
) -> Callable[[str], tuple[Any, ...]]:
    """A list separated by commas, each word once and one of those that are known."""

    def parse_list(text: str) -> tuple[Any, ...]:
        words = tuple(dict.fromkeys(parse(word) for word in text.split(",")))
        for word in words:
            if known is not None and word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return words

    # What argparse calls a word that cannot be parsed.
    parse_list.__name__ = f"{parse.__name__} list"
    return parse_list


def shape(text: str) -> tuple[int, int]:
    """In and out features, such as 1024x4096."""
    n, m = text.split("x")
    return int(n), int(m)


def device(text: str) -> torch.device:
    """A device that is here; ``auto`` is the GPU where there is one."""
    gpu = torch.cuda.is_available()
    found = torch.device(("cuda" if gpu else "cpu") if text == "auto" else text)
    if found.type == "cuda" and not gpu:
        raise argparse.ArgumentTypeError("there is no GPU here")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found
