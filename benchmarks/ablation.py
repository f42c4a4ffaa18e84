"""What each optimisation of the ``torch`` backend buys: every one against the same call without it.

    python -m benchmarks.ablation

Both sides take turns in one process, on layers of their own; the results are compared before they
are timed. ``gain`` is the time without over the time with, the median over the rounds. The
predictions are operation counts at equal speed, or bytes over the bandwidth of a copy; they were
written down before the measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels import functional, lean, lean_adapters, lean_cache, lean_factors, plans

from . import results
from .options import OneLineParser, list_of, one_of, whole

__all__ = ["ABLATIONS", "Ablation", "measure"]

Call = Callable[[], list[torch.Tensor]]
Off = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Ablation:
    """One optimisation, where it applies, and how it is turned ``off`` while a call is made.

    ``phase`` is "both" (forward and backward of everything) or "eval". ``out`` has the out features
    of the layers, several of which share x as a group. ``trained_h=False`` freezes h at zero. Of
    ``models`` models every call takes the next: with enough of them nothing stays in the caches.
    """

    name: str
    predicted: float
    off: Off
    T: int
    n: int = 1024
    out: tuple[int, ...] = (1024,)
    r: int = 16
    dtype: str = "float32"
    phase: str = "both"
    trained_h: bool = True
    models: int = 1


def _set(owner: Any, name: str, value: Any) -> Off:
    return lambda: mock.patch.object(owner, name, value)


@contextlib.contextmanager
def _never_zero():
    with (
        mock.patch.object(functional, "frozen_at_zero", lambda h: False),
        mock.patch.object(lean_adapters, "_all_zero", lambda hs: False),
    ):
        yield


def _keeping_u() -> contextlib.AbstractContextManager[Any]:
    original = lean_adapters.add_update
    return mock.patch.object(
        lean,
        "add_update",
        lambda ys, x, adapters, keep_u: original(ys, x, adapters, True),
    )


def _apart() -> contextlib.AbstractContextManager[Any]:
    from pera_kernels.groups import InputGroup

    return mock.patch.object(InputGroup, "output_of", lambda self, layer, x: None)


ABLATIONS = (
    Ablation(
        "expansions kept while parameters are unchanged",
        1.1,
        _set(lean_cache, "CALLS_BEFORE", 10**9),
        T=64,
        phase="eval",
    ),
    Ablation(
        "Gram matrices instead of expansions for a few tokens",
        1.5,
        _set(lean_adapters, "FEW_TOKENS", 0),
        T=1,
    ),
    Ablation(
        "transposed base product",
        1.15,
        _set(lean, "TRANSPOSED_TOKENS", range(0)),
        T=32,
    ),
    Ablation(
        "contraction gathered in one tensor while that is small",
        1.02,
        _set(lean_factors, "GATHER_ELEMENTS", 0),
        T=64,
        r=8,
    ),
    Ablation(
        "contraction by offsets where one tensor would be large",
        1.3,
        _set(lean_factors, "GATHER_ELEMENTS", 10**9),
        T=64,
    ),
    Ablation(
        "without gradients, coefficients folded into φ(B)",
        1.15,
        _keeping_u,
        T=64,
        dtype="bfloat16",
        phase="eval",
    ),
    Ablation(
        "float32 expansions for a few tokens in bfloat16",
        1.18,
        _set(lean_adapters, "SINGLE_TOKENS", 0),
        T=1,
        dtype="bfloat16",
        phase="eval",
    ),
    Ablation(
        "no expansions for a few tokens at high ranks",
        1.2,
        _set(lean_adapters, "GRAM_RANK", 10**9),
        T=1,
        r=32,
        phase="eval",
        models=24,
    ),
    Ablation(
        "auto composes: eval",
        1.25,
        _set(plans, "composes", lambda *arguments: False),
        T=4096,
        phase="eval",
    ),
    Ablation(
        "auto composes: training",
        1.08,
        _set(plans, "composes", lambda *arguments: False),
        T=4096,
    ),
    Ablation(
        "h frozen at zero leaves its pairs out",
        1.38,
        _never_zero,
        T=512,
        trained_h=False,
    ),
    Ablation(
        "q, k, v as a group",
        1.05,
        _apart,
        T=512,
        out=(1024, 256, 256),
    ),
)


class _Projections(nn.Module):
    """Layers on one input, evaluated as an attention block evaluates q, k and v."""

    def __init__(self, n: int, out: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        for name, m in zip("qkv", out, strict=False):
            self.add_module(name, nn.Linear(n, m, dtype=dtype))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q(x), self.k(x), self.v(x)]  # type: ignore[operator]


class _One(nn.Module):
    def __init__(self, n: int, out: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(n, out[0], dtype=dtype)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q(x)]


def _call(ablation: Ablation) -> Call:
    """The call on models of its own, the same numbers every time it is made."""
    calls = itertools.cycle([_call_of_one(ablation) for _ in range(ablation.models)])
    return lambda: next(calls)()


def _call_of_one(ablation: Ablation) -> Call:
    torch.manual_seed(0)
    dtype = getattr(torch, ablation.dtype)
    kind = _One if len(ablation.out) == 1 else _Projections
    model = kind(ablation.n, ablation.out, dtype)
    pk.inject(model, list("qkv")[: len(ablation.out)], ablation.r, backend="torch")
    for name, parameter in model.named_parameters():
        if name.endswith("pera_h") and not ablation.trained_h:
            parameter.requires_grad_(False)
        elif "pera_" in name:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(ablation.T, ablation.n).to(dtype).requires_grad_(ablation.phase == "both")
    dys = [torch.randn(ablation.T, m).to(dtype) for m in ablation.out]
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def evaluate() -> list[torch.Tensor]:
        with torch.no_grad():
            return model(x)

    def both() -> list[torch.Tensor]:
        ys = model(x)
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]

    return both if ablation.phase == "both" else evaluate


def measure(ablation: Ablation, rounds: int) -> dict[str, Any]:
    """Times with and without.

    Raises:
        RuntimeError: the two do not give the same results up to rounding.
    """
    calls = {"with": _call(ablation), "without": _call(ablation)}
    contexts: dict[str, Off] = {"with": contextlib.nullcontext, "without": ablation.off}
    found = {}
    for side, call in calls.items():
        with contexts[side]():
            # Expansions are kept from the third call on.
            found[side] = [call() for _ in range(4 * ablation.models)][-1]
    tolerance = 32 * torch.finfo(getattr(torch, ablation.dtype)).eps
    for ours, theirs in zip(found["with"], found["without"], strict=True):
        if float((ours - theirs).abs().max()) > tolerance * float(theirs.abs().max()):
            raise RuntimeError(f"{ablation.name}: the result without it is another")
    samples: dict[str, list[float]] = {side: [] for side in calls}
    order, sides = random.Random(0), list(calls)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(sides)
            for side in sides:
                with contexts[side]():
                    start = time.perf_counter()
                    calls[side]()
                    samples[side].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    gains = [b / a for a, b in zip(samples["with"], samples["without"], strict=True)]
    tenths = statistics.quantiles(gains, n=10)
    return {
        "with_ms": statistics.median(samples["with"]),
        "without_ms": statistics.median(samples["without"]),
        "gain": statistics.median(gains),
        "gain_p20": tenths[1],
        "gain_p80": tenths[7],
    }


def _row(ablation: Ablation, rounds: int) -> dict[str, Any]:
    own = asdict(ablation)
    del own["off"]
    measured = {k: float(f"{v:.4g}") for k, v in measure(ablation, rounds).items()}
    return {**own, **measured, "rounds": rounds, **asdict(results.host(torch.device("cpu")))}


def table(path: Path) -> str:
    """The latest row of every optimisation."""
    if not path.exists():
        return "Not measured."
    latest = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    rows = [latest[own.name] for own in ABLATIONS if own.name in latest]
    head = ["optimisation", "case", "predicted", "measured (p20 to p80)"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        out = ", ".join(map(str, row["out"]))
        case = f"{row['phase']}, T={row['T']}, {row['n']}→{out}, r={row['r']}, {row['dtype']}"
        if row["models"] > 1:
            case += f", {row['models']} layers in turn"
        spread = f"{row['gain']:.2f} ({row['gain_p20']:.2f} to {row['gain_p80']:.2f})"
        lines.append(f"| {row['name']} | {case} | {row['predicted']:.2f} | {spread} |")
    where = dict.fromkeys(f"{r['device']}, torch {r['torch']}, {r['date'][:10]}" for r in rows)
    return "\n".join([*lines, "", f"Time without over time with. {'; '.join(where)}."])


def default_out() -> Path:
    return results.default_file(torch.device("cpu")).with_name("ablation-cpu.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = tuple(own.name for own in ABLATIONS)
    add = parser.add_argument
    add("--only", type=list_of(one_of(names)), metavar="NAME,...", help="; ".join(names))
    add("--rounds", type=whole(10), default=60, help="how often each side has its turn (60)")
    add("--out", type=Path, default=default_out(), help="append rows here")
    given = parser.parse_args(arguments)
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        lines = given.out.open("a", encoding="utf-8")
    except OSError as error:
        parser.error(f"argument --out: cannot write {given.out}: {error.strerror}")
    with lines:
        for ablation in ABLATIONS:
            if given.only and ablation.name not in given.only:
                continue
            row = _row(ablation, given.rounds)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(
                f"{row['gain']:6.2f}  predicted {row['predicted']:.2f}  {row['with_ms']:8.3f} ms  "
                f"{row['name']}",
                flush=True,
            )
    print(f"rows appended to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
