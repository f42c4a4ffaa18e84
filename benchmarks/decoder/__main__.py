"""``python -m benchmarks.decoder``: a training step of one decoder layer under every adapter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pera_kernels import backends

from .. import results
from ..gate import Judgement
from ..layers import FROZEN, Layer
from ..memory import peak_bytes
from ..options import OneLineParser, list_of, one_of, probability, whole
from ..options import device as parse_device
from ..overhead import launches
from . import adapters, report
from .adapters import Contender
from .gate import Gate
from .layer import TARGETS, Base, Problem, missing
from .measure import PHASES, phase_call, saved_bytes, time_calls

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20


@dataclass(frozen=True)
class Preset:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int
    dtypes: tuple[str, ...]
    rounds: int


PRESETS = {
    "llama3-8b": Preset(4096, 14336, 32, 8, 4, 2048, ("bfloat16",), 20),
    # An eighth of it in every width.
    "cpu": Preset(512, 1792, 8, 2, 2, 256, ("float32", "bfloat16"), 20),
}

SIZES = {
    "hidden": "width of the hidden states",
    "intermediate": "width of the feed-forward part",
    "heads": "of the queries",
    "kv_heads": "of keys and values",
    "batch": "sequences in a step",
    "sequence": "tokens in each",
}

DESCRIPTION = f"""\
A training step of one decoder layer, built from transformers with random weights and adapted on
{", ".join(TARGETS)}: time, peak memory, and what is kept for the
backward, beside the frozen layer (forward and the gradient of the hidden states).
"""
EPILOG = """\
In half precision every backend is timed with adapters in that dtype and with float32 adapters. A
contender that fails the numeric rule in the layer is not timed, and the exit status is 1.

examples:
  python -m benchmarks.decoder
  python -m benchmarks.decoder --preset llama3-8b --device cuda --checkpointing
  python -m benchmarks.decoder --preset cpu --hidden 256 --intermediate 896 --only torch,peft-lora
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.decoder",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(contender.name for contender in adapters.CONTENDERS))
    add = parser.add_argument
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--preset", choices=tuple(PRESETS), help="what is not given below (by device)")
    for name, meaning in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=whole(1), metavar="N", help=meaning)
    add("--rank", type=whole(1), default=16, metavar="R", help="of every adapter (16)")
    add("--dtypes", type=list_of(one_of(tuple(DTYPES))), help=f"of the layer: {', '.join(DTYPES)}")
    add("--dropout", type=probability, default=0.0, metavar="P", help="in the adapters (0)")
    add("--checkpointing", action="store_true", help="recompute the layer in the backward")
    add("--only", type=list_of(one_of(names)), metavar="NAME,...", help=", ".join(names))
    add("--rounds", type=whole(2), metavar="N", help="how often every contender has its turn")
    add("--out", type=Path, help="append rows here (benchmarks/results/decoder-<device>.jsonl)")
    return parser


def _check_sizes(options: argparse.Namespace) -> str | None:
    """Why there is no such layer."""
    if options.hidden % (2 * options.heads):
        return (
            f"--hidden {options.hidden} is not an even multiple of --heads {options.heads}: "
            "rotary positions need heads of even size"
        )
    if options.heads % options.kv_heads:
        return f"--heads {options.heads} is not a multiple of --kv-heads {options.kv_heads}"
    return None


def _select(
    problem: Problem, device: torch.device, only: tuple[str, ...] | None
) -> tuple[list[Contender], dict[str, str]]:
    """Who is timed, and why others who were meant are not. The frozen layer always is."""
    chosen, reasons = [], {}
    for contender in adapters.contenders(problem):
        if only is not None and contender.name not in (FROZEN, *only):
            continue
        if reason := contender.unavailable(problem, device):
            reasons[contender.name] = reason
        else:
            chosen.append(contender)
    return chosen, reasons


def _judge(gate: Gate, contender: Contender, base: Base) -> tuple[Layer | None, Judgement]:
    """The layer, if it may be timed."""
    try:
        layer = contender.build(base)
        judgement = gate.judgement(contender, layer)
    except Exception as error:
        return None, Judgement.of(error)
    return None if judgement.failure else layer, judgement


def run_problem(
    problem: Problem, chosen: list[Contender], rounds: int, host: results.Host, device: torch.device
) -> list[results.Row]:
    """Rows of one problem: those that failed the gate, then those that were timed."""
    base = Base(problem, device)
    gate = Gate(base)
    layers, judged, rows = {}, {}, []
    for own in chosen:
        layer, judged[own] = _judge(gate, own, base)
        if layer is None:
            rows.append(report.failed_row(own, problem, host, judged[own]))
        else:
            layers[own] = layer
    # Its float64 results take more memory than a layer does.
    del gate
    saved = {own: saved_bytes(layer, base.x, device) / MIB for own, layer in layers.items()}
    for phase in PHASES:
        calls = {own: phase_call(layer, base.x, base.dy, phase) for own, layer in layers.items()}
        for call in calls.values():
            # Libraries allocate and tune in the first call, the optimizer makes its state.
            call()
            call()
        peak = {own: peak_bytes(call, device) / MIB for own, call in calls.items()}
        launched = launches({str(n): call for n, call in enumerate(calls.values())}, device)
        timings = time_calls(calls, rounds, device)
        frozen = next(timing for own, timing in timings.items() if own.name == FROZEN)
        for (own, timing), count in zip(timings.items(), launched.values(), strict=True):
            rows.append(
                report.timed_row(
                    own,
                    problem,
                    host,
                    phase,
                    timing,
                    ratio=timing.ratio_to(frozen),
                    peak=peak[own],
                    saved=saved[own],
                    launches=count,
                    error_ratio=judged[own].error_ratio,
                )
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are never timed; unset it")
    if reason := missing("transformers"):
        parser.error(f"no decoder layer: {reason}")
    device = options.device
    preset = PRESETS[options.preset or ("cpu" if device.type == "cpu" else "llama3-8b")]
    for name, value in asdict(preset).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if reason := _check_sizes(options):
        parser.error(reason)
    problems = [
        Problem(
            **{name: getattr(options, name) for name in SIZES},
            r=options.rank,
            dtype=DTYPES[dtype],
            dropout=options.dropout,
            checkpointing=options.checkpointing,
        )
        for dtype in options.dtypes
    ]
    path = options.out or report.default_out(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host = results.host(device)
    print(f"{host.device}  torch {host.torch}  triton {host.triton}  commit {host.commit}")
    failed = False
    for problem in problems:
        chosen, reasons = _select(problem, device, options.only)
        rows = run_problem(problem, chosen, options.rounds, host, device)
        results.append(path, rows)
        print(f"\n{report.terminal(rows, problem)}")
        for name, reason in reasons.items():
            print(f"{name}: not timed: {reason}")
        sys.stdout.flush()
        failed = failed or any(row.status != "timed" for row in rows)
    print(f"\nrows appended to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
