"""Rows of results: what every row carries, JSON lines that are only ever appended, and a table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pera_kernels.terms import expanded_rank
from pera_kernels.verify.numerics import Case

from .layers import Contender

__all__ = [
    "DTYPES",
    "Host",
    "Row",
    "append",
    "case_key",
    "commit",
    "default_file",
    "dtype_name",
    "host",
    "make_row",
    "read",
    "table",
    "title",
]

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one phase of one case; the keys are explained in README.md. What was not
    measured is None.
    """

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
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio_to_frozen: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_share: float | None = None
    launches: int | None = None
    host_us: float | None = None
    error_ratio: float | None = None
    ceiling_tflops: float | None = None
    ceiling_gbps: float | None = None
    graph: bool = False
    rounds: int = 0
    status: str = "timed"
    note: str = ""
    device: str
    torch: str
    triton: str | None
    commit: str | None
    date: str


def dtype_name(case: Case) -> str:
    pair = (case.dtype, case.factor_dtype)
    return next(name for name, dtypes in DTYPES.items() if dtypes == pair)


def case_key(case: Case) -> dict[str, Any]:
    """What a row says about its case."""
    return {
        "terms": case.terms,
        "r": case.r,
        "T": case.T,
        "n": case.N,
        "m": case.M,
        "dtype": dtype_name(case),
        "dropout": case.dropout_p,
    }


def make_row(contender: Contender, case: Case, host: Host, phase: str, **measured: Any) -> Row:
    """``measured`` are other fields of a row; floats keep five significant digits."""
    rounded: dict[str, Any] = {
        name: _rounded(value) if isinstance(value, float) else value
        for name, value in measured.items()
    }
    return Row(
        contender=contender.name,
        plan=contender.plan,
        phase=phase,
        **case_key(case),
        **rounded,
        **asdict(host),
    )


def _rounded(value: float) -> float:
    """Five significant digits: more would be noise."""
    return float(f"{value:.5g}")


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, "+" where the package differs from it; None outside one."""
    if not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "pera_kernels") else "")


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
    return Host(name, torch.__version__, _triton(), commit(), now)


def default_file(device: torch.device) -> Path:
    """One file per kind of device, beside this package: cpu.jsonl or gpu-<name>.jsonl."""
    name = f"gpu {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{slug}.jsonl"


def append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows as they were appended; a key that an older version did not write is None."""
    missing = dict.fromkeys(field.name for field in fields(Row))
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{**missing, **json.loads(line)} for line in lines if line]


def title(case: Case) -> str:
    K = expanded_rank(case.r, case.terms)
    return (
        f"T={case.T}  n={case.N} m={case.M}  {dtype_name(case)}  {case.terms} r={case.r} (K={K})  "
        f"dropout {case.dropout_p:g}"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# Heading, width and content of the numbers of the printed table.
COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("median ms", 11, lambda row: _number(row.median_ms, 4)),
    ("p20", 10, lambda row: _number(row.p20_ms, 4)),
    ("p80", 10, lambda row: _number(row.p80_ms, 4)),
    ("x frozen", 9, lambda row: _number(row.ratio_to_frozen, 2)),
    ("peak MiB", 9, lambda row: _number(row.peak_mib, 2)),
    ("saved", 8, lambda row: _number(row.saved_mib, 2)),
    ("roof %", 7, lambda row: _number(row.roofline_share and 100 * row.roofline_share, 0)),
    ("launches", 9, lambda row: _number(row.launches, 0)),
    ("host us", 8, lambda row: _number(row.host_us, 0)),
)


def table(rows: list[Row]) -> str:
    """The rows of one case, aligned, in at most 120 columns; what went wrong stands below."""
    headings = "".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS)
    text = [f"{'contender':<19}{'plan':<9}{'phase':<8}{headings}"]
    for row in rows:
        mark = "graph" if row.graph else "" if row.status == "timed" else row.status
        numbers = "".join(f"{show(row):>{width}}" for _, width, show in COLUMNS)
        text.append(f"{row.contender:<19}{row.plan:<9}{row.phase:<8}{numbers}  {mark}".rstrip())
    notes = dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note)
    return "\n".join([*text, *notes])
