"""The search for one kernel's tile: compile, drop, shortlist on the leading problem, score on all,
and take the best that is clean everywhere it ships.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from pera_kernels import configs
from pera_kernels.configs import Tile
from tools import compile_report

from . import measure, static
from .candidates import candidates
from .offline import Chip, Compilers, Launch, recorded
from .problems import ON_CHIP, Operands, Problem, representative, using

__all__ = ["Clock", "Decision", "OutOfTime", "Search", "StaticScorer", "TimedScorer"]

SHORTLIST = 8
# What is checked before a tile ships, beside the problems it was scored on.
GUARD_TERMS = ("full", "square")
GUARD_RANKS = (4, 8, 16, 32, 64)
Item = TypeVar("Item")


class OutOfTime(Exception):
    """The budget is used up."""


class Clock:
    """A budget in seconds that began with this object; None is no limit."""

    def __init__(self, budget: float | None) -> None:
        self._end = math.inf if budget is None else time.monotonic() + budget

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise OutOfTime

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until time is up."""
        for item in items:
            self.check()
            yield item


@dataclass(frozen=True)
class Score:
    """What a tile takes on a problem, in the scorer's unit, and relative to the present tile."""

    value: float
    ratio: float
    extra: dict[str, float] = field(default_factory=dict)
    wrong: str = ""


class Scorer(Protocol):
    """How tiles are compared on a problem; the first of them is the present one."""

    unit: str
    # A tile replaces the present one below this mean ratio, and up to this one on every problem.
    threshold: float
    worst: float
    # Whether it can tell pipelines of different depth apart.
    sees_stages: bool

    def __call__(self, problem: Problem, tiles: Sequence[Tile]) -> list[Score]: ...


class TimedScorer:
    """Milliseconds on a GPU, after the results were judged."""

    unit = "ms"
    threshold = 0.99
    worst = 1.1
    sees_stages = True

    def __init__(self, table: str, device: torch.device, rounds: int) -> None:
        self.table, self.device, self.rounds = table, device, rounds

    def __call__(self, problem: Problem, tiles: Sequence[Tile]) -> list[Score]:
        wrong = measure.wrong(problem, tiles, self.table, self.device)
        times = measure.time_tiles(problem, tiles, self.table, self.device, self.rounds)
        scores = []
        for own, reason in zip(times, wrong, strict=True):
            low, high = own.spread
            extra = {"p20_ms": low, "p80_ms": high}
            scores.append(Score(own.median, own.ratio_to(times[0]), extra, reason))
        return scores


class StaticScorer:
    """Modelled cycles, see ``static``; the ratio is the larger of those of cycles and of
    instruction slots, so that a tile has to win in both.
    """

    unit = "cycles"
    threshold = 0.9
    worst = 1.0
    sees_stages = False

    def __init__(self, compilers: Compilers) -> None:
        self.compilers = compilers

    def __call__(self, problem: Problem, tiles: Sequence[Tile]) -> list[Score]:
        costs = [self._cost(problem, tile) for tile in tiles]
        return [
            Score(
                own.cycles,
                max(own.cycles / costs[0].cycles, own.slots / costs[0].slots),
                {"issue_slots": own.slots},
            )
            for own in costs
        ]

    def _cost(self, problem: Problem, tile: Tile) -> static.Cost:
        chip = self.compilers.chip
        with using(chip.table, problem.kernel, problem.kind, tile):
            made = recorded(Operands(problem, "meta").launch, chip)
        compiled = dict(self.compilers.compile(own.launch for own in made))
        costs = [static.cost(own, compiled[own.launch], chip) for own in made]
        own = sum(costs, static.Cost(0.0, 0.0))
        return replace(own, cycles=max(own.cycles, static.memory_cycles(problem.bytes(), chip)))


@dataclass(frozen=True)
class Decision:
    """The tile of a kernel and class: a new one, or the present one with ratio 1."""

    kernel: str
    kind: str
    present: Tile
    chosen: Tile
    ratio: float
    tried: int
    dropped: int
    note: str = ""

    def row(self) -> dict[str, Any]:
        return {"what": "decision", **asdict(self)}


