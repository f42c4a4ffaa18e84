"""Compare every op, terms, rank, dtype and backend with float64 and say whether it passes.

An output passes if its maximum and its RMS error are each at most twice the error of the plain
reference run in the working dtype, plus a floor of a few ulps (pera_kernels/verify/numerics.py).
Without a GPU the Triton kernels run in Triton's interpreter. Few coefficients mean few errors to
compare: small ranks pool several draws of the inputs, and a failure by a handful of values is
judged on more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

import pera_kernels
from pera_kernels import testing as numerics
from pera_kernels.kernels import interpreting
from pera_kernels.terms import TERMS
from pera_kernels.verify import report
from pera_kernels.verify.measure import Row, in_order, measure
from pera_kernels.verify.plan import (
    DEFAULT_DTYPES,
    DTYPES,
    OPS,
    RANKS,
    Request,
    Shape,
    coverage,
    plan,
)

EXAMPLES = """
ops:
  pera_linear, with dropout, with plan="composed", or mixed: float32 adapters under half-precision
  activations; and delta_weight

examples:
  python -m pera_kernels verify
  python -m pera_kernels verify --backend triton --terms full --ranks 16 --dtypes bfloat16
  python -m pera_kernels verify --backend torch --dtypes float64 --shapes 33x70x50 128x64x96
"""
# What one process may need on a GPU: its context, and a float64 reference at the largest shape.
BYTES_PER_JOB = 3 * 2**30
MAX_JOBS = 16


def _shape(text: str) -> Shape:
    if re.fullmatch(r"\d+x\d+x\d+", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENSxINxOUT, as 33x70x50")
    T, N, M = map(int, text.split("x"))
    return T, N, M


def _at_least(minimum: int) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {minimum}")
        return int(text)

    return parse


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pera_kernels verify",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add(
        "--backend",
        nargs="+",
        choices=("triton", "torch"),
        help="default: both; one that is named and cannot run is a failure",
    )
    add("--ops", nargs="+", choices=tuple(OPS), metavar="OP", help="of " + ", ".join(OPS))
    add("--terms", nargs="+", choices=TERMS, default=TERMS)
    add("--ranks", nargs="+", type=_at_least(1), default=RANKS, metavar="R")
    add(
        "--dtypes",
        nargs="+",
        choices=tuple(DTYPES),
        default=DEFAULT_DTYPES,
        metavar="DTYPE",
        help=f"of {', '.join(DTYPES)}; default: all but the last, which only torch computes in",
    )
    add("--shapes", nargs="+", type=_shape, metavar="TxNxM", help="tokens x in x out")
    add("--seed", type=_at_least(0), default=0, help="of the inputs and the dropout; default: 0")
    add("--exhaustive", action="store_true", help="every op at every default shape: slow")
    add("--jobs", type=_at_least(0), help="processes; 0: this one; default: from cores and memory")
    add("--failures", action="store_true", help="print no table, only what failed")
    add("--json", type=Path, metavar="FILE", help="write every output's verdict")
    return parser


def _device(parser: argparse.ArgumentParser, asked: str | None) -> str:
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        parser.error("argument --device: PyTorch finds no GPU here")
    return asked or ("cuda" if found else "cpu")


def _jobs(device: str) -> int:
    jobs = min(MAX_JOBS, os.cpu_count() or 1)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        jobs = min(jobs, free // BYTES_PER_JOB)
    return max(1, jobs)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    return {
        "pera_kernels": pera_kernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


class Progress:
    """A bar on a terminal's standard error; silent elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self.shown = sys.stderr.isatty()

    def __call__(self, rows: list[Row]) -> None:
        self.done += len(rows)
        self.failed += sum(row.status == "FAIL" for row in rows)
        case = rows[-1].task
        filled = 24 * self.done // max(self.total, 1)
        self.show(
            f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total}, "
            f"{self.failed} failed; {case.case.terms} r={case.case.r} {case.dtype}"
        )

    def show(self, text: str) -> None:
        if self.shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A time limit's SIGTERM is an interruption too: what was measured is still reported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    device = _device(parser, given.device)
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"argument --json: {given.json.parent} is not a folder")

    def unique(values: Any) -> Any:
        return None if values is None else tuple(dict.fromkeys(values))

    request = Request(
        device=device,
        backends=unique(given.backend),
        terms=unique(given.terms),
        ranks=unique(given.ranks),
        dtypes=unique(given.dtypes),
        ops=unique(given.ops),
        shapes=unique(given.shapes),
        seed=given.seed,
        exhaustive=given.exhaustive,
    )
    tasks = plan(request)
    if not tasks:
        parser.error("argument --ops: mixed is about bfloat16 and float16; --dtypes has neither")
    jobs = _jobs(device) if given.jobs is None else given.jobs
    if device == "cpu" and "triton" in request.used_backends:
        # Triton reads it when it is imported: here at the first launch, in new processes anyway.
        os.environ["TRITON_INTERPRET"] = "1"
    return _run(request, tasks, jobs, given)


def _run(request: Request, tasks: Sequence[Any], jobs: int, given: argparse.Namespace) -> int:
    device = request.device
    versions = _versions()
    interpreted = "triton" in request.used_backends and interpreting()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    about = [_device_name(device), f"{max(jobs, 1)} process{'es' if jobs > 1 else ''}"]
    if interpreted:
        about.insert(1, "Triton's kernels interpreted")
    print("; ".join([*about, f"seed {request.seed}"]))
    print("\n".join(coverage(request)))
    print(
        "max, rms: error against float64, and in brackets that of the reference in the same dtype\n"
        f"ratio: error / ({numerics.FACTOR:g} x the reference's + {numerics.FLOOR_ULPS_MAX:g} ulps "
        f"of the largest value for max, {numerics.FLOOR_ULPS_RMS:g} of the rms value for rms); "
        "at most 1 passes\n"
        "at: index of the element with the largest error, after draw: where draws are pooled\n",
        flush=True,
    )
    progress = Progress(sum(len(task.backends) for task in tasks))
    start = time.perf_counter()
    found: list[Row] = []
    interrupted = False
    try:
        with _stoppable():
            for group in measure(tasks, device, jobs):
                found += group
                progress(group)
    except KeyboardInterrupt:
        interrupted = True
    wall = time.perf_counter() - start
    progress.show("")
    rows = in_order(found, tasks)

    if not given.failures:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(report.table(rows, width)), end="\n\n")
    print("\n".join(report.overview(rows)))
    print("\n".join(report.failures(rows, device)))
    stopped = (
        f"; interrupted, {progress.total - progress.done} cases not run" if interrupted else ""
    )
    print(f"{report.summary(rows)}; {wall:.0f} s{stopped}")
    if given.json is not None:
        settings = {
            "versions": {**versions, "cuda": torch.version.cuda, "hip": torch.version.hip},
            "device": device,
            "device_name": _device_name(device),
            "settings": {
                **{key: value for key, value in vars(given).items() if key != "json"},
                "device": device,
                "jobs": jobs,
                "interpreted": interpreted,
                "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
                "factor": numerics.FACTOR,
                "floor_ulps_max": numerics.FLOOR_ULPS_MAX,
                "floor_ulps_rms": numerics.FLOOR_ULPS_RMS,
            },
            "wall_s": round(wall, 2),
            "interrupted": interrupted,
            "coverage": coverage(request),
        }
        text = json.dumps(report.payload(rows, settings), indent=1, allow_nan=False)
        given.json.write_text(text + "\n")
    failed = any(row.status == "FAIL" for row in rows)
    missing = request.backends is not None and any(row.unavailable for row in rows)
    return 130 if interrupted else 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
