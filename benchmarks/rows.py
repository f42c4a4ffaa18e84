"""What a measurement says: one JSON line with its case, its numbers, and where it was made."""

from __future__ import annotations

import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pera_kernels.cli import describe
from pera_kernels.kernels import interpreting
from pera_kernels.testing import Case
from tools.rows import append, read

__all__ = [
    "DTYPES",
    "RESULTS",
    "Row",
    "append",
    "default_file",
    "environment",
    "line",
    "of_case",
    "read",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# What --dtypes takes: the dtype of activations and weight, and of the adapter.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16+float32": (torch.float16, torch.float32),
    "float16": (torch.float16, torch.float16),
}

# The keys of a row are explained in benchmarks/README.md.
Row = dict[str, Any]


def of_case(case: Case) -> Row:
    """The keys of a row that say what was computed."""
    dtypes = (case.dtype, case.factor_dtype)
    return {
        "terms": case.terms,
        "r": case.r,
        "T": case.T,
        "n": case.N,
        "m": case.M,
        "dtype": next(name for name, pair in DTYPES.items() if pair == dtypes),
        "dropout": case.dropout_p,
    }


def environment(device: torch.device) -> Row:
    """The keys of a row that say where and with what it was made.

    Under Triton's interpreter every run is a dry run, whose times no table shows.
    """
    return {
        "status": "dry run" if interpreting() else "timed",
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": describe.version("triton"),
        "commit": describe.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def default_file(device: torch.device, prefix: str = "") -> Path:
    """One file for each kind of device: cpu.jsonl, or gpu-<name>.jsonl."""
    name = f"gpu {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
    return RESULTS / f"{prefix}{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"


def line(row: Row) -> str:
    """A row as the commands print it."""
    text = f"{row['contender']:<40}{row['dtype']:<17}{row['phase']:<9}"
    if row["status"] == "failed":
        return f"{text}FAILED: {row['note']}"
    for key, form, unit in (
        ("median_ms", "9.4f", "ms"),
        ("ratio_to_frozen", "6.3f", "x frozen"),
        ("eager_ms", "9.4f", "ms eager"),
        ("eager_ratio_to_frozen", "6.3f", "x frozen"),
        ("peak_mib", "9.1f", "MiB peak"),
        ("tflops", "7.2f", "TFLOP/s"),
        ("gbps", "7.1f", "GB/s"),
    ):
        if row.get(key) is not None:
            text += f" {row[key]:{form}} {unit}"
    return f"{text}  {row.get('note', '')}".rstrip()
