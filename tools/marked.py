"""Generated parts of a document, from ``<!-- NAME: generated -->`` to ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

__all__ = ["render"]


def _between(generated: str, marked: re.Match[str]) -> str:
    return f"{marked[1]}{generated}\n{marked[2]}"


def render(text: str, parts: Mapping[str, Callable[[], str]], name: str = "README.md") -> str:
    """The document with every marked part replaced by what its function gives."""
    for part, generate in parts.items():
        pattern = re.compile(rf"(<!-- {part}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{name} must have exactly one part marked {part!r}")
        # A replacement text would have its backslashes read; a function is taken as it is.
        text = pattern.sub(partial(_between, generate()), text)
    return text
