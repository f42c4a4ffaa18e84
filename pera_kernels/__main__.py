"""``python -m pera_kernels``: see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .cli.arguments import build
from .cli.commands import COMMANDS

__all__ = ["main"]

# What a shell reports of a program that a closed pipe ended: 128 and the number of SIGPIPE.
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 2 for bad use, 141 where the reader of the output left."""
    try:
        return _run(arguments)
    except BrokenPipeError:
        # What is still buffered has no reader either, and is written once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    parser = build(COMMANDS)
    parsed = parser.parse_args(arguments)
    try:
        status = parsed.run(parsed)
        # Here, and not when the interpreter ends, where an error could only be printed.
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        # What the library refuses is bad use: one line, however many the message has.
        text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        parser.exit(2, f"{parser.prog} {parsed.command}: error: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
