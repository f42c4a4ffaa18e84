"""Plots and tables from the committed rows.

python -m benchmarks.report            rewrite the plots and the benchmark parts of both READMEs
python -m benchmarks.report --check    exit status 1 if a part of a README would change
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.marked import render

from . import ablation, cells, options, plots, tables, targets
from .cells import Cells

__all__ = ["PARTS", "PARTS_HERE", "documents", "write_plots"]

ROOT = Path(__file__).resolve().parent.parent
# The file names of rows by the kind of device; those of decoder layers have a prefix.
CPU, GPU = "cpu*.jsonl", "gpu*.jsonl"


def _each(pattern: str, part: Callable[[Cells], str], absent: str) -> str:
    found = cells.load(pattern, cells.RESULTS)
    return "\n\n".join(part(own) for own in found) or absent


def cpu_benchmarks() -> str:
    return _each(CPU, tables.compact, "CPU: **not measured**.")


def gpu_benchmarks() -> str:
    return _each(GPU, tables.compact, tables.NOT_MEASURED)


def cpu_targets() -> str:
    return _each(CPU, targets.cpu, targets.cpu(Cells([])))


def gpu_targets() -> str:
    """Of every GPU that has rows; without one, the targets alone."""
    layers = cells.load(GPU, cells.RESULTS)
    decoders = {_device(own): own for own in cells.load(f"decoder-{GPU}", cells.RESULTS)}
    nothing = Cells([])
    if not layers:
        return f"{tables.NOT_MEASURED}\n\n{targets.gpu(nothing, nothing)}"
    return "\n\n".join(
        f"{_device(own)}:\n\n{targets.gpu(own, decoders.get(_device(own), nothing))}"
        for own in layers
    )


def _device(own: Cells) -> str:
    return str(next(own.rows())["device"])


def decoder_layer() -> str:
    """The decoder layer's own tables, a file after the other."""
    files = sorted(cells.RESULTS.glob("decoder-*.jsonl"))
    if not files:
        return "Decoder layer: **not measured**."
    # Its module needs transformers' shapes, which nothing else here does.
    from .decoder import table

    return "\n\n".join(table(path) for path in files)


def model_against_measurement() -> str:
    cpu = _each(CPU, tables.model, "CPU: not measured.")
    gpu = _each(GPU, tables.model, tables.NOT_MEASURED)
    return f"{cpu}\n\n{gpu}"


def shown_plots() -> str:
    """Links to the plots that there are."""
    files = sorted((cells.RESULTS / "plots").glob("*.svg"))
    links = [f"![{path.stem.replace('-', ' ')}](results/plots/{path.name})" for path in files]
    return "\n\n".join(links) or "No plots yet."


PARTS: dict[str, Callable[[], str]] = {
    "cpu benchmarks": cpu_benchmarks,
    "gpu benchmarks": gpu_benchmarks,
    "cpu targets": cpu_targets,
    "gpu targets": gpu_targets,
    "decoder layer": decoder_layer,
}
# Those of benchmarks/README.md.
PARTS_HERE: dict[str, Callable[[], str]] = {
    "ablation": lambda: ablation.table(cells.RESULTS / "ablation-cpu.jsonl"),
    "model": model_against_measurement,
    "plots": shown_plots,
}


def documents() -> dict[Path, str]:
    """What each README should read, by its path."""
    found = {}
    for path, parts in ((ROOT / "README.md", PARTS), (ROOT / "benchmarks/README.md", PARTS_HERE)):
        found[path] = render(path.read_text(), parts, str(path.relative_to(ROOT)))
    return found


def write_plots(folder: Path) -> list[Path]:
    """One SVG for each kind of device and plot that the rows allow."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, pattern in (("cpu", CPU), ("gpu", GPU)):
        for number, own in enumerate(cells.load(pattern, cells.RESULTS)):
            suffix = f"-{number + 1}" if number else ""
            for name, draw in plots.PLOTS.items():
                if (picture := draw(own)) is not None:
                    path = folder / f"{kind}{suffix}-{name}.svg"
                    path.write_text(picture)
                    written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.OneLineParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    given = parser.parse_args(arguments)
    if not given.check:
        write_plots(cells.RESULTS / "plots")
    changed = {path: text for path, text in documents().items() if path.read_text() != text}
    for path, text in changed.items():
        name = path.relative_to(ROOT)
        if given.check:
            print(f"{name} is not what the rows say: run python -m benchmarks.report")
        else:
            path.write_text(text)
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
