"""What an eager call costs the host: layers of 16 features, whose products cost next to nothing.

    python -m benchmarks.host            on any Linux machine with gcc; needs no GPU

The Triton path runs over a stub of the CUDA driver (``tools/stub_driver.py``): its launches go
through Triton's own launcher and do nothing. What the driver, a GPU's allocator and cuBLAS add is
not in the times. One thread; microseconds of forward and backward.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pera_kernels.terms import TERMS
from pera_kernels.testing import Case, make_inputs
from tools import stub_driver

from . import options, rows, timing
from .layers import CONTENDERS, phase_call

__all__ = ["measure"]

NAMES = ("frozen", "peft-lora", "peft-lora-amp", "torch", "triton")
SMALL = Case(r=4, T=2, N=16, M=16)
CPU = torch.device("cpu")
INSIDE = "PERA_STUB_DRIVER"


def measure(case: Case, rounds: int) -> Iterator[rows.Row]:
    """A row for each contender of a case, all timed side by side."""
    inputs, calls = make_inputs(case, CPU), {}
    for name in NAMES:
        contender = CONTENDERS[name]
        # Kernels go to the stub.
        if name != "triton" and contender.unavailable(case, CPU):
            continue
        x = inputs.x.clone().requires_grad_()
        calls[name] = [phase_call(contender.build(case, inputs), x, inputs.dy, "both")]
    timed = timing.time_calls(calls, rounds, CPU)
    for name, own in timed.items():
        key = {"contender": name, "phase": "host", **rows.of_case(case)}
        yield {**key, **own.keys(), "ratio_to_frozen": own.ratio_to(timed["frozen"])}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description="Time the host's part of forward and backward, without a GPU.",
        allow_abbrev=False,
    )
    add, dtypes = made.add_argument, ("bfloat16+float32", "bfloat16")
    add("--terms", type=options.list_of(str, TERMS), default=("full",), help=", ".join(TERMS))
    add("--dtypes", type=options.list_of(str, rows.DTYPES), default=dtypes, help=" ".join(dtypes))
    add("--rounds", type=int, default=40, help="turns of every contender (40)")
    add("--out", type=Path, help="append rows here (benchmarks/results/host.jsonl)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = parser().parse_args(arguments)
    if INSIDE not in os.environ:
        if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
            parser().error("the stub of the CUDA driver needs Linux and gcc")
        # The loader finds the stub only from a process's start on.
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **stub_driver.environment(Path(folder)), INSIDE: "1"}
            command = [sys.executable, "-m", "benchmarks.host", *arguments]
            return subprocess.run(command, env=environment).returncode
    stub_driver.install()
    torch.set_num_threads(1)
    path = given.out or rows.RESULTS / "host.jsonl"
    for terms in given.terms:
        for name in given.dtypes:
            dtype, adapter_dtype = rows.DTYPES[name]
            case = replace(SMALL, terms=terms, dtype=dtype, adapter_dtype=adapter_dtype)
            for row in measure(case, given.rounds):
                rows.append(path, {**row, **rows.environment(CPU)})
                print(
                    f"{row['dtype']:<18}{row['terms']:<8}{row['contender']:<15}"
                    f"{1e3 * row['median_ms']:>8.1f} µs",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
