"""Weights of a whole model in files, read one at a time."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapters import files
from ..checks import some

__all__ = ["Stored", "stored"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor in a file: its shape, and how it is read."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name: of a ``.safetensors`` file, of a folder with
    ``model.safetensors`` or the shards that ``model.safetensors.index.json`` lists, or of a state
    dict that ``torch.save`` wrote, which is read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file or folder, or a shard is missing.
        ValueError: a file is damaged, or holds something else.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return _safetensors(path) if path.suffix == ".safetensors" else _state_dict(path)


def _in_folder(folder: Path) -> dict[str, Stored]:
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return _safetensors(folder / SINGLE)
    shards = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in shards.values()
    ):
        raise ValueError(f'{folder / INDEX}: "weight_map" must map tensors to names of files')
    names = set(shards.values())
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists")
    held = {name: _safetensors(folder / name) for name in names}
    if lost := [name for name, file in shards.items() if name not in held[file]]:
        raise ValueError(f"{folder / INDEX} lists tensors that its files lack: {some(lost)}")
    return {name: held[file][name] for name, file in shards.items()}


def _safetensors(path: Path) -> dict[str, Stored]:
    safetensors = files.safetensors_package()

    def read(name: str) -> torch.Tensor:
        try:
            return opened.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from error

    try:
        opened = safetensors.safe_open(str(path), framework="pt", device="cpu")
        names = list(opened.keys())
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return {name: Stored(shape, partial(read, name)) for name, shape in shapes.items()}


def _state_dict(path: Path) -> dict[str, Stored]:
    value: Any
    try:
        # Only what is read comes into memory; files of before PyTorch 1.6 are read whole.
        mapped = zipfile.is_zipfile(path)
        value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is neither a .safetensors file nor a state dict that torch.load reads with "
            f"weights_only=True: {reason}"
        ) from error
    tensors = value if isinstance(value, Mapping) else {}
    found = {
        name: Stored(tuple(tensor.shape), partial(_same, tensor))
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if not found:
        holds = ", ".join(map(str, list(tensors)[:8])) or type(value).__name__
        raise ValueError(f"{path} must hold a mapping of names to tensors; it holds {holds}")
    return found


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()
