"""Write the README's measured parts from the committed result files.

python -m tools.readme            rewrite README.md
python -m tools.readme --check    exit status 1 if it would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
GPU_BENCHMARKS = "gpu*.jsonl"


def finetune() -> str:
    """The closing table of the committed fine-tuning run."""
    from tools.finetune.report import markdown_table

    return markdown_table(json.loads((RESULTS / "finetune" / "results.json").read_text()))


def cpu_benchmarks() -> str:
    """Forward plus backward on the CPU: ratio to the frozen linear, per contender and size."""
    return benchmark_table(RESULTS / "cpu.jsonl")


def gpu_benchmarks() -> str:
    """The same on GPUs, from whatever files are committed."""
    files = sorted(RESULTS.glob(GPU_BENCHMARKS))
    if not files:
        return "GPU: **not measured** yet (`tools/gpu_check.sh OUT` gives the numbers in one call)."
    return "\n\n".join(benchmark_table(path) for path in files)


def benchmark_table(path: Path) -> str:
    """The "both" phase of a result file as a table, sizes across and contenders down."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    rows = [r for r in rows if r["phase"] == "both" and r.get("median_ms") is not None]
    if not rows:
        raise ValueError(f"{path.name} holds no measured row of the phase 'both'")

    def size(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["dtype"], r["n"], r["m"], r["T"]

    sizes = sorted({size(r) for r in rows})
    names = list(dict.fromkeys((r["contender"], r["plan"]) for r in rows))
    cells = {(r["contender"], r["plan"], *size(r)): r for r in rows}
    head = [f"{d} {n}→{m}, T={t}" for d, n, m, t in sizes]
    lines = ["| contender | " + " | ".join(head) + " |", "|---|" + "---:|" * len(sizes)]
    for contender, plan in names:
        shown = [_cell(cells.get((contender, plan, *s))) for s in sizes]
        label = (
            contender if plan in (None, "", "none") or plan in contender else f"{contender}, {plan}"
        )
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    r = rows[0]
    note = (
        f"Forward + backward, ratio to the frozen linear layer in the same rounds (median ms in "
        f"brackets), terms={r['terms']}, r={r['r']}; {r['device']}, torch {r['torch']}, "
        f"commit {r['commit']}, {r['date']}."
    )
    return "\n".join(lines) + "\n\n" + note


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio_to_frozen"]
    return (
        f"{row['median_ms']:.3g} ms" if ratio is None else f"{ratio:.2f} ({row['median_ms']:.3g})"
    )


PARTS: dict[str, Callable[[], str]] = {
    "finetune": finetune,
    "cpu benchmarks": cpu_benchmarks,
    "gpu benchmarks": gpu_benchmarks,
}


def _between(generated: str, marked: re.Match[str]) -> str:
    return f"{marked[1]}{generated}\n{marked[2]}"


def render(text: str) -> str:
    """The README with every marked part replaced by what its result files say."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must have exactly one part marked {name!r}")
        # A replacement text would have its backslashes read; a function is taken as it is.
        replace = partial(_between, part())
        text = pattern.sub(replace, text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing, report a difference")
    arguments = parser.parse_args(argv)
    old = README.read_text()
    new = render(old)
    if arguments.check:
        if new != old:
            print("README.md is not what the result files say: run python -m tools.readme")
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
