"""Adapter checkpoints: ``adapter_model.safetensors`` and a readable ``adapter_config.json``.

The tensors' file holds the configuration as well, with a digest over both, so that it is complete
in itself: it is replaced in one step, and a flipped bit is seen. Tensors have the names that PEFT
gives them, and ``adapter_config.json`` is what PEFT reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..checks import FLOATING, check_adapter, check_model, naming, some
from ..module import AdapterOptions, features
from ..terms import TERMS
from . import files
from .inject import (
    adapted_modules,
    adopt,
    base_name,
    named_places,
    refuse_parallel,
    require_adapters,
)
from .merge import unload
from .trained import Found, Places, find, plain_name

__all__ = [
    "AdapterFile",
    "Incompatible",
    "adapter_state_dict",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

ModelT = TypeVar("ModelT", bound=nn.Module)

FORMAT = "pera_kernels"
FORMAT_VERSION = 2
TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PARTS = ("pera_A", "pera_B", "pera_h")
OPTIONS = ("r", "alpha", "terms", "dropout")
# Before the name of every tensor, since version 2 and in PEFT.
PREFIX = "base_model.model."


class Incompatible(NamedTuple):
    """Keys of the model that the file has not, and of the file that the model has not."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read and checked, and is in no model yet.

    ``options`` has r, alpha, terms and dropout of every module, ``tensors`` its A, B and h, and
    ``parameters`` what else is in the file, by its name in a model without adapters: what trained
    beside them, and what is ``frozen`` and was saved all the same.
    """

    path: Path
    options: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    base_model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a ``torch.compile`` or data-parallel wrapper, whose names are the plain
    ones.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _key(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors by the names that they have in ``model.state_dict()``; not copied.

    Raises:
        ValueError: the model has no adapter.
    """
    return {
        _key(name, part): tensor.detach()
        for name, layer in require_adapters(unwrapped(model), "save").items()
        for part in PARTS
        if (tensor := getattr(layer, part)) is not None
    }


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)


def _base_model_hint(model: nn.Module) -> str | None:
    hint = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(
        model, "name_or_path", None
    )
    return hint if isinstance(hint, str) and hint else None


def _config(
    options: Mapping[str, dict[str, Any]], others: Found, base_model: str | None
) -> dict[str, Any]:
    common = {key: _most_common([own[key] for own in options.values()]) for key in OPTIONS}
    different = {
        name: {key: own[key] for key in OPTIONS if own[key] != common[key]}
        for name, own in options.items()
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        **common,
        "target_modules": list(options),
        # Modules that differ from the above, by name.
        "modules": {name: own for name, own in different.items() if own},
        # Other parameters that trained, what belongs to them, and modules that are saved whole.
        "trained": others.trained,
        "with_trained": [name for name in others.tensors if name not in others.trained],
        "modules_to_save": others.modules,
    }


