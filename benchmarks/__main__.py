"""``python -m benchmarks``: judge every contender, time those that pass, print and keep rows."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from pera_kernels import backends
from pera_kernels.terms import TERMS
from tools.numerics import Case, make_inputs

from . import contenders, results, timing
from .contenders import FROZEN, Contender
from .results import Row, make_row


@dataclass(frozen=True)
class Preset:
    T: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    rounds: int
    ranks: tuple[int, ...] = (16,)
    terms: tuple[str, ...] = ("full",)
    dropout: tuple[float, ...] = (0.0,)


PRESETS = {
    ("quick", "cpu"): Preset((64,), ((256, 256),), ("float32",), 5),
    ("default", "cpu"): Preset((1, 128, 1024), ((1024, 1024),), ("float32",), 20),
    ("quick", "cuda"): Preset((512,), ((4096, 4096),), ("bfloat16",), 10),
    ("default", "cuda"): Preset((1, 512, 4096, 16384), ((4096, 4096),), ("bfloat16",), 30),
}

DESCRIPTION = "Judge every contender, time those that pass, print a table and keep the rows."
EPILOG = """\
Lists are separated by commas. The frozen layer is always timed: it is what the others are
compared with. A contender that fails the numeric rule is not timed, and the exit status is 1.
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse_list(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(parse(word.strip()) for word in text.split(",")))

    return parse_list


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= minimum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum}")
        return int(text)

    return parse


def _shape(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1024x4096 (in x out)")
    return int(found[1]), int(found[2])


def _probability(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) < 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1)")


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def _device(text: str) -> torch.device:
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"no {text!r} here: PyTorch sees {count} CUDA devices")
    return torch.device("cuda", device.index or 0)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    names = [contender.name for contender in contenders.CONTENDERS]
    phases = _list_of(_one_of(timing.PHASES))
    add = parser.add_argument
    add("--device", type=_device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--preset", choices=("quick", "default"), default="default", help="what is not given below")
    add("--T", type=_list_of(_whole(1)), help="tokens, such as 1,512")
    add("--shapes", type=_list_of(_shape), help="in x out features, such as 1024x4096")
    add("--ranks", type=_list_of(_whole(1)), help="ranks, such as 4,16")
    add("--terms", type=_list_of(_one_of(TERMS)), help=", ".join(TERMS))
    add("--dtypes", type=_list_of(_one_of(tuple(results.DTYPES))), help=", ".join(results.DTYPES))
    add("--dropout", type=_list_of(_probability), help="probabilities, such as 0,0.05")
    add("--phases", type=phases, default=timing.PHASES, help=", ".join(timing.PHASES))
    add("--only", type=_list_of(_one_of(names)), metavar="NAME,...", help=", ".join(names))
    add("--rounds", type=_whole(2), help="how often every contender has its turn")
    add("--out", type=Path, help="append rows here (benchmarks/results/<device>.jsonl)")
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    axes = (options.dtypes, options.shapes, options.terms, options.ranks, options.dropout)
    return [
        Case(
            terms=terms,
            r=r,
            T=T,
            N=n,
            M=m,
            dtype=results.DTYPES[dtype][0],
            adapter_dtype=results.DTYPES[dtype][1],
            dropout_p=dropout,
            scale=1.0,
        )
        for dtype, (n, m), terms, r, dropout, T in itertools.product(*axes, options.T)
    ]


def run_case(
    case: Case,
    chosen: list[Contender],
    device: torch.device,
    phases: tuple[str, ...],
    rounds: int,
    host: results.Host,
) -> list[Row]:
    """Rows of one case: one for each contender that failed the gate, then those that were timed."""
    gate = contenders.Gate(device)
    failures = {contender.name: gate.failure(contender, case) for contender in chosen}
    del gate
    rows = [
        make_row(contender, case, host, "gate", status="failed", note=note)
        for contender in chosen
        if (note := failures[contender.name])
    ]
    sound = {contender.name: contender for contender in chosen if not failures[contender.name]}
    sets = timing.input_sets(make_inputs(case, device), device)
    layers = {name: [own.build(case, inputs) for inputs in sets] for name, own in sound.items()}
    saved = {name: timing.saved_mib(own[0], sets[0]) for name, own in layers.items()}
    for phase in phases:
        peak = {n: timing.peak_mib(own[0], sets[0], phase, device) for n, own in layers.items()}
        timings = timing.time_phase(
            layers,
            sets,
            phase,
            rounds=rounds,
            device=device,
            capturable=frozenset(name for name, own in sound.items() if own.capturable),
        )
        frozen = {found.graph: found for found in timings if found.name == FROZEN}
        for found in sorted(timings, key=lambda found: list(sound).index(found.name)):
            like = frozen.get(found.graph)
            rows.append(
                make_row(
                    sound[found.name],
                    case,
                    host,
                    phase,
                    times=(found.median, *found.spread),
                    ratio=None if like is None else found.ratio_to(like),
                    peak=peak[found.name],
                    saved=saved[found.name],
                    graph=found.graph,
                    rounds=rounds,
                    note=found.note,
                )
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are never timed; unset it")
    device = options.device
    preset = PRESETS[options.preset, device.type]
    for name, value in vars(preset).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    path = options.out or results.default_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")

    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Graphs cannot be captured on the default stream: see timing._capture.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        host = results.host(device)
        print(f"{host.device}  torch {host.torch}  triton {host.triton}  commit {host.commit}")
        failed = False
        for case in _cases(options):
            chosen, reasons = contenders.select(case, device, options.only)
            rows = run_case(case, chosen, device, options.phases, options.rounds, host)
            results.append(path, rows)
            print(f"\n{results.table(rows)}")
            for name, reason in reasons.items():
                print(f"{name}: not timed: {reason}")
            sys.stdout.flush()
            failed = failed or any(row.status != "timed" for row in rows)
        print(f"\nrows appended to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
