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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..checks import check_adapter, naming
from ..module import PARTS, AdapterOptions, PeraLinear
from ..operands import Factors
from ..terms import TERMS
from . import files
from .engines import is_deepspeed
from .inject import (
    base_name,
    require_adapters,
)
from .optimizer import warn_of_idle_products
from .ranks import together
from .trained import Found, find, plain_name

__all__ = [
    "AdapterFile",
    "adapter_state_dict",
    "read_adapter",
    "save_adapter",
]

ModelT = TypeVar("ModelT", bound=nn.Module)

FORMAT = "pera_kernels"
FORMAT_VERSION = 2
TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OPTIONS = ("r", "alpha", "terms", "dropout", "init")
# Before the name of every tensor, since version 2 and in PEFT.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read and checked, and is in no model yet.

    ``options`` has r, alpha, terms, dropout and, where the file says it, init of every module,
    ``tensors`` its A, B and h, and ``parameters`` what else is in the file, by its name in a model
    without adapters: what trained beside them, and what is ``frozen`` and was saved all the same.
    """

    path: Path
    options: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    base_model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a ``torch.compile`` or data-parallel wrapper or DeepSpeed's engine, whose
    names are the plain ones.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        outer = isinstance(model, parallel) or is_deepspeed(model)
        inner = model.module if outer else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def tensor_name(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors by the names that they have in ``model.state_dict()``; not copied.

    Of a model that is sharded (FSDP2, tensor parallelism, ZeRO-3) they are gathered, layer by
    layer, to the CPU of every process: a call for all of them.

    Raises:
        ValueError: the model has no adapter.
        TimeoutError: another process that holds a part did not call it.
    """
    model = unwrapped(model)
    layers = require_adapters(model, "save")
    with together(model, "adapter_state_dict") as group:
        found = {}
        for name, layer in layers.items():
            own = parts_of(group.on_cpu(layer.whole_factors()))
            found.update({tensor_name(name, part): tensor for part, tensor in own.items()})
    return found


def parts_of(factors: Factors) -> dict[str, torch.Tensor]:
    """Those that there are, by the names of the layer's parameters."""
    return {p: t.detach() for p, t in zip(PARTS, factors, strict=True) if t is not None}


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
        **({"init_weights": config["init"]} if "init" in config else {}),
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


def digest_of(read: AdapterFile) -> str:
    """Of what was read, to compare it."""
    tensors = {
        tensor_name(name, part): tensor
        for name, own in read.tensors.items()
        for part, tensor in own.items()
    }
    return _digest(json.dumps(read.config, sort_keys=True, default=str), tensors)


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write the adapters of ``model``, and what else trains in it, to ``folder``, which is made if
    it is missing. :func:`load_adapter` reads it, and so does PEFT with ``pera_kernels.peft``.

    Interrupted at any moment, it leaves the checkpoint that was there or the new one. Merged layers
    are saved as what they are, an adapter beside W0. Of a sharded model every process gathers it
    layer by layer, and the first one writes.

    Args:
        base_model: a hint for people, such as a model's name; by default what the model's own
            configuration says.

    Warns:
        UserWarning: h trained, and the products are below a hundredth of BA in every layer.

    Raises:
        ValueError: the model has no adapter, or one that does not fit its options.
        OSError: the folder cannot be written; what was there is untouched. (RuntimeError in the
            processes that do not write.)
        TimeoutError: another process that holds a part did not call it.
        ImportError: safetensors is not installed.
    """
    model, folder = unwrapped(model), Path(folder)
    layers = require_adapters(model, "save")
    with together(model, "save_adapter") as group:
        factors = {}
        for name, layer in layers.items():
            own = layer.whole_factors()
            if group.is_first:
                factors[name] = group.on_cpu(own)
            del own
        others = find(model)
        beside = group.gather(others.tensors)
        hint = base_model or _base_model_hint(model)
        others = replace(others, tensors=beside)
        group.on_first(lambda: _write(folder, layers, factors, others, hint))
    warn_of_idle_products(
        (own.A, own.B, own.h, layers[name].terms)
        for name, own in factors.items()
        if own.h is not None and layers[name].pera_h.requires_grad  # type: ignore[union-attr]
    )


def _write(
    folder: Path,
    layers: Mapping[str, PeraLinear],
    factors: Mapping[str, Factors],
    others: Found,
    base_model: str | None,
) -> None:
    """Check what is whole now, and write it."""
    options = {
        base_name(name): {key: getattr(m, key) for key in OPTIONS} for name, m in layers.items()
    }
    tensors = {
        base_name(tensor_name(name, part)): tensor
        for name, own in factors.items()
        for part, tensor in parts_of(own).items()
    }
    check_modules(options, _split(tensors, folder), folder)
    for name, layer in layers.items():
        with naming(name):
            layer.check_fit(factors[name])
    config = _config(options, others, base_model)
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
    check_modules(options, by_module, folder / TENSORS_FILE)
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
        refuse_listed(
            f"{path}: target_modules and tensors disagree",
            {
                "without tensors": sorted(set(map(str, told)) - set(by_module)),
                "not in target_modules": sorted(set(by_module) - set(map(str, told))),
            },
        )
    options = {}
    for name in by_module:
        own = {**config, **others.get(name, {})}
        # Files of old do not say how A began.
        options[name] = {key: own.get(key) for key in OPTIONS if key in own or key != "init"}
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
            "init": "gaussian" if config.get("init_weights") == "gaussian" else "kaiming",
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


def check_modules(
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
            AdapterOptions(**told)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def refuse_listed(head: str, lists: Mapping[str, list[str]], limit: int = 12) -> None:
    """Raise one ValueError that lists what is wrong."""
    lines = [head]
    for title, names in lists.items():
        if names:
            shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
            lines.append(f"  {title} ({len(names)}): {shown}")
    raise ValueError("\n".join(lines))
