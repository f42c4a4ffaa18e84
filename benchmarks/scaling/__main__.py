"""Write benchmarks/scaling.md.

    python -m benchmarks.scaling            from the formulas of model.py and the counted rows
    python -m benchmarks.scaling --check    change nothing; exit status 1 if the page would change

The rows are made by ``torchrun --nproc-per-node 2 -m benchmarks.scaling.count``.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from pera_kernels.terms import Terms, expanded_rank
from tools.documents import ROOT, render, table, write

from ..decoder import TARGETS
from ..rows import RESULTS, read
from .count import FILE
from .model import (
    BASE,
    GPUS,
    NODE,
    SHAPES,
    TOKENS,
    Adapter,
    Parallelism,
    Shape,
    adapter_bytes,
    base_bytes,
    input_bytes,
    operations,
    parallelisms,
    payload,
    sent,
)

PAGE = ROOT / "benchmarks" / "scaling.md"
# Of a decoder layer: its latest rows, of the frozen layer and of PERA over it.
DECODER, DTYPES, MIB = RESULTS / "decoder-cpu.jsonl", ("bfloat16", "bfloat16+float32"), 2**20
NAMES: dict[Terms, str] = {"linear": "LoRA", "square": "PERA square", "full": "PERA full"}


def compute() -> str:
    """Operations of a rank, of every shape."""
    lines = []
    for shape in SHAPES:
        for tp in sorted({p.tp for p in parallelisms()}):
            base = operations(shape, None, tp)
            ratios = [operations(shape, Adapter(terms), tp) / base for terms in NAMES]
            ranks = f"TP, {tp}" if tp > 1 else "1 GPU, DDP, FSDP2"
            lines.append((shape.name, ranks, f"{base / 1e12:.1f}", *map("{:.3f}".format, ratios)))
    return table(("", "", "base, TFLOP", *NAMES.values()), lines, 2)


def of_shape(shape: Shape) -> str:
    """Bytes that a rank holds and sends."""
    lines = []
    for p in parallelisms():
        adapters, base = [Adapter(terms) for terms in NAMES], sent(shape, None, p)
        held = (base_bytes(shape, p), input_bytes(shape, p.tp))
        of_adapters = _beside([adapter_bytes(shape, own, p) for own in adapters])
        communicated = _beside([sent(shape, own, p) - base for own in adapters])
        lines.append([p, *map(_gb, held), *of_adapters, _gb(base), *communicated])
    more = ("LoRA", "square: MB more", "full: MB more")
    return table(("", "held: base", "x", *more, "sent: base", *more), lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g}"


def _beside(sizes: Sequence[float]) -> list[str]:
    """LoRA's GB, and MB that PERA takes more."""
    lora, *others = sizes
    return [_gb(lora), *(f"{(size - lora) / 1e6:.3g}" for size in others)]


def span(numbers: Iterable[float], form: str) -> str:
    """The least and the largest of the three shapes."""
    least, *_, most = sorted(numbers)
    return f"{least:{form}} to {most:{form}}"


def summary() -> str:
    lora, full = Adapter("linear"), Adapter("full")

    def share(adapter: Adapter, tp: int) -> str:
        ratios = (operations(s, adapter, tp) / operations(s, None, tp) - 1 for s in SHAPES)
        return span((100 * ratio for ratio in ratios), ".1f")

    small, most = SHAPES[0], GPUS[-1]
    ddp, default, by_N = (Parallelism(k, most) for k in ("DDP", "FSDP2", "FSDP2 by N"))
    h = span((100 * (sent(s, full, ddp) / sent(s, lora, ddp) - 1) for s in SHAPES), ".2f")
    base = sent(small, None, default)
    rows, columns = (f"{(sent(small, lora, p) - base) / 1e9:.2g}" for p in (default, by_N))
    u = adapter_bytes(small, full, ddp) - adapter_bytes(small, lora, ddp)
    points = (
        f"PERA full sends {h} % more than LoRA under DDP: the gradient of h.",
        f"Its operations are {share(full, 1)} % of the base's (LoRA's {share(lora, 1)} %). On "
        f"{NODE} ranks of TP they are {share(full, NODE)} % ({share(lora, NODE)} %): each rank "
        "projects all of x of a column-wise layer, and makes all of y of a row-wise one.",
        f"At {TOKENS} tokens it keeps {u / 1e9:.2g} GB more than LoRA in {small.name}, u, beside "
        f"{input_bytes(small, 1) / 1e9:.2g} GB of x that both keep.",
        f"FSDP2 shards A (r, N) by its r rows, and pads where there are more ranks: on {most} "
        f"ranks the adapters of {small.name}, LoRA's or PERA's, cost {rows} GB beside the base's "
        f"{base / 1e9:.2g} GB. Sharded by N they cost {columns} GB.",
    )
    wrap = textwrap.TextWrapper(106, "- ", "  ", break_on_hyphens=False)
    return "\n".join(map(wrap.fill, points))


def counted() -> str:
    """Bytes of the collectives of two ranks, as they were counted and by the formulas."""
    lines = []
    rows = {(row["kind"], row["terms"]): row for row in read(FILE)}
    for (kind, terms), row in rows.items():
        adapter = None if terms is None else Adapter(terms, row["r"])
        p = Parallelism(kind, row["ranks"])
        own = payload(Shape(**row["shape"]), adapter, p, row["tokens"])
        for name in sorted(row["bytes"] | {name: 0 for name, size in own.items() if size}):
            cells = (row["bytes"].get(name, 0), own.get(name, 0))
            lines.append((kind, NAMES.get(terms, "base"), name.replace("_", "-"), *cells))
    caption = (
        "{layers} layers, hidden {hidden}, k and v {kv}, intermediate {intermediate}, vocabulary "
        "{vocabulary}; r={r}, {tokens} tokens on each of {ranks} ranks. torch {torch}, commit "
        "{commit}."
    ).format(**row["shape"], **row)
    head = ("", "adapters", "collective", "bytes, counted", "by the formulas")
    return f"{table(head, lines, 3)}\n\n{textwrap.fill(caption, 106)}"


def kept() -> str:
    """What a decoder layer with PERA full was measured to keep beside x and u as they are here."""
    found = {row["contender"]: row for row in read(DECODER) if row["dtype"] in DTYPES}
    row, frozen = found["auto"], found["frozen"]
    more = (row["saved_mib"] - frozen["saved_mib"]) * MIB
    shape = Shape("", 1, row["n"], 0, row["m"])
    u = len(TARGETS) * row["T"] * expanded_rank(row["r"], row["terms"]) * BASE.itemsize
    text = (
        f"A decoder layer of the [benchmarks](README.md) (hidden {row['n']}, intermediate "
        f"{row['m']}, r={row['r']}, {row['T']} tokens, PERA full) was measured to keep "
        f"{more / 1e6:.2f} MB for the backward that the frozen one does not. By the formulas x and "
        f"u have {(input_bytes(shape, 1, row['T']) + u) / 1e6:.2f} MB (on a CPU u has K lanes, not "
        "rounded up)."
    )
    return textwrap.fill(text, 106, break_on_hyphens=False)


def documents() -> dict[Path, str]:
    """What the page should read, by its path."""
    parts: dict[str, Callable[[], str]] = {"summary": summary, "compute": compute}
    parts |= {"counted": counted, "kept": kept}
    parts |= {shape.name: partial(of_shape, shape) for shape in SHAPES}
    return {PAGE: render(PAGE.read_text(), parts, PAGE.name)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    given = parser.parse_args(arguments)
    return write(documents(), "benchmarks.scaling", check=given.check)


if __name__ == "__main__":
    sys.exit(main())
