"""What is trained beside the adapters, a head for example, as PEFT's LoRA checkpoints hold it:
modules that are saved whole, and biases.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..module import PeraLinear, is_adapted
from ..sharded import stored, whole
from .checkpoint import AdapterFile
from .inject import WRAPPERS, base_name

__all__ = ["Beside", "beside_in", "beside_of", "tree"]

# PEFT cannot save these whole, because they are not called.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Beside:
    """``modules``: what is saved whole, by the module's name and the tensors' names in it;
    ``biases``: by the names of the modules that they belong to; ``wanted``: PEFT's
    ``modules_to_save``; ``frozen``: weights of adapted modules that PEFT saved all the same.
    """

    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)

    def bias(self, adapted: Collection[str]) -> str:
        """PEFT's ``bias`` of a LoRA over these modules."""
        if not self.biases:
            return "none"
        return "lora_only" if set(self.biases) <= set(adapted) else "all"

    def tensors(self, adapted: Collection[str]) -> dict[str, torch.Tensor]:
        """By their names in the model, where an adapted module is one around its base layer."""
        found = {_join(n, part): t for n, own in self.modules.items() for part, t in own.items()}
        for name, bias in self.biases.items():
            found[_join(f"{name}.base_layer" if name in adapted else name, "bias")] = bias
        for name, weight in self.frozen.items():
            found[f"{name}.base_layer.weight"] = weight
        return found


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def saved_whole(module: nn.Module) -> nn.ModuleDict | None:
    """What PEFT trains in the place of this module, by the adapter's name."""
    # Looked up where it is kept: PEFT's wrapper passes questions on to what it wraps.
    saved = module.__dict__.get("_modules", {}).get("modules_to_save")
    return saved if isinstance(saved, nn.ModuleDict) else None


def _inside(module: nn.Module) -> tuple[str, ...]:
    """The children that stand under the name of the module itself."""
    kind = type(module)
    if is_adapted(module):
        return ("base_layer",)
    if saved_whole(module) is not None:
        return ("original_module",)
    if hasattr(kind, "get_base_model"):
        return ("base_model",)
    return ("model",) if hasattr(kind, "tuner_layer_cls") else WRAPPERS


