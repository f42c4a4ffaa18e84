"""What the command lines of the benchmarks accept, with one line about what they do not."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

__all__ = ["OneLineParser", "device", "list_of", "one_of", "probability", "shape", "whole"]


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A list separated by commas, each word once."""

    def parse_list(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(parse(word.strip()) for word in text.split(",")))

    return parse_list


def whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= minimum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum}")
        return int(text)

    return parse


def shape(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1024x4096 (in x out)")
    return int(found[1]), int(found[2])


def probability(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) < 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1)")


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def device(text: str) -> torch.device:
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    if found.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"no {text!r} here: PyTorch sees {count} CUDA devices")
    return torch.device("cuda", found.index or 0)
