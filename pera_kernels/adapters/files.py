"""Files that are replaced in one step, and safetensors files that are read with suspicion."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "read_json",
    "read_safetensors",
    "replace",
    "safetensors_package",
    "write_json",
    "write_safetensors",
]

MAX_JSON_BYTES = 2**24


def safetensors_package() -> Any:
    """safetensors, or an ImportError that says which extra to install."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the safetensors package: "
            'pip install "pera_kernels[checkpoints]" or pip install safetensors'
        ) from error
    return safetensors


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file beside ``path``, then put it in its place in one step.

    Whatever interrupts this, ``path`` holds the old content or the new one. The new file takes the
    permissions that a freshly made file would have.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        write(new)
        # Some writers put a file of their own in the place of ours: the mode is set afterwards.
        mask = os.umask(0)
        os.umask(mask)
        new.chmod(0o666 & ~mask)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace(path, lambda new: new.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, not an object, or larger than 16 MiB.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: too large for a configuration")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return value


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Tensors, copied to the CPU, with a ``metadata`` of strings."""
    safetensors = safetensors_package()
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    data = safetensors.torch.save(own, {"format": "pt", **metadata})
    replace(path, lambda new: new.write_bytes(data))


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors by name, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not a safetensors file.
    """
    safetensors = safetensors_package()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            # Copies: the file may be replaced or removed while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return tensors, metadata
