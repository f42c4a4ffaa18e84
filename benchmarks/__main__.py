"""``python -m benchmarks``: judge every contender, time those that pass, print and keep rows."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pera_kernels import backends
from pera_kernels.terms import TERMS

from . import contenders, options, presets, results, suite, timing
from .ceilings import Ceilings
from .presets import Planned, Preset

DESCRIPTION = "Judge every contender, time those that pass, print a table and keep the rows."
EPILOG = """\
Lists are separated by commas; an axis that is given replaces the preset's. The frozen layer is
always timed: it is what the others are compared with. A contender that fails the numeric rule is
not timed, and the exit status is 1.
"""


def _parser() -> argparse.ArgumentParser:
    parser = options.OneLineParser(
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    names = [contender.name for contender in contenders.CONTENDERS]
    list_of, one_of, whole = options.list_of, options.one_of, options.whole
    add = parser.add_argument
    add("--device", type=options.device, default="auto", help="auto, cpu, cuda, cuda:N")
    add(
        "--preset",
        choices=tuple(presets.PRESETS),
        help="what is not given below (quick on a CPU, gpu on a GPU)",
    )
    add("--quick", action="store_const", const="quick", dest="preset", help="--preset quick")
    add("--T", type=list_of(whole(1)), help="tokens, such as 1,512")
    add("--shapes", type=list_of(options.shape), help="in x out features, such as 1024x4096")
    add("--ranks", type=list_of(whole(1)), help="ranks, such as 4,16")
    add("--terms", type=list_of(one_of(TERMS)), help=", ".join(TERMS))
    add("--dtypes", type=list_of(one_of(tuple(results.DTYPES))), help=", ".join(results.DTYPES))
    add("--dropout", type=list_of(options.probability), help="probabilities, such as 0,0.05")
    add("--phases", type=list_of(one_of(timing.PHASES)), help=", ".join(timing.PHASES))
    add("--only", type=list_of(one_of(names)), metavar="NAME,...", help=", ".join(names))
    add("--rounds", type=whole(2), help="how often every contender has its turn, at most")
    add("--budget", type=whole(1), metavar="SECONDS", help="start no case that would end later")
    add("--resume", action="store_true", help="skip what --out has of this commit and device")
    add("--out", type=Path, help="append rows here (benchmarks/results/<device>.jsonl)")
    return parser


def _preset(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Preset:
    kind = given.device.type
    name = given.preset or presets.DEFAULT[kind]
    preset = presets.PRESETS[name]
    if kind not in preset.grids:
        parser.error(f"--preset {name} is for {', '.join(preset.grids)}; the device is {kind}")
    return preset


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = _parser()
    given = parser.parse_args(arguments)
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are never timed; unset it")
    device = given.device
    preset = _preset(parser, given)
    asked = {axis: vars(given)[axis] for axis in presets.AXES if vars(given)[axis] is not None}
    planned = presets.plan(preset.grids[device.type], asked)
    path = given.out or results.default_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")

    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            # Tearing CUPTI down after a profile breaks the capture of CUDA graphs that follows.
            os.environ.setdefault("TEARDOWN_CUPTI", "0")
            torch.cuda.set_device(device)
            # Graphs cannot be captured on the default stream: see timing._capture.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        host = results.host(device)
        print(f"{host.device}  torch {host.torch}  triton {host.triton}  commit {host.commit}")
        run = _Run(device, host, path, given, preset, began)
        failed = run.all(planned)
        print(f"\nrows appended to {path} after {time.monotonic() - began:.0f} s")
    return int(failed)


class _Run:
    """The cases of one call, one after the other."""

    def __init__(
        self,
        device: torch.device,
        host: results.Host,
        path: Path,
        given: argparse.Namespace,
        preset: Preset,
        began: float,
    ) -> None:
        self.device, self.host, self.path, self.only = device, host, path, given.only
        self.rounds = given.rounds or preset.rounds
        self.budget = given.budget or preset.budget
        self.began = began
        self.earlier = results.read(path) if given.resume else []
        self.ceilings = Ceilings(device)

    def all(self, planned: Sequence[Planned]) -> bool:
        """Whether a contender failed the gate. Stops where the next case would pass the budget."""
        failed, longest = False, 0.0
        for number, case in enumerate(planned):
            start = time.monotonic()
            if self.budget and start - self.began + longest > self.budget:
                _say_left_out(planned[number:], self.budget)
                break
            failed = self.one(case) or failed
            longest = max(longest, time.monotonic() - start)
        return failed

    def one(self, planned: Planned) -> bool:
        case = planned.case
        chosen, reasons = contenders.select(case, self.device, self.only, planned.without)
        if suite.is_done(case, chosen, planned.phases, self.host, self.earlier):
            print(f"\n{results.title(case)}: done before, see {self.path}")
            return False
        rows = suite.run_case(
            case, chosen, self.device, planned.phases, self.rounds, self.host, self.ceilings
        )
        results.append(self.path, rows)
        print(f"\n{results.title(case)}\n{results.table(rows)}")
        for name, reason in reasons.items():
            print(f"{name}: not timed: {reason}")
        for contender in chosen:
            if "backward" in planned.phases and not contender.repeats_backward:
                print(f"{contender.name}: no backward alone: it runs only once after a forward")
        sys.stdout.flush()
        return any(row.status != "timed" for row in rows)


def _say_left_out(planned: Sequence[Planned], budget: int) -> None:
    print(f"\nthe budget of {budget} s is used up; left out, {len(planned)}:")
    for left in planned:
        print(f"  {results.title(left.case)}")


if __name__ == "__main__":
    sys.exit(main())