def _for_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration as PEFT reads it. It has one ``terms`` for all modules."""
    own = config.get("modules", {})
    return {
        "peft_type": "PERA",
        "base_model_name_or_path": config.get("base_model"),
        "r": config.get("r"),
        "pera_alpha": config.get("alpha"),
        "pera_dropout": config.get("dropout"),
        "terms": "mixed" if any("terms" in o for o in own.values()) else config.get("terms"),
        "target_modules": config["target_modules"],
        "rank_pattern": {name: o["r"] for name, o in own.items() if "r" in o},
        "alpha_pattern": {name: o["alpha"] for name, o in own.items() if "alpha" in o},
        "modules_to_save": config.get("modules_to_save") or None,
        "inference_mode": True,
    }


def _digest(config: str, tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        whole.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write the adapters of ``model``, and what else trains in it, to ``folder``, which is made if
    it is missing. :func:`load_adapter` reads it, and so does PEFT with ``pera_kernels.peft``.

    Interrupted at any moment, it leaves the checkpoint that was there or the new one. Merged layers
    are saved as what they are, an adapter beside W0.

    Args:
        base_model: a hint for people, such as a model's name; by default what the model's own
            configuration says.

    Raises:
        ValueError: the model has no adapter, or one that does not fit its options.
        OSError: the folder cannot be written; what was there is untouched.
        ImportError: safetensors is not installed.
    """
    model, folder = unwrapped(model), Path(folder)
    layers = require_adapters(model, "save")
    options = {
        base_name(name): {key: getattr(m, key) for key in OPTIONS} for name, m in layers.items()
    }
    tensors = {base_name(name): tensor for name, tensor in adapter_state_dict(model).items()}
    _check_modules(options, _split(tensors, folder), folder)
    for name, layer in layers.items():
        with naming(name):
            layer.check_fit()
    others = find(model)
    config = _config(options, others, base_model or _base_model_hint(model))
    text = json.dumps(config, sort_keys=True)
    tensors = {PREFIX + name: tensor for name, tensor in {**tensors, **others.tensors}.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"pera_config": text, "pera_digest": _digest(text, tensors)}
    files.write_safetensors(folder / TENSORS_FILE, tensors, metadata)
    files.write_json(folder / CONFIG_FILE, _for_peft(config))


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check a folder of :func:`save_adapter`, or of PEFT with a PERA adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, corrupted, of a newer format or inconsistent; the message
            names the file and what was expected.
    """
    folder = Path(folder)
    tensors, metadata = files.read_safetensors(folder / TENSORS_FILE)
    path = folder / CONFIG_FILE
    stored = metadata.get("pera_config")
    if stored is None:
        config = files.read_json(path)
    else:
        digest = metadata.get("pera_digest")
        if digest is not None and digest != _digest(stored, tensors):
            raise ValueError(
                f"{folder / TENSORS_FILE} is corrupted: its digest does not fit its content"
            )
        config, path = _stored(stored, folder / TENSORS_FILE), folder / TENSORS_FILE
    if config.get("peft_type") is not None:
        options, by_module, others, frozen = _from_peft(config, tensors, path)
    else:
        _check_version(config, path)
        options, by_module, others, frozen = _from_own(config, tensors, path)
    _check_modules(options, by_module, folder / TENSORS_FILE)
    if stored is not None:
        _compare(folder / CONFIG_FILE, config)
    base = config.get("base_model") or config.get("base_model_name_or_path")
    base = base if isinstance(base, str) else None
    return AdapterFile(folder, options, by_module, others, frozenset(frozen), base, config)


def _compare(path: Path, config: Mapping[str, Any]) -> None:
    """Warn if the readable configuration says something else than the stored one."""
    if not path.exists():
        return
    readable = files.read_json(path)
    if "format" in readable:
        _check_version(readable, path)
    if readable not in (dict(config), _for_peft(config)):
        warnings.warn(
            f"{path} differs from the configuration stored in {TENSORS_FILE}, which counts",
            stacklevel=4,
        )


def _stored(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a configuration that is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a configuration that is not a JSON object")
    return config


def _check_version(config: Mapping[str, Any], path: Path) -> int:
    if config.get("format") != FORMAT:
        raise ValueError(
            f'{path} is not a PERA adapter: "format" must be "{FORMAT}"; '
            f"got {config.get('format')!r}"
        )
    version = config.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f'{path}: "format_version" must be an integer >= 1; got {version!r}')
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this package reads up to {FORMAT_VERSION}: "
            "update pera_kernels"
        )
    return version


# Options and tensors of every module, other parameters, and the names of those that are frozen.
Read = tuple[
    dict[str, dict[str, Any]],
    dict[str, dict[str, torch.Tensor]],
    dict[str, torch.Tensor],
    set[str],
]


def _split(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part not in PARTS:
            raise ValueError(
                f"{path} has a tensor {key!r}; those of an adapter end in {', '.join(PARTS)}"
            )
        own = by_module.setdefault(module, {})
        # Files of old have an empty h where there are no coefficients.
        if part != "pera_h" or tensor.numel() > 0:
            own[part] = tensor
    return by_module


def _from_own(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> Read:
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    listed = {key: config.get(key, []) for key in ("trained", "with_trained")}
    for key, names in listed.items():
        if not isinstance(names, list) or not all(name in tensors for name in names):
            raise ValueError(f'{path}: "{key}" must list tensors of the file; got {names!r}')
    beside = {name: tensors[name] for names in listed.values() for name in names}
    by_module = _split({n: t for n, t in tensors.items() if n not in beside}, path)
    others = config.get("modules", {})
    if not isinstance(others, dict) or not all(isinstance(own, dict) for own in others.values()):
        raise ValueError(f'{path}: "modules" must be an object of objects; got {others!r}')
    targets = config.get("target_modules")
    if not isinstance(targets, list) or set(map(str, targets)) != set(by_module):
        told = targets if isinstance(targets, list) else []
        _listed(
            f"{path}: target_modules and tensors disagree",
            {
                "without tensors": sorted(set(map(str, told)) - set(by_module)),
                "not in target_modules": sorted(set(by_module) - set(map(str, told))),
            },
        )
    options = {}
    for name in by_module:
        own = {**{key: config.get(key) for key in OPTIONS}, **others.get(name, {})}
        options[name] = {key: own[key] for key in OPTIONS}
    return options, by_module, beside, set(listed["with_trained"])


def _from_peft(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> Read:
    """A folder that PEFT wrote: its names, its way to say rank and alpha.

    What is in it beside adapters is whole modules, trained biases, and the frozen weight of an
    output head that is a target. Biases of adapted layers trained there and are frozen here.
    """
    if config["peft_type"] != "PERA":
        raise ValueError(
            f'{path}: "peft_type" must be "PERA" to be read as a PERA adapter; '
            f"got {config['peft_type']!r}"
        )
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    others = {key: t for key, t in tensors.items() if key.rpartition(".")[2] not in PARTS}
    by_module = _split({key: t for key, t in tensors.items() if key not in others}, path)
    options = {}
    for name, own in by_module.items():
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("pera_alpha"), path)
        A = own.get("pera_A")
        r = A.shape[0] if A is not None and A.dim() == 2 else config.get("r")
        alpha = r if alpha is None else alpha
        if config.get("use_rslora") and isinstance(r, int) and isinstance(alpha, (int, float)):
            alpha = alpha * math.sqrt(r)
        options[name] = {
            "r": r,
            "alpha": alpha,
            "terms": config.get("terms", "full"),
            "dropout": config.get("pera_dropout", 0.0),
        }
    others = {plain_name(name, by_module): tensor for name, tensor in others.items()}
    return options, by_module, others, {n for n in others if n.rpartition(".")[0] in by_module}


def _by_pattern(patterns: Any, name: str, default: Any, path: Path) -> Any:
    """The value of the first pattern that is the end of a module's name, as PEFT reads them."""
    if patterns is None:
        return default
    if not isinstance(patterns, dict):
        raise ValueError(f'{path}: "alpha_pattern" must be an object; got {patterns!r}')
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_modules(
    options: dict[str, dict[str, Any]], tensors: dict[str, dict[str, torch.Tensor]], path: Path
) -> None:
    """Every module's options and tensors fit each other; ranks are those of the tensors."""
    if not tensors:
        raise ValueError(f"{path} holds no adapter tensors")
    for name, own in tensors.items():
        where = f"{path}: module {name!r}"
        lacking = [part for part in ("pera_A", "pera_B") if part not in own]
        if lacking:
            raise ValueError(f"{where} lacks {', '.join(lacking)}")
        told = options[name]
        if told["terms"] not in TERMS:
            raise ValueError(
                f"{where}: terms must be one of {', '.join(TERMS)}; got {told['terms']!r}"
            )
        try:
            check_adapter(own["pera_A"], own["pera_B"], own.get("pera_h"), told["terms"])
            r = own["pera_A"].shape[0]
            if told["r"] is not None and told["r"] != r:
                raise ValueError(f"r is {told['r']!r} in the configuration, {r} in the tensors")
            told["r"] = r
            if told["alpha"] is None or isinstance(told["dropout"], bool):
                raise TypeError(f"alpha and dropout must be numbers; got {told!r}")
            AdapterOptions(r, told["alpha"], told["terms"], told["dropout"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def _listed(head: str, lists: Mapping[str, list[str]], limit: int = 12) -> None:
    """Raise one ValueError that lists what is wrong."""
    lines = [head]
    for title, names in lists.items():
        if names:
            shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
            lines.append(f"  {title} ({len(names)}): {shown}")
    raise ValueError("\n".join(lines))


def load_adapter(
    model: ModelT,
    folder: str | os.PathLike[str],
    strict: bool = True,
    *,
    overwrite: bool = False,
    backend: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> Incompatible:
    """Put the adapter in ``folder`` into ``model``, in place, and whatever else the folder holds.

    A plain model gets the adapters that the checkpoint has, of the ranks that its tensors have, as
    by :func:`pera_kernels.inject`. A model with adapters has them filled: terms and shapes must
    agree, and alpha becomes that of the checkpoint. Other parameters that trained (a head) are
    written to those of the same name, which train from then on.

    Args:
        strict: raise if the model or the checkpoint has adapters that the other has not; else these
            are left alone and returned. Tensors of another shape are refused in any case.
        overwrite: fill adapters that hold something already (B is not zero).
        backend, adapter_dtype: of the layers that are made; see :class:`PeraLinear`. A checkpoint
            in half precision is promoted to float32 unless ``adapter_dtype`` says otherwise.

    Returns:
        ``(missing_keys, unexpected_keys)``: adapters' tensors of the model that the checkpoint has
        not, and the other way round.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_adapter`; or the checkpoint does not fit the
            model: what is missing, unexpected or of another shape is listed. The model is
            unchanged.
    """
    check_model(model)
    read = read_adapter(folder)
    return place(model, read, strict, overwrite, backend, adapter_dtype)


def place(
    model: nn.Module,
    adapter: AdapterFile,
    strict: bool,
    overwrite: bool,
    backend: str,
    adapter_dtype: torch.dtype | None = None,
) -> Incompatible:
    """:func:`load_adapter` of what was read."""
    inner = unwrapped(model)
    if not adapted_modules(inner):
        refuse_parallel(model)
        return _inject(inner, adapter, strict, backend, adapter_dtype)
    if adapter_dtype is not None:
        raise ValueError(
            f"adapter_dtype goes with a model without adapters; got {adapter_dtype} for one whose "
            "adapters have their dtype already"
        )
    return _fill(inner, adapter, strict, overwrite)


def places_of_others(model: nn.Module, adapter: AdapterFile) -> Places:
    """Where what trained beside the adapters goes in a model."""
    of_peft = adapter.config.get("peft_type") is not None
    return Places(model, adapter.parameters, adapter.frozen, of_peft)


def _keys(adapter: AdapterFile, names: list[str]) -> list[str]:
    return [_key(name, part) for name in names for part in PARTS if part in adapter.tensors[name]]


def _inject(
    model: nn.Module,
    adapter: AdapterFile,
    strict: bool,
    backend: str,
    adapter_dtype: torch.dtype | None,
) -> Incompatible:
    # Of a wrapper and what it wraps, which have one name, the inner one comes last.
    modules = {base_name(n): m for n, m in model.named_modules(remove_duplicate=False)}
    unexpected = [name for name in adapter.tensors if not name or name not in modules]
    misshapen = []
    for name, own in adapter.tensors.items():
        layer = modules.get(name)
        if name in unexpected or layer is None:
            continue
        has = features(layer)
        wants = (own["pera_A"].shape[1], own["pera_B"].shape[0])
        if has != wants:
            kind = type(layer).__name__
            misshapen.append(f"{name} (adapter of {wants}, {kind} of {has})")
    fitting = [name for name in adapter.tensors if name not in unexpected]
    others = places_of_others(model, adapter)
    misshapen += others.misshapen
    if misshapen or (strict and (unexpected or others.unexpected)) or not fitting:
        _listed(
            f"the adapter in {adapter.path} does not fit this {type(model).__name__}",
            {
                "modules that the model lacks": unexpected,
                "parameters that the model lacks": others.unexpected,
                "of another shape (in, out)": misshapen,
            },
        )
    options = {}
    for name in fitting:
        stored = adapter.tensors[name]["pera_A"].dtype
        dtype = adapter_dtype or _adapter_dtype(modules[name], stored)
        options[modules[name]] = AdapterOptions(
            **adapter.options[name], adapter_dtype=dtype, backend=backend
        )
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    adapted = adopt(model, named_places(model, options), options)
    try:
        _copy(
            [
                (getattr(adapted[modules[name]], part), tensor)
                for name in fitting
                for part, tensor in adapter.tensors[name].items()
            ]
        )
        others.write()
    except BaseException:
        unload(model, merge=False)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    return Incompatible([], _keys(adapter, unexpected) + others.unexpected)


def _adapter_dtype(layer: nn.Module, stored: torch.dtype) -> torch.dtype:
    """At least float32; float64 goes with float64 only."""
    weight = getattr(layer, "weight", None)
    own = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
    if torch.float64 in (own, stored) and own in FLOATING:
        return torch.promote_types(own, torch.float32)
    return torch.promote_types(stored, torch.float32)


def _fill(model: nn.Module, adapter: AdapterFile, strict: bool, overwrite: bool) -> Incompatible:
    layers = {base_name(name): layer for name, layer in adapted_modules(model).items()}
    missing = [name for name in layers if name not in adapter.tensors]
    unexpected = [name for name in adapter.tensors if name not in layers]
    both = [name for name in layers if name in adapter.tensors]
    misshapen = []
    for name in both:
        layer, own = layers[name], adapter.tensors[name]
        if layer.terms != adapter.options[name]["terms"]:
            misshapen.append(
                f"{name} (terms {adapter.options[name]['terms']!r} for a layer of {layer.terms!r})"
            )
            continue
        for part, tensor in own.items():
            if getattr(layer, part) is not None and layer._parameters.get(part) is None:
                misshapen.append(f"{_key(name, part)} (computed from other tensors in this model)")
                continue
            has = tuple(getattr(layer, part).shape) if getattr(layer, part) is not None else None
            if has != tuple(tensor.shape):
                misshapen.append(f"{_key(name, part)} ({tuple(tensor.shape)} for {has})")
    missing_keys = [
        _key(n, part) for n in missing for part in PARTS if getattr(layers[n], part) is not None
    ]
    others = places_of_others(model, adapter)
    misshapen += others.misshapen
    unexpected_keys = _keys(adapter, unexpected) + others.unexpected
    unexpected += others.unexpected
    if others.missing and adapter.config.get("format_version") == 1:
        # Such files hold adapters alone.
        warnings.warn(
            f"{adapter.path} holds adapters alone; {some(others.missing)} of this model, which "
            "train, stay as they are",
            stacklevel=4,
        )
    else:
        missing_keys += others.missing
        missing += others.missing
    if misshapen or (strict and (missing or unexpected)) or not both:
        _listed(
            f"the adapter in {adapter.path} does not fit the adapters of this "
            f"{type(model).__name__}",
            {
                "missing in the file": missing_keys,
                "unexpected": unexpected_keys,
                "of another shape": misshapen,
            },
        )
    held = [name for name in both if not overwrite and bool(layers[name].pera_B.any())]
    if held:
        _listed(
            "the model's adapters hold something already; load_adapter(..., overwrite=True) "
            "replaces it",
            {"adapters": held},
        )
    pairs = [
        (getattr(layers[name], part), tensor)
        for name in both
        for part, tensor in adapter.tensors[name].items()
    ]
    # Everything that can fail happens before the first change.
    for name in both:
        with naming(name):
            layers[name].check_unmergeable()
    moved = [(own, tensor.to(own.device, own.dtype)) for own, tensor in pairs]
    for name in both:
        layers[name].unmerge()
        layers[name].alpha = float(adapter.options[name]["alpha"])
    _copy(moved)
    others.write()
    return Incompatible(missing_keys, unexpected_keys)


@torch.no_grad()
def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for own, tensor in pairs:
        own.copy_(tensor)