def tree(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every place of the model and what stands there, by the names that the base model has.

    Under one name come an adapted layer and its base, PEFT's wrapper of a module that is saved
    whole and the module as it was, PEFT's model and the user's own.
    """
    yield name, module
    inside = _inside(module)
    for child, inner in module._modules.items():
        if inner is None or (is_adapted(module) and child.startswith("pera_")):
            continue
        if inner is saved_whole(module):
            continue
        yield from tree(inner, name if child in inside else _join(name, child))


def beside_in(model: nn.Module, adapted: Collection[str], adapter: str | None = None) -> Beside:
    """What ``model`` trains beside the adapters of the modules ``adapted``: what PEFT saves whole,
    biases that PEFT trains, and every other parameter that requires a gradient, in its module.

    Args:
        adapter: of PEFT; by default the active one.

    Raises:
        ValueError: no PEFT checkpoint can hold a part of it, which is named.
    """
    places = list(tree(model))
    entire: dict[str, nn.Module] = {}
    for name, module in places:
        saved = saved_whole(module)
        if saved is None:
            continue
        names = [adapter] if adapter is not None else list(module.active_adapters)  # type: ignore[arg-type]
        entire.update((name, saved[own]) for own in names if own in saved)
    told = _told_biases(model, places, adapter)
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in places:
        if _within(name, entire):
            continue
        for part, parameter in module._parameters.items():
            if parameter is None or (is_adapted(module) and part.startswith("pera_")):
                continue
            by_config = "all" in told or ("pera_only" in told and name in adapted)
            if parameter.requires_grad or (part == "bias" and by_config):
                trained.setdefault(name, {})[part] = stored(module, part)
    biases = {name: own["bias"] for name, own in trained.items() if list(own) == ["bias"]}
    # Of those under one name the outermost.
    modules = dict(reversed(places))
    for name, own in trained.items():
        if name not in biases:
            _check_whole(name, own, adapted, modules[name])
            entire[name] = modules[name]
    wanted = [name for name in entire if not _within(name.rpartition(".")[0], entire)]
    # PEFT takes every module whose name ends so.
    taken = sorted(n for n in modules if n and any(n.endswith(end) for end in wanted))
    for name in taken:
        end = next(end for end in wanted if name.endswith(end))
        if isinstance(modules[name], CONTAINERS) or _within(name.rpartition(".")[0], taken):
            raise ValueError(_refused(end, f"PEFT would take {name} for it"))
    _check_hidden([*wanted, *taken], adapted)
    states = {}
    for name in taken:
        states[name] = _state(entire.get(name, modules[name]))
    kept = {n: whole(bias).detach() for n, bias in biases.items() if not _within(n, taken)}
    return Beside(states, kept, tuple(sorted(wanted)))


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state, whole and where it has values."""
    places = {
        f"{path}.{part}" if path else part: (inner, part)
        for path, inner in module.named_modules()
        for part in (*inner._parameters, *inner._buffers)
    }
    state = module.state_dict(keep_vars=True)
    return {
        base_name(key): whole(stored(*places[key]) if key in places else tensor).detach()
        for key, tensor in state.items()
    }


def beside_of(read: AdapterFile, wanted: Collection[str] = ()) -> Beside:
    """The same of a file, without the model.

    Args:
        wanted: PEFT's ``modules_to_save`` if PEFT saved the file: ends of the modules' names.

    Raises:
        ValueError: as :func:`beside_in`.
    """
    adapted = read.tensors
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read.parameters.items():
        name, _, part = key.rpartition(".")
        if name in adapted and part == "weight" and key in read.frozen:
            continue
        # A module that was saved whole holds others.
        parts = name.split(".")
        above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        outer = next((a for a in above if any(a.endswith(end) for end in wanted)), name)
        part = f"{name}.{part}".removeprefix(f"{outer}.") if name else part
        trained.setdefault(outer, {})[part] = tensor
    biases = {n: own["bias"] for n, own in trained.items() if list(own) == ["bias"]}
    whole = {n: own for n, own in trained.items() if n not in biases}
    for name, own in whole.items():
        _check_whole(name, own, adapted)
    _check_hidden(list(whole), adapted)
    weights = {name: f"{name}.weight" for name in adapted}
    frozen = {name: read.parameters[key] for name, key in weights.items() if key in read.frozen}
    return Beside(whole, biases, tuple(sorted(whole)), frozen)


def _told_biases(
    model: nn.Module, places: list[tuple[str, nn.Module]], adapter: str | None
) -> set[str]:
    """Which biases the configurations of PEFT's adapters say to train."""
    names = {adapter}
    if adapter is None:
        layers = [m for _, m in places if is_adapted(m) and not isinstance(m, PeraLinear)]
        names = {a for layer in layers for a in layer.active_adapters}  # type: ignore[union-attr]
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return set()
    return {getattr(configs.get(name), "bias", "none") for name in names}


def _refused(part: str, reason: str) -> str:
    return (
        f"{part} is trained beside the adapters, and no LoRA checkpoint can hold it: {reason}; "
        "freeze it if it was not trained (requires_grad_(False)), or merge and save the model"
    )


def _check_whole(
    name: str,
    trained: Collection[str],
    adapted: Collection[str],
    module: nn.Module | None = None,
) -> None:
    """Whether PEFT can save the module whole."""
    inside = [other for other in adapted if not name or _within(other, [name])]
    if name in adapted:
        reason = "its module has an adapter"
    elif inside:
        reason = f"its module holds {inside[0]}, which has an adapter"
    elif not name:
        reason = "it belongs to the model itself"
    elif isinstance(module, CONTAINERS):
        reason = f"a {type(module).__name__} cannot be saved whole"
    else:
        return
    raise ValueError(_refused(_join(name, next(iter(trained))), reason))


def _check_hidden(wanted: Collection[str], adapted: Collection[str]) -> None:
    """PEFT puts no adapter into what it takes for a part of a module that is saved whole."""
    for end in wanted:
        for name in adapted:
            if re.match(rf"(^|.*\.){end}($|\..*)", name):
                raise ValueError(_refused(end, f"PEFT would take {name} for a part of it"))
