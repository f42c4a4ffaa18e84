"""``info``: what there is, as a dictionary."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..checks import BACKENDS
from ..kernels import interpreting, tiles

__all__ = ["commit", "installation", "version"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")


def version(package: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of a checkout, with "+" where the package differs from it; None elsewhere.

    A copy of the tree without .git is told by the environment variable PERA_COMMIT.
    """
    if given := os.environ.get("PERA_COMMIT"):
        return given
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "-s", "pera_kernels")
    return None if head is None else head + "+" * bool(changed)


def installation() -> dict[str, Any]:
    """Device, backends and why one is missing, versions, tile table."""
    # A broken driver makes torch warn and say no.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    names = [name for name in BACKENDS if name != "auto"]
    reasons = {name: backends.unavailable(name, device) for name in names}
    return {
        "pera_kernels": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "auto": backends.resolve("auto", device, (torch.float32,)),
        "backends": reasons,
        "tile_table": tiles.architecture(device),
        "interpreting": interpreting(),
    }
