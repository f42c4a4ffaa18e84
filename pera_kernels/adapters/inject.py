"""Put adapters into a model, and find them and their parameters again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from .. import checks
from ..checks import check_model, naming, some
from ..linear import features
from ..module import AdapterOptions, PeraLinear, PeraOverModule, is_adapted
from ..sharded import fsdp_groups, is_dtensor
from ..terms import Terms
from . import shared_inputs as sharing
from .engines import is_in_deepspeed, take_over
from .shared_inputs import SHARED_INPUTS
from .ties import ties
from .uncalled import refuse_read_weights, watch

ModelT = TypeVar("ModelT", bound=nn.Module)

__all__ = ["adapted_modules", "adapter_parameters", "inject"]


# Heads that are new where a pretrained model gets one: frozen, they would stay random.
HEADS = ("classifier", "score", "qa_outputs")
# What compilation and checkpointed activations put around modules; no part of a module's name.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# They synchronize the parameters that they found when they were made.
PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def base_name(name: str) -> str:
    """A module's or a parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matches(name: str, targets: Sequence[str] | re.Pattern[str]) -> bool:
    """Whether a module's path is what one of the targets names."""
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _check_targets(target_modules: Sequence[str] | str) -> Sequence[str] | re.Pattern[str]:
    if isinstance(target_modules, str):
        try:
            return re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                "target_modules must be a regular expression or a list of names; "
                f"{target_modules!r} does not compile: {error}"
            ) from error
    names = list(target_modules) if isinstance(target_modules, (list, tuple, set)) else None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            "target_modules must be a non-empty list of module names or one regular expression; "
            f"got {target_modules!r}"
        )
    return names


def _targets(
    model: nn.Module, wanted: Sequence[str] | re.Pattern[str]
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, parent, layer) of every place to change; nothing is changed yet.

    A layer that stands under several names is one layer: it is found in all of its places.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, layer in modules.items():
        if not name or not matches(name, wanted):
            continue
        if is_adapted(layer):
            kind = type(layer).__name__
            raise ValueError(f"{name} is a {kind} already; each layer takes one adapter")
        if features(layer) is None:
            if isinstance(wanted, re.Pattern) or ".parametrizations." in name:
                continue
            raise ValueError(
                f"{name} is a {type(layer).__name__}, not a linear layer: an adapter needs "
                "in_features and out_features"
            )
        found.append(layer)
    places = named_places(model, found)
    names = [name for name, _, _ in places]
    if isinstance(wanted, re.Pattern):
        missed = [] if places else [wanted.pattern]
    else:
        missed = [t for t in wanted if not any(matches(name, [t]) for name in names)]
    if missed:
        raise ValueError(_no_such_target(model, missed))
    return places


def _no_such_target(model: nn.Module, unmatched: Sequence[str]) -> str:
    told = ", ".join(map(repr, unmatched))
    linear = [n for n, m in model.named_modules() if n and features(m) is not None]
    fused = [n for n, _ in model.named_parameters() if matches(n, unmatched)]
    told_fused = f" Experts in one tensor take no adapter: {some(fused)}." if fused else ""
    return (
        f"target_modules: {told} matches no linear layer of {type(model).__name__}, which has "
        f"{some(linear) or 'none'}.{told_fused}"
    )


