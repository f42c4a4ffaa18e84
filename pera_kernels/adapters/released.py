"""Checkpoints of the released PERA code."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..checks import check_model
from ..terms import coefficient_count
from . import files
from .checkpoint import PREFIX, AdapterFile, check_modules
from .load import Incompatible, place

__all__ = ["load_released"]

PARTS = {"lora_A": "pera_A", "lora_B": "pera_B", "lora_A_parameter": "pera_h"}
NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def load_released(
    model: nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    alpha: float | None = None,
    overwrite: bool = False,
    backend: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> Incompatible:
    """Load a checkpoint of the released PERA code into a plain model or one with adapters.

    Its keys end in ``lora_A`` ``(r, N)``, ``lora_B`` ``(M, r)`` and ``lora_A_parameter``
    ``(1, r (r + 1) / 2)``; where the last is absent h is zero.

    Args:
        path: the folder, or ``adapter_model.bin`` or ``adapter_model.safetensors`` itself. A
            ``.bin`` is read with ``weights_only=True``: it cannot run code.
        alpha: numerator of the scale. The released code accepts ``lora_alpha`` and ignores it:
            None means its scale, 1.
        strict, overwrite, backend, adapter_dtype: see :func:`pera_kernels.load_adapter`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than tensors, or does not fit the model, which
            is unchanged.
    """
    check_model(model)
    file = _file(Path(path))
    tensors = _read(file)
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in PARTS or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{file} has an entry {key!r}; those of the released code are tensors and end in "
                f"{', '.join(PARTS)}"
            )
        by_module.setdefault(module.removeprefix(PREFIX), {})[PARTS[part]] = tensor
    options = {}
    for name, own in by_module.items():
        A = own.get("pera_A")
        r = A.shape[0] if A is not None and A.dim() == 2 else 1
        if "pera_h" in own:
            h = own["pera_h"]
            if h.dim() == 2 and h.shape[0] == 1:
                own["pera_h"] = h[0]
        elif A is not None and r > 0:
            own["pera_h"] = A.new_zeros(coefficient_count(r, "full"))
        options[name] = {
            "r": r,
            "alpha": float(r) if alpha is None else alpha,
            "terms": "full",
            "dropout": 0.0,
        }
    check_modules(options, by_module, file)
    adapter = AdapterFile(file, options, by_module)
    return place(model, adapter, strict, overwrite, backend, adapter_dtype)


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} has neither {' nor '.join(NAMES)}")


def _read(file: Path) -> Mapping[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return files.read_safetensors(file)[0]
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} is damaged or holds something else than tensors, which is never executed: "
            f"{reason}"
        ) from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{file} must hold a mapping of names to tensors")
    return value
