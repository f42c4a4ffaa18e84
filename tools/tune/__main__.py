"""``python -m tools.tune``: find tiles for the kernels of one GPU, and the table they make."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.options import OneLineParser, list_of, one_of, whole
from pera_kernels import backends, configs, plans
from pera_kernels.configs import Tile
from tools.compile_report import SHARED_LIMIT

from . import limits, tables
from .chips import architecture, chip_here, chip_named
from .offline import Chip, Compilers
from .search import Clock, Decision, OutOfTime, Search, StaticScorer, TimedScorer
from .static import MATRIX_RATE

DESCRIPTION = """\
Find tiles for the kernels of one GPU. Candidates are compiled in parallel; those that spill or do
not fit are dropped, the others judged by the numeric rule and timed on a set of problems beside
the present tile. The best replaces it if it is at least 1 % faster in the geometric mean, nowhere
10 % slower, and clean in every launch that would ship with it. With --static nothing is timed:
candidates are ranked by a cost model on their machine code (tools/tune/static.py), and one has to
win by 10 % and to lose nowhere.
"""
EPILOG = """\
Lists are separated by commas. "limits" among --kernels measures from how many tokens on an
expansion is better read from memory by a projection too (pera_kernels/plans.py), and prints it.

examples:
  python -m tools.tune --budget 480 --write           every kernel, on this GPU
  python -m tools.tune --kernels project --classes half
  python -m tools.tune --static --arch sm_80 --ranks 16
