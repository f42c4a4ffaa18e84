"""What trains beside the adapters, a head for example: from a model to a file, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..memory import overlap, span_of
from ..sharded import shape_of, stored, whole, write
from .inject import adapted_modules, base_name, own_parameters
from .ties import refuse_shared

__all__ = ["Found", "Places", "find", "plain_name"]


def plain_name(name: str, adapted: Collection[str]) -> str:
    """The name of a parameter in a model without wrappers and without the adapters of the modules
    ``adapted``.
    """
    name = base_name(name)
    module, inside, rest = name.rpartition(".base_layer.")
    return f"{module}.{rest}" if inside and module in adapted else name


@dataclass(frozen=True)
class Found:
    """``tensors`` by name, those that train and those that belong to them: a module of which more
    than the bias trains is kept whole, with its buffers. ``modules`` are those that PEFT can save
    whole.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def find(model: nn.Module) -> Found:
    """What trains in ``model`` beside the adapters; a tied parameter under all of its names."""
    layers = adapted_modules(model)
    adapters = {id(p) for layer in layers.values() for p in own_parameters(layer)}
    adapted = {m for layer in layers.values() for m in layer.modules()}
    names = {base_name(name): layer for name, layer in layers.items()}
    found, places = Found(), list(model.named_modules(remove_duplicate=False))
    for path, module in places:
        own = {n: p for n, p in module._parameters.items() if p is not None}
        trains = {n for n, p in own.items() if p.requires_grad and id(p) not in adapters}
        if not trains:
            continue
        kept = [n for n in own if n in trains]
        if module not in adapted and trains != {"bias"}:
            left_out = module._non_persistent_buffers_set
            buffers = [n for n, b in module._buffers.items() if b is not None]
            kept = [*own, *(n for n in buffers if n not in left_out)]
        for part in kept:
            name = plain_name(f"{path}.{part}" if path else part, names)
            found.tensors[name] = stored(module, part)
            if part in trains:
                found.trained.append(name)
        if _peft_can_save(base_name(path), module, kept, [base_name(n) for n, _ in places], names):
            found.modules.append(base_name(path))
    return found


def _peft_can_save(
    name: str,
    module: nn.Module,
    kept: Collection[str],
    modules: list[str],
    adapted: Collection[str],
) -> bool:
    """Whether PEFT finds this module alone by its name, and nothing in it that is not kept."""
    inside = any(other == name or other.startswith(f"{name}.") for other in adapted)
    alone = sum(other.endswith(name) for other in modules) == 1
    return bool(name) and alone and not inside and set(module.state_dict()) <= set(kept)


class Places:
    """Where the other parameters of a file go in a model."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        frozen: Collection[str],
        of_peft: bool,
    ) -> None:
        layers = adapted_modules(model)
        names = {base_name(name) for name in layers}
        # A module that was saved whole has buffers too.
        places = {
            plain_name(f"{path}.{part}" if path else part, names): (module, part)
            for path, module in model.named_modules(remove_duplicate=False)
            for part in (*module._parameters, *module._buffers)
            if getattr(module, part) is not None
        }
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.pairs: list[tuple[tuple[nn.Module, str], torch.Tensor]] = []
        self.trained: list[nn.Parameter] = []
        changed = {}
        for name, tensor in parameters.items():
            if name not in places:
                self.unexpected.append(name)
                continue
            module, part = places[name]
            there, shape = getattr(module, part), shape_of(getattr(module, part))
            if shape != tensor.shape:
                self.misshapen.append(f"{name} ({tuple(tensor.shape)} for {shape})")
                continue
            self.pairs.append(((module, part), tensor))
            if there.is_meta or not torch.equal(whole(there).to("cpu", tensor.dtype), tensor):
                changed[name] = there
            if isinstance(there, nn.Parameter) and name not in frozen:
                self.trained.append(there)
        if of_peft:
            # PEFT trains a copy: what else uses the weight goes on with the old one.
            refuse_shared(model, changed)
        self._refuse_different(parameters)
        mine = {id(p) for layer in layers.values() for p in own_parameters(layer)}
        self.missing = [
            plain_name(name, names)
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in mine and plain_name(name, names) not in parameters
        ]

    def _refuse_different(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Raise if tensors that differ would be written to one memory."""
        spans = [span_of(getattr(module, part)) for (module, part), _ in self.pairs]
        for number, (_, tensor) in enumerate(self.pairs):
            for other, (_, others) in enumerate(self.pairs[:number]):
                if overlap(spans[number], spans[other]) and not torch.equal(tensor, others):
                    names = [n for n, t in parameters.items() if t is tensor or t is others]
                    raise ValueError(
                        f"{' and '.join(names)} differ in the file and are one tensor in this "
                        "model: untie them first"
                    )

    def write(self) -> None:
        """Into the model, where what trained trains."""
        for (module, part), tensor in self.pairs:
            write(module, part, tensor)
        for parameter in self.trained:
            parameter.requires_grad_(True)
