"""Find tiles for the kernels of the GPU that is here, and write them as its table.

Candidates near the present tile are compiled in parallel; what spills or does not fit is dropped.
The others must pass the numeric rule on a problem before they are timed on it, in turns; a tile
that is clearly behind has no further turn. The best replaces the present tile if it is at least 1 %
faster in the geometric mean over all problems, on none of them 10 % slower, and compiles cleanly
for every rank. Every result is appended to OUT/tune.jsonl as it comes.

    python -m tools.tune --kernels accumulate,project --classes half --ranks 16 --budget 90 --write
    TRITON_INTERPRET=1 python -m tools.tune --dry ...   tiny sizes on a CPU: nothing is measured
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pera_kernels.cli import describe
from pera_kernels.kernels import tiles
from pera_kernels.kernels.tiles import Tile
from pera_kernels.testing import judge

from . import compile_report
from .compile_report import RANKS, SHARED_LIMIT
from .problems import DTYPES, Job, Operands, expected, random_on

# The dtypes of the compile report that a class of tiles serves; candidates are timed on the first.
CLASS_DTYPES = {"half": ("bf16", "fp16"), "mixed": ("bf16+fp32",), "single": ("fp32",)}
# What each kernel is timed on, and at how many tokens: those at which a layer launches it.
PROBLEMS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "project": (("project A", "project B"), (512, 1024)),
    "project_expanded": (("project expanded",), (16384, 4096)),
    "accumulate": (("accumulate",), (16384, 4096, 512)),
    "contract": (("contract",), (16384, 4096, 512)),
    "expand": (("expand",), (16,)),
    "compose": (("compose",), (16,)),
}
# A tile that takes so much longer than the best of its problem has no further turn there.
BEHIND = 1.15
BETTER, WORSE = 0.99, 1.1
# (tokens, features, lanes, warps, stages, pieces, programs, registers) of the candidates.
_WARPS, _STAGES, _ONE, _REGISTERS = (4, 8), (2, 3, 4), (1,), (128, 255)
_PIECES, _LANES = (1, 2, 3, 4, 5), (32, 64, 128)
GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "expand": ((16,), (64, 128, 256, 512), (8, 16, 32), (2, 4, 8), *[_ONE] * 3, (255,)),
    "project": (
        *((32, 64, 128, 256), (32, 64, 128), _LANES, _WARPS, _STAGES),
        *(_PIECES, (1, 2), _REGISTERS),
    ),
    "accumulate": (
        *((32, 64, 128), (32, 64, 128, 256), (16, 32, 64), _WARPS, (1, *_STAGES)),
        *(_ONE, _ONE, _REGISTERS),
    ),
    "contract": (
        *((32, 64, 128), (32, 64, 128), (32, 64), _WARPS, _STAGES),
        *(_PIECES, (1, 2), _REGISTERS),
    ),
    "compose": (
        *((64, 128, 256), (64, 128, 256), (32, 64), _WARPS, _STAGES),
        *(_ONE, _ONE, _REGISTERS),
    ),
}


class WrongTile(Exception):
    """The present tile of a kernel fails the numeric rule: nothing can be compared with it."""


def candidates(kernel: str, kind: str, present: Tile, shared_limit: int, most: int) -> list[Tile]:
    """The present tile, then those that may fit, nearest first."""
    name, size = kernel.removesuffix("_expanded"), 4 if kind == "single" else 2
    grid = (Tile(*values) for values in itertools.product(*GRIDS[name]))
    found = [t for t in grid if t != present and _fits(name, t, size, shared_limit)]
    found.sort(key=partial(_distance, present))
    return [present, *found[:most]]


def _distance(present: Tile, tile: Tile) -> tuple[float, str]:
    """Doublings of blocks and warps, steps of the others; then an order of its own."""
    pairs_of_values = zip(asdict(present).items(), asdict(tile).values(), strict=True)
    steps = (
        abs(a - b) if name in ("num_stages", "pieces") else abs(math.log2(a / b))
        for (name, a), b in pairs_of_values
    )
    return sum(steps), str(tile)


def _fits(name: str, tile: Tile, size: int, shared_limit: int) -> bool:
    """Whether accumulators fit the registers, and the operands of all stages the shared memory."""
    t, n, k, pieces = tile.block_t, tile.block_n, tile.block_k, tile.pieces
    # Accumulators of a program, and elements that one stage of its pipeline loads.
    accumulators, staged = {
        "expand": (n * k, 0),
        "project": (t * k * pieces, t * n),
        "accumulate": (t * n, t * k + k * n),
        "contract": (n * k * pieces, t * n + t * k * pieces),
        "compose": (t * n, t * k + k * n),
    }[name]
    per_thread = accumulators / (32 * tile.num_warps)
    return 4 <= per_thread <= 160 and max(1, tile.num_stages - 1) * staged * size <= shared_limit


@contextmanager
def using(table: str, kernel: str, kind: str, tile: Tile) -> Iterator[None]:
    """Within this context the launchers take ``tile`` for a kernel and class of a table."""
    entries = tiles.load_table(table)
    before = entries[kernel, kind]
    entries[kernel, kind] = tile
    tiles.tile_for.cache_clear()
    try:
        yield
    finally:
        entries[kernel, kind] = before
        tiles.tile_for.cache_clear()


class Sweep:
    """One kernel and class after the other; what was found is on disk at every moment."""

    def __init__(self, given: argparse.Namespace, device: torch.device, pool: Any) -> None:
        self.given, self.device, self.pool = given, device, pool
        self.table = tiles.architecture(device)
        self.target = ("generic", 1) if pool is None else compile_report.here()
        self.arch = self.target[0]
        self.path = given.out / "tune.jsonl"
        import triton

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self.stamp = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
        self.stamp |= {"commit": describe.commit(), "date": datetime.date.today().isoformat()}

    def append(self, kernel: str, kind: str, tile: Tile, what: str, **found: Any) -> None:
        row = {"what": what, "kernel": kernel, "class": kind, "tile": asdict(tile), **found}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self.stamp}) + "\n")

    def run(self, kernel: str, kind: str, end: float) -> Tile:
        """The tile that the kernel should have; decided on the problems there was time for."""
        present = tiles.load_table(self.table)[kernel, kind]
        limit = SHARED_LIMIT.get(self.arch, min(SHARED_LIMIT.values()))
        problems = self._problems(kernel, kind)
        alive = candidates(kernel, kind, present, limit, self.given.candidates)
        alive = self._compiled(kernel, kind, alive, problems)
        logarithms, judged = dict.fromkeys(alive, 0.0), 0
        for problem in problems:
            if judged and time.monotonic() > end:
                break
            times = self._timed(kernel, kind, problem, alive, end)
            ratios = {
                tile: statistics.median(own) / statistics.median(times[present])
                for tile, own in times.items()
            }
            for tile, ratio in ratios.items():
                self.append(
                    kernel,
                    kind,
                    tile,
                    "timed",
                    problem=asdict(problem),
                    ms=statistics.median(times[tile]),
                    ratio=ratio,
                )
                logarithms[tile] += math.log(ratio)
            alive = [
                tile for tile in alive if tile == present or ratios.get(tile, math.inf) <= WORSE
            ]
            judged += 1
        means = {tile: math.exp(logarithms[tile] / judged) for tile in alive}
        for tile in sorted(alive, key=lambda tile: means[tile]):
            if tile == present or means[tile] >= BETTER:
                break
            if reason := self._unclean(kernel, kind, tile):
                self.append(kernel, kind, tile, "dropped", reason=reason)
                continue
            self.append(kernel, kind, tile, "chosen", ratio=means[tile], problems=judged)
            return tile
        self.append(kernel, kind, present, "chosen", ratio=1.0, problems=judged)
        return present

    def _problems(self, kernel: str, kind: str) -> list[Job]:
        variants, tokens = PROBLEMS[kernel]
        dtype, features = CLASS_DTYPES[kind][0], 4096
        if self.given.dry:
            tokens, features = (40,), 96
        return [
            Job(variant, "full", r, dtype, T, features, features)
            for T, r, variant in itertools.product(tokens, self.given.ranks, variants)
        ]

    def _compiled(
        self, kernel: str, kind: str, wanted: list[Tile], problems: list[Job]
    ) -> list[Tile]:
        """Those that compile without spills, fit and use tensor cores; the present one stays."""
        if self.pool is None:
            return wanted
        work, of_tile = [], []
        for tile, problem in itertools.product(wanted, problems):
            with (
                compile_report.tiles_of(*self.target),
                using(self.table, kernel, kind, tile),
            ):
                launches = compile_report.launches_of(Operands(problem, finish=True))
            work += [(launch, problem, self.arch) for launch in launches]
            of_tile += [tile] * len(launches)
        bad: dict[Tile, str] = {}
        for tile, (_, row) in zip(
            of_tile, compile_report.compile_all(self.pool, work), strict=True
        ):
            if row.problem:
                bad.setdefault(tile, row.problem)
        for tile, reason in bad.items():
            self.append(kernel, kind, tile, "dropped", reason=reason)
        return [tile for tile in wanted if tile not in bad or tile == wanted[0]]

    def _timed(
        self, kernel: str, kind: str, problem: Job, alive: list[Tile], end: float
    ) -> dict[Tile, list[float]]:
        """Milliseconds by tile and turn, of those that pass the numeric rule on this problem."""
        calls = self._calls(problem)
        truth, reference = (expected(calls[0], dtype) for dtype in (torch.float64, torch.float32))
        dtype = DTYPES[problem.dtype][0]
        times: dict[Tile, list[float]] = {}
        for tile in alive:
            with using(self.table, kernel, kind, tile):
                got = calls[0].call()
            verdicts = [
                judge(name, own, reference[name].to(own.dtype), truth[name], dtype)
                for name, own in got.items()
            ]
            wrong = "; ".join(str(verdict) for verdict in verdicts if not verdict.passed)
            if not wrong:
                times[tile] = []
            elif tile == alive[0]:
                raise WrongTile(f"the present tile is wrong on {problem}: {wrong}")
            else:
                self.append(kernel, kind, tile, "wrong", problem=asdict(problem), reason=wrong)
        del truth, reference
        turns, shuffle = list(times), random.Random(0).shuffle
        for number in range(self.given.rounds):
            shuffle(turns)
            for tile in turns:
                with using(self.table, kernel, kind, tile):
                    times[tile].append(self._milliseconds(calls))
            best = min(statistics.median(own) for own in times.values() if len(own) > number)
            turns = [
                t for t in turns if t == alive[0] or statistics.median(times[t]) <= BEHIND * best
            ]
            if time.monotonic() > end or turns == [alive[0]]:
                break
        return times

    def _calls(self, problem: Job) -> list[Operands]:
        """Operands in as many places as it takes to miss the L2."""
        first = Operands(problem, random_on(self.device, 0), finish=True)
        if self.pool is None:
            return [first]
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        count = math.ceil(3 * cache / (first.x.nbytes + first.u.nbytes))
        more = (random_on(self.device, seed) for seed in range(1, min(count, 8)))
        return [first, *(Operands(problem, draw, finish=True) for draw in more)]

    def _milliseconds(self, calls: Sequence[Operands]) -> float:
        def all_of_them() -> None:
            for own in calls:
                own.call()

        if self.pool is None:
            # Interpreted: a number to go on with, not a measurement.
            began = time.perf_counter()
            all_of_them()
            return 1e3 * (time.perf_counter() - began)
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(all_of_them, rep=2, return_mode="median")) / len(calls)

    def _unclean(self, kernel: str, kind: str, tile: Tile) -> str:
        """What is wrong with a tile on any rank that it would ship for; "" if nothing is."""
        if self.pool is None:
            return ""
        word, _, expanded = kernel.partition("_")
        dtypes = CLASS_DTYPES[kind]
        if kind == "half" and (kernel, "mixed") not in tiles.load_table(self.table):
            dtypes = (*dtypes, "bf16+fp32")
        variants = [
            name
            for name in compile_report.REPORTED
            if name.split()[0] == word and ("expanded" in name) == bool(expanded)
        ]
        jobs = [Job(v, "full", r, d) for v, r, d in itertools.product(variants, RANKS, dtypes)]
        with using(self.table, kernel, kind, tile):
            found = compile_report.distinct(jobs, *self.target)
        work = [(launch, job, self.arch) for launch, job in found.items()]
        rows = (row for _, row in compile_report.compile_all(self.pool, work))
        return next((f"{row.problem} (r={row.r} {row.dtype})" for row in rows if row.problem), "")

    def write(self, chosen: dict[tuple[str, str], Tile]) -> Path:
        """The shipped table with these tiles in it, put in place at once."""
        source = tiles.TABLES / f"{self.arch}.json"
        table: dict[str, Any] = {"architecture": self.arch, "basis": "", "tiles": {}}
        if source.exists():
            table = json.loads(source.read_text(encoding="utf-8"))
        for (kernel, kind), tile in chosen.items():
            table["tiles"].setdefault(kernel, {})[kind] = asdict(tile)
        names = ", ".join(" ".join(key) for key in chosen)
        how = "Interpreted, nothing timed" if self.pool is None else "Timed"
        versions = f"torch {self.stamp['torch']}, triton {self.stamp['triton']}"
        before = str(table["basis"]).rpartition(" The rest: ")[2]
        table["basis"] = (
            f"{how} on {self.stamp['device']}, {versions}, commit {self.stamp['commit']}: {names}."
            f" The rest: {before}"
        )
        path = self.given.tables / f"{self.arch}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(new, path)
        return path


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def _numbers(text: str) -> list[int]:
    if not all(word.isdecimal() and int(word) >= 1 for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1")
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, order = parser.add_argument, ["accumulate", "contract", "project", "project_expanded"]
    add("--kernels", type=_words(tiles.KERNELS), default=order, metavar="NAME,...")
    add("--classes", type=_words(tiles.CLASSES), default=["half"], metavar="NAME,...")
    add("--ranks", type=_numbers, default=[16], metavar="R,...")
    add("--candidates", type=int, default=24, metavar="N", help="tried beside each tile (24)")
    add("--rounds", type=int, default=8, metavar="N", help="turns of each tile, at most (8)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="compile in so many processes")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="stop about then")
    add(
        "--out", type=Path, default=Path("."), metavar="DIR", help="where tune.jsonl is appended to"
    )
    add("--write", action="store_true", help="write the table; else only say what would change")
    add("--tables", type=Path, default=tiles.TABLES, metavar="DIR", help="where --write puts it")
    add("--dry", action="store_true", help="tiny sizes in Triton's interpreter, on a CPU")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    given = parser.parse_args(argv)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if given.dry != interpreted:
        parser.error("--dry needs TRITON_INTERPRET=1" if given.dry else "unset TRITON_INTERPRET")
    if not given.dry and not torch.cuda.is_available():
        parser.error("there is no GPU to time on; --dry needs none")
    if given.dry and given.write and given.tables.resolve() == tiles.TABLES.resolve():
        parser.error("--dry measures nothing: give another folder as --tables")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = _arguments(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    given.tables.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + given.budget
    if given.dry:
        return _sweep(given, torch.device("cpu"), None, end)
    with compile_report.compilers(given.jobs) as pool:
        return _sweep(given, torch.device("cuda", torch.cuda.current_device()), pool, end)


def _sweep(given: argparse.Namespace, device: torch.device, pool: Any, end: float) -> int:
    sweep, chosen, failed = Sweep(given, device, pool), {}, False
    left = [
        (kernel, kind)
        for kind, kernel in itertools.product(given.classes, given.kernels)
        if (kernel, kind) in tiles.load_table(sweep.table)
    ]
    while left and time.monotonic() < end:
        kernel, kind = left[0]
        share = (end - time.monotonic()) / len(left)
        present = tiles.load_table(sweep.table)[kernel, kind]
        left.pop(0)
        try:
            best = sweep.run(kernel, kind, time.monotonic() + share)
        except WrongTile as error:
            print(f"{kernel} {kind}: {error}", file=sys.stderr)
            failed = True
            continue
        print(
            f"{kernel} {kind}: {present} {'stays' if best == present else f'-> {best}'}", flush=True
        )
        chosen[kernel, kind] = best
        # After each: whoever is stopped keeps what was decided.
        if given.write:
            print(f"written: {sweep.write(chosen)}", flush=True)
    if left:
        print("no time left for " + ", ".join(" ".join(key) for key in left))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