class Search:
    """Searches with one scorer; ``rows`` collects everything that was found out."""

    def __init__(
        self,
        compilers: Compilers,
        scorer: Scorer,
        clock: Clock,
        *,
        count: int,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.compilers, self.scorer, self.clock = compilers, scorer, clock
        self.count, self.ranks = count, ranks
        self.chip: Chip = compilers.chip
        self.rows: list[dict[str, Any]] = []

    def run(self, kernel: str, kind: str) -> Decision:
        """Raises OutOfTime, with what was found so far in ``rows``."""
        table = configs.load_table(self.chip.table)
        present = table[kernel, kind]
        problems = [
            problem
            for problem in representative(kernel, kind)
            if self.ranks is None or problem.r in self.ranks
        ]
        leading = problems[: 2 if kernel in ON_CHIP else 1]
        stages = None if self.scorer.sees_stages else present.num_stages
        tiles = candidates(
            kernel, kind, present, self.chip.shared_limit, self.count, num_stages=stages
        )
        sound = self._sound(kernel, kind, tiles, leading)
        if present not in sound:
            raise ValueError(f"the present tile of {kernel} {kind} is not clean: {present}")
        ratios = self._score(leading, sound)
        short = [present, *self._best(ratios, present)[:SHORTLIST]]
        short = self._sound(kernel, kind, short, problems)
        if len(problems) > len(leading):
            ratios = self._score(problems, short)
        ratios = {tile: ratio for tile, ratio in ratios.items() if tile in short}
        dropped = len(tiles) - len(sound)
        kept = Decision(kernel, kind, present, present, 1.0, len(tiles), dropped)
        for tile in self._best(ratios, present):
            if ratios[tile] >= self.scorer.threshold:
                break
            problem = self._unclean(kernel, kind, tile)
            if not problem:
                return replace(kept, chosen=tile, ratio=ratios[tile])
            self._note(kernel, kind, tile, "dropped", reason=problem)
        return kept

    def _best(self, ratios: dict[Tile, float], present: Tile) -> list[Tile]:
        others = [tile for tile in ratios if tile != present and ratios[tile] < math.inf]
        return sorted(others, key=lambda tile: ratios[tile])

    def _note(self, kernel: str, kind: str, tile: Tile, what: str, **found: Any) -> None:
        self.rows.append({"what": what, "kernel": kernel, "kind": kind, **asdict(tile), **found})

    def _sound(
        self, kernel: str, kind: str, tiles: Sequence[Tile], problems: Sequence[Problem]
    ) -> list[Tile]:
        """The tiles that compile without spills, fit and use tensor cores on these problems; of
        those that come to the same launches the first.
        """
        launches: dict[Tile, tuple[Launch, ...]] = {}
        seen: set[Any] = set()
        for tile in tiles:
            with using(self.chip.table, kernel, kind, tile):
                made = [
                    own
                    for problem in problems
                    for own in recorded(Operands(problem, "meta").launch, self.chip)
                ]
            key = tuple((own.launch, own.grid) for own in made)
            if key not in seen:
                seen.add(key)
                launches[tile] = tuple(dict.fromkeys(own.launch for own in made))
        wanted = [launch for own in launches.values() for launch in own]
        compiled = dict(self.clock.watch(self.compilers.compile(wanted)))
        sound = []
        for tile, own in launches.items():
            reasons = dict.fromkeys(compiled[launch].problem for launch in own)
            reason = "; ".join(reason for reason in reasons if reason)
            if reason:
                self._note(kernel, kind, tile, "dropped", reason=reason)
            else:
                sound.append(tile)
        return sound

    def _score(self, problems: Sequence[Problem], tiles: Sequence[Tile]) -> dict[Tile, float]:
        """The geometric mean of each tile's ratios; infinite where a result is wrong, or a ratio
        above the worst that is allowed.
        """
        logarithms = dict.fromkeys(tiles, 0.0)
        for problem in self.clock.watch(problems):
            scores = self.scorer(problem, tiles)
            if scores[0].wrong:
                raise ValueError(
                    f"the present tile of {problem.kernel} {problem.kind} is wrong at {problem}: "
                    f"{scores[0].wrong}"
                )
            for tile, score in zip(tiles, scores, strict=True):
                refused = score.wrong or score.ratio > self.scorer.worst
                logarithms[tile] += math.inf if refused else math.log(score.ratio)
                found = {self.scorer.unit: score.value, "ratio": score.ratio, **score.extra}
                self._note(
                    problem.kernel,
                    problem.kind,
                    tile,
                    "wrong" if score.wrong else "score",
                    **{"r": problem.r, "T": problem.T, "n": problem.N, "m": problem.M},
                    terms=problem.terms,
                    factor=problem.factor,
                    **{name: float(f"{value:.5g}") for name, value in found.items()},
                    **({"reason": score.wrong} if score.wrong else {}),
                )
        return {tile: math.exp(total / len(problems)) for tile, total in logarithms.items()}

    def _unclean(self, kernel: str, kind: str, tile: Tile) -> str:
        """The first thing wrong with a tile on any launch that would ship with it."""
        dtypes = {"half": ["bf16", "fp16"], "mixed": ["bf16+fp32"], "single": ["fp32"]}[kind]
        has_mixed = (kernel, "mixed") in configs.load_table(self.chip.table)
        if kind == "half" and not has_mixed and kernel in (*ON_CHIP, "expand"):
            dtypes.append("bf16+fp32")
        with using(self.chip.table, kernel, kind, tile):
            launches = compile_report.launches(
                variants_of(kernel), GUARD_TERMS, GUARD_RANKS, dtypes, self.chip.arch
            )
        for problem in self.clock.watch(self.compilers.problems(launches)):
            if problem:
                return problem
        return ""


def variants_of(kernel: str) -> list[str]:
    """The variants of the compile report that a kernel's tile serves."""
    word, _, expanded = kernel.partition("_")
    return [
        variant
        for variant in compile_report.VARIANTS
        if variant.split()[0] == word and ("expanded" in variant) == bool(expanded)
    ]