def inject(
    model: ModelT,
    target_modules: Sequence[str] | str,
    r: int = 16,
    *,
    alpha: float | None = None,
    terms: Terms = "full",
    dropout: float = 0.0,
    init: str = "kaiming",
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
    plan: str = "auto",
    keep: str = "u",
    shared_inputs: Sequence[Sequence[str]] = SHARED_INPUTS,
    modules_to_save: Sequence[str] | None = None,
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`PeraLinear` in place and freeze everything
    else.

    Args:
        target_modules: a list of names, each matching whole trailing segments of a module's path
            (``"v_proj"`` matches ``layers.0.attn.v_proj``, not ``my_v_proj``), or a string: a
            regular expression that must match a whole path; it passes over modules that are not
            linear. A layer that stands under several names gets one adapter for all of them.
        r, alpha, terms, dropout, init, adapter_dtype, backend, plan, keep: see
            :class:`PeraLinear`.
        shared_inputs: names of children of one module that it calls on the same tensor, by groups;
            they are computed together (see :func:`pera_kernels.shared_inputs`); ``()`` for none.
        modules_to_save: names, matched as targets are, of further modules that train as a whole and
            that :func:`pera_kernels.save_adapter` saves: a new classification head, for example.
            None means none, with a warning where a module is named as such heads are.

    Returns:
        The same model. What trained before a further ``inject`` goes on training.

    Raises:
        TypeError, ValueError: an option that does not fit, a name that matches nothing, or a match
            that cannot be adapted (a layer whose weight is read and that is never called, one with
            lazy parameters); the model is unchanged.
    """
    check_model(model)
    wanted = _check_targets(target_modules)
    groups = sharing.check_shared_inputs(shared_inputs)
    options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan, keep)
    found = _targets(model, wanted)
    trained = _modules_to_save(model, modules_to_save, {layer for _, _, layer in found})
    adopt(model, found, dict.fromkeys((layer for _, _, layer in found), options), groups, trained)
    return model


def _modules_to_save(model: nn.Module, names: object, targets: set[nn.Module]) -> list[nn.Module]:
    if names is None:
        heads = {n: m for n, m in model.named_modules() if matches(n, HEADS)}
        frozen = [
            name
            for name, m in heads.items()
            if next(m.parameters(), None) is not None and targets.isdisjoint(m.modules())
        ]
        if frozen and not adapted_modules(model):
            ends = sorted({name.rpartition(".")[2] for name in frozen})
            warnings.warn(
                f"inject freezes {', '.join(frozen)}: modules_to_save={ends!r} trains what is new "
                "in this model, and modules_to_save=() says that nothing is",
                stacklevel=3,
            )
        return []
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"modules_to_save must be a list of module names or None; got {names!r}")
    modules = {n: m for n, m in model.named_modules() if n}
    unmatched = [n for n in names if not any(matches(own, [n]) for own in modules)]
    if unmatched:
        raise ValueError(
            f"modules_to_save: {', '.join(map(repr, unmatched))} matches no module of "
            f"{type(model).__name__}"
        )
    return [m for n, m in modules.items() if matches(n, list(names))]


def named_places(
    model: nn.Module, layers: Iterable[nn.Module]
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, parent, layer) of every place in ``model`` where one of ``layers`` stands."""
    wanted = {id(layer) for layer in layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        (name, modules[name.rpartition(".")[0]], layer)
        for name, layer in modules.items()
        if name and id(layer) in wanted
    ]


def adopt(
    model: nn.Module,
    places: Sequence[tuple[str, nn.Module, nn.Module]],
    options: Mapping[nn.Module, AdapterOptions],
    groups: Sequence[tuple[str, ...]] = SHARED_INPUTS,
    trained: Iterable[nn.Module] = (),
) -> dict[nn.Module, PeraLinear]:
    """Put adapters with these options, which are by layer, in these places, freeze everything else,
    and let the modules ``trained`` train. If anything fails, nothing is changed.

    Returns:
        The new layers by those whose place they took.
    """
    refuse_parallel(model)
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"model must have parameters with a shape; {some(lazy)} get theirs in its "
            "first call: call the model once before"
        )
    for name, _, layer in places:
        if hasattr(layer, "_hf_hook") and any(p.is_meta for p in layer.parameters()):
            raise ValueError(
                f"{name} is offloaded by accelerate, and no new weight can be put in its place: "
                "inject before the model is offloaded"
            )
    refuse_read_weights(model, (name for name, _, _ in places))
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    # A layer that stands under two names keeps doing so: one adapter for both.
    adapted: dict[nn.Module, PeraLinear] = {}
    # What trains beside the adapters of an earlier call was made to.
    first, done = not adapted_modules(model), []
    try:
        for layer, own in options.items():
            adapted[layer] = _adapting(layer, own)
        if first:
            model.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        for name, parent, layer in places:
            setattr(parent, name.rpartition(".")[2], adapted[layer])
            done.append((name, parent, layer))
        for parameter in (p for new in adapted.values() for p in own_parameters(new)):
            parameter.requires_grad_(True)
        _refuse_trained(model)
        _record_ties(model)
        sharing.shared_inputs(model, groups)
        watch(model, adapted.values())
    except BaseException:
        for name, parent, layer in done:
            setattr(parent, name.rpartition(".")[2], layer)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    return adapted


def _adapting(layer: nn.Module, options: AdapterOptions) -> PeraLinear:
    if not is_dtensor(getattr(layer, "weight", None)):
        return PeraLinear.adapting(layer, options)
    # torch.distributed is no part of every build.
    from .. import tensor_parallel

    new = tensor_parallel.adapting(layer, options)
    take_over(layer, new)
    return new


def refuse_parallel(model: nn.Module) -> None:
    """Raise for a model that others synchronize: they would leave new parameters out."""
    if fsdp_groups(model.modules()):
        raise ValueError(
            "model is wrapped in fully_shard, or in a module that is, which would not synchronize "
            "new adapters: put them in before it is wrapped"
        )
    for module in model.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in PARALLEL]
        if is_in_deepspeed(module):
            kinds.append("DeepSpeedEngine")
        if kinds:
            raise ValueError(
                f"model is wrapped in {kinds[0]}, which would not synchronize new adapters: put "
                "them in before it is wrapped"
            )


def _refuse_trained(model: nn.Module) -> None:
    """Raise if the base of a plain adapted layer would train, through ``modules_to_save``."""
    for name, layer in adapted_modules(model).items():
        if not isinstance(layer, PeraOverModule):
            with naming(name):
                checks.check_frozen(layer.weight, layer.bias)


def _record_ties(model: nn.Module) -> None:
    """Tell layers who else holds their weight."""
    layers = {f"{name}.weight": layer for name, layer in adapted_modules(model).items()}
    plain = {n: layer for n, layer in layers.items() if not isinstance(layer, PeraOverModule)}
    found = ties(model, {name: layer.weight for name, layer in plain.items()})
    for name, layer in plain.items():
        layer.tied = tuple(found.get(name, ()))


def adapted_modules(model: nn.Module) -> dict[str, PeraLinear]:
    """The model's :class:`PeraLinear` layers by name."""
    check_model(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, PeraLinear)}


def require_adapters(model: nn.Module, to: str) -> dict[str, PeraLinear]:
    """:func:`adapted_modules` of a model that must have some, for what is to be done with them."""
    layers = adapted_modules(model)
    if not layers:
        of_peft = any(is_adapted(module) for module in model.modules())
        hint = (
            "they are PEFT's: use PEFT's methods and pera_kernels.peft"
            if of_peft
            else "call inject first"
        )
        raise ValueError(f"model has no adapter to {to}: {hint}; got {type(model).__name__}")
    return layers


def own_parameters(layer: PeraLinear) -> list[nn.Parameter]:
    """A, B and h of one layer."""
    own = (layer.pera_A, layer.pera_B, layer.pera_h)
    return [parameter for parameter in own if parameter is not None]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every adapter's A, B and h, each once."""
    seen = set()
    for layer in adapted_modules(model).values():
        for parameter in own_parameters(layer):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter
