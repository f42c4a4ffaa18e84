"""``python -m pera_kernels``: see ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli.arguments import build
from .cli.commands import COMMANDS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 2 for bad use."""
    parser = build(COMMANDS)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ImportError, OSError, TypeError, ValueError) as error:
        # What the library refuses is bad use: one line, however many the message has.
        text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        parser.exit(2, f"{parser.prog} {parsed.command}: error: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
