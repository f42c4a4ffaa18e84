"""What was aimed at, beside what the committed rows say: held, missed by how much, not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cells import Case, Cells
from .layers import FROZEN
from .tables import markdown

__all__ = ["Outcome", "cpu", "gpu"]

LORA = ("peft-lora", "peft-lora-amp")
RELEASED = ("released", "released-amp")
COMPILED = ("reference-compiled",)
# The call that a user makes comes first; a backend named on its own stands in where it is absent.
OURS = {"cpu": ("auto", "torch"), "gpu": ("auto", "triton")}


@dataclass(frozen=True)
class Outcome:
    """One line: the ``worst`` of ``count`` cases against a limit, which ``missed`` of them miss.

    ``expected`` is how many cases the target speaks of, where that is known.
    """

    target: str
    limit: float
    worst: float | None
    where: str
    count: int
    missed: int = 0
    expected: int = 0

    def cells(self) -> list[str]:
        if self.worst is None:
            return [self.target, "not measured", ""]
        where = f"{self.worst:.3g} at {self.where}" if self.where else f"{self.worst:.3g}"
        of = f", worst of {self.count}" if self.count > 1 else ""
        return [self.target, f"{where}{of}", self._verdict()]

    def _verdict(self) -> str:
        assert self.worst is not None
        if not self.missed:
            partly = f" in {self.count} of {self.expected} cases, others not measured"
            return "held" + partly * (self.count < self.expected)
        by = 100 * abs(self.worst / self.limit - 1)
        return f"**missed** in {self.missed} of {self.count}, by at most {by:.1f} %"


def _worst(
    target: str,
    limit: float,
    found: Sequence[tuple[float, str]],
    *,
    expected: int = 0,
    highest: bool = True,
) -> Outcome:
    if not found:
        return Outcome(target, limit, None, "", 0)
    worst, where = max(found) if highest else min(found)
    missed = sum(value > limit if highest else value < limit for value, _ in found)
    return Outcome(target, limit, worst, where, len(found), missed, expected)


class _Side:
    """The cells of one device and who stands for us there."""

    def __init__(self, cells: Cells, ours: tuple[str, ...]) -> None:
        self.cells = cells
        self.ours = ours

    def own(self, case: Case, phase: str, key: str = "ratio_to_frozen") -> float | None:
        return self._first(self.ours, case, phase, key)

    def _first(self, names: Sequence[str], case: Case, phase: str, key: str) -> float | None:
        values = (self.cells.value(case, name, phase, key) for name in names)
        return next((value for value in values if value is not None), None)

    def quotients(
        self,
        peers: Sequence[str],
        phases: Sequence[str],
        matches: Callable[[Case], bool],
        key: str = "ratio_to_frozen",
    ) -> list[tuple[float, str]]:
        """Ours over the best of ``peers`` in every case, both over the same frozen layer."""
        found = []
        for case in self.cells.cases(matches):
            for phase in phases:
                values = [self.cells.value(case, name, phase, key) for name in peers]
                theirs = min((v for v in values if v is not None), default=None)
                ours = self.own(case, phase, key)
                if ours is not None and theirs:
                    found.append((ours / theirs, f"{case}, {phase}"))
        return found

    def ratios(self, phase: str, matches: Callable[[Case], bool]) -> list[tuple[float, str]]:
        cases = self.cells.cases(matches)
        return [(value, str(c)) for c in cases if (value := self.own(c, phase)) is not None]


def _lines(outcomes: Sequence[Outcome]) -> str:
    return markdown(["target", "measured", ""], [own.cells() for own in outcomes], left=3)


def cpu(cells: Cells) -> str:
    """float32 and bfloat16, T in {1, 64, 512, 2048}, n = m in {1024, 2048}, r in {8, 16, 32}."""
    side = _Side(cells, OURS["cpu"])

    def grid(case: Case) -> bool:
        return (
            case.T in (1, 64, 512, 2048)
            and case.n == case.m in (1024, 2048)
            and case.r in (8, 16, 32)
            and case.dtype in ("float32", "bfloat16")
            and (case.terms, case.dropout) == ("full", 0.0)
        )

    def sketch(dtype: str, T: int) -> Callable[[Case], bool]:
        return lambda c: grid(c) and (c.dtype, c.T, c.n, c.r) == (dtype, T, 2048, 16)

    phases = ("both", "eval")
    speedups = [
        (1 / quotient, where)
        for quotient, where in side.quotients(RELEASED, phases, lambda c: grid(c) and c.T <= 64)
    ]
    return _lines(
        [
            _worst(
                "time over the reference's: ≤ 1",
                1.0,
                side.quotients(["reference"], phases, grid),
                expected=2 * 48,
            ),
            _worst(
                "time over the compiled reference's: ≤ 1",
                1.0,
                side.quotients(COMPILED, phases, grid),
                expected=2 * 48,
            ),
            _worst(
                "speed over the released formula's at T ≤ 64: ≥ 2",
                2.0,
                speedups,
                expected=2 * 24,
                highest=False,
            ),
            _worst(
                "eval over PEFT's LoRA at r=16: ≤ 1.5",
                1.5,
                side.quotients(LORA, ["eval"], lambda c: grid(c) and c.r == 16),
                expected=16,
            ),
            *(
                _worst(
                    f"forward + backward over frozen, {dtype}, T={T}, 2048², r=16: < {limit}",
                    limit,
                    side.ratios("both", sketch(dtype, T)),
                )
                for dtype, T, limit in (
                    ("float32", 2048, 1.33),
                    ("bfloat16", 2048, 1.58),
                    ("bfloat16", 64, 2.8),
                )
            ),
        ]
    )


# (what it is, limit, phase, terms, r, T): bfloat16, 4096 -> 4096, ratio to the frozen layer.
GPU_RATIOS = (
    ("forward + backward, T=16384", 1.12, "both", "full", 16, (16384,)),
    ("forward + backward, T=16384, square-only", 1.09, "both", "square", 16, (16384,)),
    ("forward + backward, T=4096", 1.16, "both", "full", 16, (4096,)),
    ("forward + backward, T=512, graph replay", 1.35, "both", "full", 16, (512,)),
    ("forward + backward, T=16384, r=32", 1.36, "both", "full", 32, (16384,)),
    ("forward only (eval), T ≤ 64, graph replay", 1.40, "eval", "full", 16, (1, 16, 64)),
    ("training forward, T ≤ 64, graph replay", 1.40, "forward", "full", 16, (1, 16, 64)),
)


def gpu(cells: Cells, decoder: Cells) -> str:
    """bfloat16 on one GPU; ``decoder`` holds the rows of the decoder layer, if there are any."""
    side = _Side(cells, OURS["gpu"])

    def case(terms: str, r: int, T: tuple[int, ...]) -> Callable[[Case], bool]:
        wanted = (terms, r, 4096, 4096, "bfloat16", 0.0)
        return lambda c: (c.terms, c.r, c.n, c.m, c.dtype, c.dropout) == wanted and c.T in T

    def anywhere(case: Case) -> bool:
        return True

    outcomes = [
        _worst(
            f"{what}: ≤ {limit:.2f}",
            limit,
            side.ratios(phase, case(terms, r, T)),
            expected=len(T),
        )
        for what, limit, phase, terms, r, T in GPU_RATIOS
    ]
    outcomes.append(_merged(cells))
    phases = ("forward", "both", "eval")
    for name, peers in (
        ("PEFT's LoRA", LORA),
        ("the released formula", RELEASED),
        ("the compiled reference", COMPILED),
    ):
        quotients = side.quotients(peers, phases, anywhere)
        outcomes.append(_worst(f"time over that of {name}, every case: < 1", 1.0, quotients))
    layer = side.quotients(LORA, ["both"], anywhere, "peak_mib")
    whole = _Side(decoder, OURS["gpu"]).quotients(LORA, ["step"], anywhere, "peak_mib")
    outcomes.append(_worst("peak memory over PEFT's LoRA, layer: ≤ 1", 1.0, layer))
    outcomes.append(_worst("peak memory over PEFT's LoRA, decoder layer: ≤ 1", 1.0, whole))
    outcomes.append(_kernels(cells))
    return _lines(outcomes)


def _merged(cells: Cells) -> Outcome:
    """How far the merged layer's ratio is from 1, in spreads (p20 to p80) of the frozen layer."""
    found = []
    for case in cells.cases():
        for phase in ("forward", "backward", "both", "eval"):
            merged = cells.find(case, "merged", phase)
            frozen = cells.find(case, FROZEN, phase)
            if merged is None or frozen is None or merged["ratio_to_frozen"] is None:
                continue
            spread = (frozen["p80_ms"] - frozen["p20_ms"]) / frozen["median_ms"]
            away = abs(merged["ratio_to_frozen"] - 1)
            found.append((away / max(spread, 0.01), f"{merged['ratio_to_frozen']:.3f}, {case}"))
    target = "merged, distance of the ratio from 1 in spreads of the frozen layer (or 1 %): ≤ 1"
    return _worst(target, 1.0, found)


def _kernels(cells: Cells) -> Outcome:
    """The slowest of the kernels that ``benchmarks.kernels`` found memory-bound."""
    found = [
        (row["gbps"] / row["ceiling_gbps"], f"{row['contender']}, T={row['T']}, r={row['r']}")
        for row in cells.rows()
        if row["phase"] == "kernel" and (row["note"] or "").startswith("memory-bound")
    ]
    target = "each memory-bound kernel over the copy bandwidth: ≥ 0.80"
    return _worst(target, 0.8, found, highest=False)