"""
LIMITS = "limits"
# The most important first: a budget may end before the last.
ORDER = (
    ("half", ("accumulate", "project", "contract", "project_expanded", LIMITS)),
    ("half", ("expand", "compose")),
    ("mixed", ("project",)),
    ("single", configs.KERNELS),
)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m tools.tune",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = parser.add_argument, whole(1)
    names = (*configs.KERNELS, LIMITS)
    add("--arch", type=architecture, default="auto", help="auto: the GPU here; " + _archs())
    add("--kernels", type=list_of(one_of(names)), metavar="NAME,...", help=", ".join(names))
    add("--classes", type=list_of(one_of(configs.CLASSES)), help=", ".join(configs.CLASSES))
    add("--ranks", type=list_of(positive), help="only problems of these ranks, of 4, 16, 32")
    add("--static", action="store_true", help="no GPU: rank by compiler reports alone")
    add("--candidates", type=positive, default=48, metavar="N", help="tried beside each tile (48)")
    add("--rounds", type=whole(2), default=12, metavar="N", help="in which tiles take turns (12)")
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="compile in so many processes")
    add("--budget", type=positive, metavar="SECONDS", help="stop then, with what there is")
    add("--resume", action="store_true", help="skip what --out has of these kernels and device")
    add("--out", type=Path, metavar="DIR", help="append rows there (benchmarks/results)")
    add("--write", action="store_true", help="write the table; else only say what would change")
    add("--tables", type=Path, default=configs.TABLES, metavar="DIR", help="where --write puts it")
    return parser


def _archs() -> str:
    return "or one of " + ", ".join(SHARED_LIMIT)


@dataclass(frozen=True)
class Target:
    """The chip that is tuned for, its name in rows and files, and the device if it is here."""

    chip: Chip
    name: str
    device: torch.device | None


def _target(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Target:
    if given.static:
        if given.arch not in MATRIX_RATE:
            parser.error(
                f"argument --arch: --static reads machine code of {', '.join(MATRIX_RATE)}; "
                f"got {given.arch}"
            )
        return Target(chip_named(given.arch), f"static {given.arch}", None)
    if not torch.cuda.is_available():
        parser.error("no GPU to time on; --static ranks by compiler reports alone")
    try:
        chip = chip_here()
    except ValueError as error:
        parser.error(f"argument --arch: {error}")
    if given.arch not in ("auto", chip.arch):
        parser.error(
            f"argument --arch: the GPU here is {chip.arch}, not {given.arch}; --static needs none"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return Target(chip, torch.cuda.get_device_name(device), device)


def _plan(given: argparse.Namespace, table: str) -> list[tuple[str, str]]:
    """(kernel, class) in order; a class without a tile of its own is tuned with ``half``."""
    entries = configs.load_table(table)
    planned = []
    for kind, kernels in ORDER:
        for kernel in kernels:
            if given.kernels is not None and kernel not in given.kernels:
                continue
            if given.classes is not None and kind not in given.classes:
                continue
            if kernel == LIMITS and (given.static or given.ranks):
                continue
            if kernel == LIMITS or (kernel, kind) in entries:
                planned.append((kernel, kind))
    return planned


class Run:
    """One call: the kernels one after the other, rows kept as each is done."""

    def __init__(self, given: argparse.Namespace, target: Target, clock: Clock) -> None:
        self.given, self.target, self.clock = given, target, clock
        folder = given.out or results.default_file(torch.device("cpu")).parent
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
        self.path = folder / f"tune-{slug}.jsonl"
        host = results.host(target.device or torch.device("cpu"))
        self.stamp = {**asdict(host), "device": target.name, "sources": tables.sources()}
        self.decisions: list[Decision] = []

    def all(self, planned: Sequence[tuple[str, str]]) -> bool:
        """Whether a kernel could not be tuned. Stops where the budget ends, with what there is."""
        failed = False
        done = self._earlier() if self.given.resume else {}
        chip, left = self.target.chip, list(planned)
        with ExitStack() as stack:
            if self.target.device is not None:
                # Graphs cannot be captured on the default stream.
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self.target.device)))
            compilers = stack.enter_context(
                Compilers(chip, self.given.jobs, disassemble=self.given.static)
            )
            try:
                for kernel, kind in planned:
                    if (kernel, kind) in done:
                        self._take(done[kernel, kind], "done before")
                    elif kernel == LIMITS:
                        self._limits()
                    else:
                        try:
                            self._tune(compilers, kernel, kind)
                        except ValueError as error:
                            failed = True
                            print(f"{kernel} {kind}: not tuned: {error}", file=sys.stderr)
                    left.pop(0)
            except OutOfTime:
                names = ", ".join(f"{kernel} {kind}" for kernel, kind in left)
                print(f"\nthe budget of {self.given.budget} s is used up; left out: {names}")
        return failed

    def _earlier(self) -> dict[tuple[str, str], Decision]:
        """What rows of the same kernels, compiler and device decided."""
        same = ("device", "triton", "sources")
        found = {}
        for row in tables.read_rows(self.path):
            if row["what"] != "decision" or any(row[key] != self.stamp[key] for key in same):
                continue
            values = {name: row[name] for name in Decision.__dataclass_fields__}
            values["present"], values["chosen"] = (Tile(**row[n]) for n in ("present", "chosen"))
            found[row["kernel"], row["kind"]] = Decision(**values)
        return found

    def _tune(self, compilers: Compilers, kernel: str, kind: str) -> None:
        start = time.monotonic()
        device, given = self.target.device, self.given
        scorer: StaticScorer | TimedScorer = StaticScorer(compilers)
        if device is not None:
            scorer = TimedScorer(self.target.chip.table, device, given.rounds)
        search = Search(compilers, scorer, self.clock, count=given.candidates, ranks=given.ranks)
        decision = search.run(kernel, kind)
        self._append([*search.rows, decision.row()])
        self._take(decision, f"{time.monotonic() - start:.0f} s")

    def _take(self, decision: Decision, note: str) -> None:
        self.decisions.append(decision)
        present, chosen = tables.show_tile(decision.present), tables.show_tile(decision.chosen)
        outcome = "stays" if decision.chosen == decision.present else f"-> {chosen}"
        print(
            f"{decision.kernel:<20}{decision.kind:<8}{present:<22}{outcome:<26}"
            f"{decision.ratio:>7.3f}{decision.tried:>7}{decision.dropped:>9}  {note}",
            flush=True,
        )

    def _limits(self) -> None:
        """Times both ways of an update; what follows is printed: no table holds it."""
        device = self.target.device
        assert device is not None
        times: dict[int, dict[str, float]] = {}
        rows: list[dict[str, Any]] = []
        print(f"update, ms {'tokens':>8}" + "".join(f"{way:>10}" for way in limits.WAYS))
        for T in self.clock.watch(limits.TOKENS):
            found = limits.time_ways(T, device, self.given.rounds)
            times[T] = {way: timed.median for way, timed in found.items()}
            for way, timed in found.items():
                low, high = timed.spread
                numbers = {"ms": timed.median, "p20_ms": low, "p80_ms": high}
                rounded = {name: float(f"{value:.5g}") for name, value in numbers.items()}
                rows.append({"what": "way", "way": way, "T": T, **rounded})
            print(f"{T:>19}" + "".join(f"{times[T][way]:>10.4f}" for way in limits.WAYS))
        least = limits.suggested(times)
        self._append([*rows, {"what": LIMITS, "EXPANDED_SOURCE_TOKENS": least}])
        print(f"EXPANDED_SOURCE_TOKENS = {least} follows ({plans.EXPANDED_SOURCE_TOKENS} now)")

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        tables.append_rows(self.path, [{**row, **self.stamp} for row in rows])

    def basis(self) -> str:
        stamp = self.stamp
        versions = f"torch {stamp['torch']}, triton {stamp['triton']}"
        source = f"{versions}, commit {stamp['commit']}, {str(stamp['date'])[:10]}"
        if self.target.device is None:
            return f"Static: a model of issue slots on compiler reports, nothing timed, {source}"
        return f"Timed on {self.target.name}, {source}"

    def write(self) -> None:
        """Write, or say what would be written."""
        changed = {(d.kernel, d.kind): d.chosen for d in self.decisions if d.chosen != d.present}
        # What was timed and stays rests on the timing too.
        kept = {(d.kernel, d.kind): d.chosen for d in self.decisions}
        entries = changed if self.target.device is None else kept
        arch = self.target.chip.arch
        if not entries:
            print(f"nothing to change in {arch}.json")
        elif self.given.write:
            path = tables.write_table(arch, entries, self.basis(), self.given.tables)
            print(f"{len(changed)} tiles changed, {path} written")
        else:
            print(f"{len(changed)} tiles of {arch}.json would change; --write writes them")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not tuned; unset it")
    target = _target(parser, given)
    planned = _plan(given, target.chip.table)
    if not planned:
        parser.error("argument --classes: these kernels have no tile of their own in that class")
    try:
        run = Run(given, target, Clock(given.budget))
    except OSError as error:
        parser.error(f"argument --out: cannot write {given.out}: {error.strerror}")
    stamp = run.stamp
    print(f"{target.name}  torch {stamp['torch']}  triton {stamp['triton']}  {stamp['commit']}")
    print(
        f"{'kernel':<20}{'class':<8}{'present tile':<22}{'':<26}"
        f"{'ratio':>7}{'tried':>7}{'dropped':>9}"
    )
    failed = run.all(planned)
    run.write()
    print(f"rows appended to {run.path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
