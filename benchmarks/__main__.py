"""``python -m benchmarks``: judge every contender, time those that pass, print and keep rows."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pera_kernels.terms import TERMS
from pera_kernels.testing import Case

from . import layers, options, rows, timing
from .roofline import Ceilings

DESCRIPTION = """\
Judge every contender by the numeric rule, time those that pass, print and append rows. Lists are
separated by commas, all combinations are timed. The frozen layer is always timed: it is what the
others are compared with. The exit status is 1 if a contender failed.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description=DESCRIPTION, allow_abbrev=False
    )
    list_of, dtypes, names = options.list_of, rows.DTYPES, layers.CONTENDERS
    add = made.add_argument
    add("--device", type=options.device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--T", type=list_of(int), help="tokens (64,512; on a GPU 16384,4096,512)")
    add("--shapes", type=list_of(options.shape), help="in x out (512x512; on a GPU 4096x4096)")
    add("--ranks", type=list_of(int), default=(16,), help="ranks (16)")
    add("--terms", type=list_of(str, TERMS), default=("full",), help=", ".join(TERMS))
    add("--dtypes", type=list_of(str, dtypes), help=f"{', '.join(dtypes)}; +: float32 adapters")
    add("--dropout", type=list_of(float), default=(0.0,), help="probabilities, such as 0,0.05")
    phases = list_of(str, layers.PHASES)
    add("--phases", type=phases, default=("both", "eval"), help=", ".join(layers.PHASES))
    add("--only", type=list_of(str, names), default=layers.DEFAULT, help=", ".join(names))
    add("--rounds", type=int, default=10, help="turns of every contender, at most (10)")
    add("--budget", type=int, metavar="SECONDS", help="start no case that would end later")
    add("--resume", action="store_true", help="skip what --out has of this commit and device")
    add("--out", type=Path, help="append rows here (benchmarks/results/<device>.jsonl)")
    return made


def cases(given: argparse.Namespace) -> list[Case]:
    """All combinations of the axes; those that are not given depend on the device."""
    gpu = given.device.type == "cuda"
    axes = (
        # Adapters are float32 unless somebody asks otherwise: that comes first.
        given.dtypes or (*(() if gpu else ("float32",)), "bfloat16+float32", "bfloat16"),
        given.terms,
        given.ranks,
        given.dropout,
        given.shapes or (((4096, 4096),) if gpu else ((512, 512),)),
        given.T or ((16384, 4096, 512) if gpu else (64, 512)),
    )
    return [
        Case(
            terms=terms,
            r=r,
            T=T,
            N=n,
            M=m,
            dtype=rows.DTYPES[dtype][0],
            adapter_dtype=rows.DTYPES[dtype][1],
            dropout_p=dropout,
            scale=1.0,
        )
        for dtype, terms, r, dropout, (n, m), T in itertools.product(*axes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    given = parser().parse_args(arguments)
    path = given.out or rows.default_file(given.device)
    environment = rows.environment(given.device)
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    earlier = rows.read(path) if given.resume else []
    ceilings = Ceilings(given.device)
    planned, failed, longest = cases(given), False, 0.0
    with timing.place(given.device):
        for number, case in enumerate(planned):
            start = time.monotonic()
            if given.budget and start - began + longest > given.budget:
                print(f"\nthe budget of {given.budget} s is used up; left out:")
                print("\n".join(f"  {rows.of_case(left)}" for left in planned[number:]))
                break
            key = rows.of_case(case)
            print("\n" + "  ".join(f"{name}={value}" for name, value in key.items()))
            chosen, reasons = layers.select(case, given.device, given.only)
            for name, reason in reasons.items():
                print(f"{name}: not timed: {reason}")
            same = {**key, "device": environment["device"], "commit": environment["commit"]}
            done = {
                (row["contender"], row["phase"])
                for row in earlier
                if all(row[name] == value for name, value in same.items())
            }
            phases = [p for p in given.phases if not _is_done(chosen, p, done)]
            if not phases:
                print(f"done before, see {path}")
                continue
            for row in layers.run_case(case, chosen, phases, given.rounds, ceilings, environment):
                rows.append(path, row)
                print(rows.line(row), flush=True)
                failed = failed or row["status"] == "failed"
            longest = max(longest, time.monotonic() - start)
    print(f"\nrows appended to {path} after {time.monotonic() - began:.0f} s")
    return int(failed)


def _is_done(chosen: Sequence[layers.Contender], phase: str, done: set[tuple[str, str]]) -> bool:
    """Whether everybody who has this phase has a row of it, or one that says it failed the gate."""
    return all(
        (own.name, phase) in done or (own.name, "gate") in done
        for own in chosen
        if phase != "backward" or own.repeats_backward
    )


if __name__ == "__main__":
    sys.exit(main())
