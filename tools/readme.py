"""Write the measured parts of the READMEs from the committed result files.

python -m tools.readme            rewrite them, and the plots of the benchmarks
python -m tools.readme --check    exit status 1 if a README would change
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import report

from . import marked

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def finetune() -> str:
    """The closing table of the committed fine-tuning run."""
    from tools.finetune.report import markdown_table

    return markdown_table(json.loads((RESULTS / "finetune" / "results.json").read_text()))


PARTS: dict[str, Callable[[], str]] = {"finetune": finetune}


def render(text: str) -> str:
    """README.md with every marked part replaced by what its result files say."""
    return marked.render(text, {**PARTS, **report.PARTS})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing, report a difference")
    arguments = parser.parse_args(argv)
    benchmarks_differ = report.main(["--check"] if arguments.check else [])
    old = README.read_text()
    new = render(old)
    if arguments.check:
        if new != old:
            print("README.md is not what the result files say: run python -m tools.readme")
        return int(new != old or benchmarks_differ)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
