"""Rows of results: what every row carries, JSON lines that are only ever appended, and a table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from pera_kernels.terms import expanded_rank
from tools.numerics import Case

from .contenders import Contender

__all__ = ["DTYPES", "Host", "Row", "append", "default_file", "dtype_name", "host", "table"]

ROOT = Path(__file__).parent.parent

# What --dtypes takes: the dtype of activations and weight, and of the adapter.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
    "float16+float32": (torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Host:
    """Where and with what a run was made."""

    device: str
    torch: str
    triton: str | None
    commit: str | None
    date: str


@dataclass(frozen=True)
class Row:
    """One contender in one phase of one case. What was not measured is None."""

    contender: str
    plan: str
    terms: str
    r: int
    T: int
    n: int
    m: int
    dtype: str
    dropout: float
    phase: str
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    ratio_to_frozen: float | None
    peak_mib: float | None
    saved_mib: float | None
    graph: bool
    rounds: int
    status: str
    note: str
    device: str
    torch: str
    triton: str | None
    commit: str | None
    date: str


def dtype_name(case: Case) -> str:
    pair = (case.dtype, case.factor_dtype)
    return next(name for name, dtypes in DTYPES.items() if dtypes == pair)


def make_row(
    contender: Contender,
    case: Case,
    host: Host,
    phase: str,
    *,
    times: tuple[float, float, float] | None = None,
    ratio: float | None = None,
    peak: float | None = None,
    saved: float | None = None,
    graph: bool = False,
    rounds: int = 0,
    status: str = "timed",
    note: str = "",
) -> Row:
    """``times`` are the median and the 20th and 80th percentile."""
    median, low, high = times or (None, None, None)
    return Row(
        contender=contender.name,
        plan=contender.plan,
        terms=case.terms,
        r=case.r,
        T=case.T,
        n=case.N,
        m=case.M,
        dtype=dtype_name(case),
        dropout=case.dropout_p,
        phase=phase,
        median_ms=_rounded(median),
        p20_ms=_rounded(low),
        p80_ms=_rounded(high),
        ratio_to_frozen=_rounded(ratio),
        peak_mib=_rounded(peak),
        saved_mib=_rounded(saved),
        graph=graph,
        rounds=rounds,
        status=status,
        note=note,
        **asdict(host),
    )


def _rounded(value: float | None) -> float | None:
    """Five significant digits: more would be noise."""
    return None if value is None else float(f"{value:.5g}")


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, "+" where the package differs from it; None outside one."""
    if not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "pera_kernels") else "")


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def host(device: torch.device) -> Host:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Host(name, torch.__version__, _triton(), _commit(), now)


def default_file(device: torch.device) -> Path:
    """One file per kind of device, beside this package."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{slug}.jsonl"


def append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def _title(row: Row) -> str:
    K = expanded_rank(row.r, row.terms)  # type: ignore[arg-type]
    return (
        f"T={row.T}  n={row.n} m={row.m}  {row.dtype}  {row.terms} r={row.r} (K={K})  "
        f"dropout {row.dropout:g}"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: list[Row]) -> str:
    """The rows of one case, aligned, in at most 110 columns; what went wrong stands below."""
    head = ("contender", "plan", "phase", "median ms", "p20", "p80", "x frozen", "peak MiB")
    lines = [(*head, "saved MiB", "")]
    for row in rows:
        lines.append(
            (
                row.contender,
                row.plan,
                row.phase,
                _number(row.median_ms, 4),
                _number(row.p20_ms, 4),
                _number(row.p80_ms, 4),
                _number(row.ratio_to_frozen, 2),
                _number(row.peak_mib, 2),
                _number(row.saved_mib, 2),
                "graph" if row.graph else "" if row.status == "timed" else row.status,
            )
        )
    text = [_title(rows[0])]
    for name, plan, phase, *numbers, mark in lines:
        text.append(
            f"{name:<17}{plan:<10}{phase:<9}"
            + "".join(f"{number:>11}" for number in numbers)
            + f"  {mark}".rstrip()
        )
    notes = dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note)
    return "\n".join([*text, *notes])
