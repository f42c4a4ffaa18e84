"""Documents with generated parts, between ``<!-- NAME: generated -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "drawing", "render", "table", "write"]

ROOT = Path(__file__).resolve().parents[1]
# Reads on light and on dark.
GREY = "#7d8590"


def table(head: Sequence[str], lines: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, rule, *lines))


def render(text: str, parts: Mapping[str, Callable[[], str]], name: str) -> str:
    """The document of this name with its parts made again."""
    for part, generate in parts.items():
        pattern = rf"(<!-- {part}: generated -->\n).*?(\n<!-- end -->)"
        before, *found = re.split(pattern, text, flags=re.DOTALL)
        if len(found) != 3:
            raise ValueError(f"{name} must have exactly one part marked {part!r}")
        text = "".join((before, found[0], generate(), *found[1:]))
    return text


def write(documents: Mapping[Path, str], command: str, *, check: bool) -> int:
    """Write what changed; with ``check`` only say so, and return 1 if anything did."""
    changed = {
        path: text
        for path, text in documents.items()
        if not path.exists() or path.read_text() != text
    }
    for path, text in changed.items():
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run python -m {command}")
        else:
            path.write_text(text)
    return int(check and bool(changed))


@contextmanager
def drawing(path: Path, description: str = "", **layout: Any) -> Iterator[Any]:
    """Axes, as ``pyplot.subplots`` makes them, that are saved as an SVG: the same drawing gives the
    same file, with letters as text and what it shows as its description.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"svg.hashsalt": "pera", "svg.fonttype": "none"}
    of_text = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    style |= dict.fromkeys((*of_text, "xtick.color", "ytick.color"), GREY)
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(layout="constrained", squeeze=False, **layout)
        yield axes
        metadata = {"Date": None, "Description": description}
        figure.savefig(path, metadata=metadata, transparent=True)
        pyplot.close(figure)
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
