"""Write the generated parts of the READMEs and of docs/ from the committed result files.

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

from . import marked, promises

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def finetune() -> str:
    """The closing table of the committed fine-tuning run."""
    from tools.finetune.report import markdown_table

    return markdown_table(json.loads((RESULTS / "finetune" / "results.json").read_text()))


def lora_ranks() -> str:
    """Rank, expanded rank, what is exported, and vLLM's bucket."""
    from pera_kernels.export import vllm_max_lora_rank
    from pera_kernels.terms import TERMS, expanded_rank

    head = ["r", *(f'K, terms="{terms}"' for terms in TERMS), "K′ (full)", "vLLM --max-lora-rank"]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for r in (2, 4, 8, 12, 16, 20, 24, 28, 32, 64):
        Ks = [expanded_rank(r, terms) for terms in TERMS]  # type: ignore[arg-type]
        padded = -(-Ks[0] // 16) * 16
        cells = [r, *Ks, padded, vllm_max_lora_rank(padded) or "none"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


DOCS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "serving.md": {"ranks": lora_ranks},
    ROOT / "tests" / "README.md": promises.PARTS,
}
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
    written = {README: render(README.read_text())}
    for path, parts in DOCS.items():
        written[path] = marked.render(path.read_text(), parts, path.name)
    changed = {path: text for path, text in written.items() if text != path.read_text()}
    if not arguments.check:
        for path, text in changed.items():
            path.write_text(text)
        return 0
    for path in changed:
        print(f"{path.name} is not what the result files say: run python -m tools.readme")
    return int(bool(changed) or benchmarks_differ)


if __name__ == "__main__":
    sys.exit(main())
