"""Merge, unmerge and unload every adapter of a model, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from ..checks import naming, some
from ..module import PeraLinear, PeraOverModule
from .engines import forget_adapters, is_fsdp, is_held, take_over
from .hooks import remove_all_hooks
from .inject import named_places, require_adapters
from .ranks import together
from .ties import refuse_shared

__all__ = ["merge", "unload", "unmerge"]

ModelT = TypeVar("ModelT", bound=nn.Module)
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def _mergeable(model: nn.Module) -> dict[str, PeraLinear]:
    layers = require_adapters(model, "merge")
    called = [name for name, layer in layers.items() if isinstance(layer, PeraOverModule)]
    if called:
        kinds = {type(layers[name].base_layer).__name__ for name in called}
        raise TypeError(
            f"cannot merge into {', '.join(called)}: their bases ({', '.join(sorted(kinds))}) are "
            "not plain nn.Linear; put dequantized nn.Linear layers there first, or unload with "
            "merge=False"
        )
    refuse_shared(
        model,
        {f"{name}.weight" if name else "weight": layer.weight for name, layer in layers.items()},
    )
    return layers


def merge(
    model: ModelT,
    *,
    safe: bool = True,
    keep_base: bool = True,
    progress: Progress = iter,
) -> ModelT:
    """Merge every adapter of ``model`` into its base weight, in place; see
    :meth:`PeraLinear.merge`.

    Layers that are merged already stay so. ``progress`` wraps what is iterated over, as ``tqdm``
    does. Without ``keep_base`` a merge that runs out of memory half-way is undone up to rounding.
    Of a sharded model each process merges its part: a call for all that hold one.

    Raises:
        TypeError: a base is not a plain dense linear layer (a quantized one, for example).
        ValueError: the model has no adapter, a merged weight would not be finite, or a weight is
            shared with another module. In every case the model is unchanged.
        TimeoutError: another process that holds a part did not call it.
    """
    with together(model, "merge"):
        _merge(model, safe, keep_base, progress)
    return model


def _merge(model: nn.Module, safe: bool, keep_base: bool, progress: Progress) -> None:
    waiting = {n: layer for n, layer in _mergeable(model).items() if not layer.merged}
    if not keep_base and safe:
        # Nothing to go back to later: every sum is looked at before the first is written.
        for name, layer in waiting.items():
            with naming(name):
                layer.merged_weight(safe=True)
    done = []
    try:
        for name, layer in progress(list(waiting.items())):
            with naming(name):
                layer.merge(safe=safe, keep_base=keep_base)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: ModelT) -> ModelT:
    """Unmerge every adapter of ``model``, in place; see :meth:`PeraLinear.unmerge`.

    Raises:
        ValueError: the model has no adapter.
    """
    with together(model, "unmerge"):
        _unmerge(model)
    return model


def _unmerge(model: nn.Module) -> None:
    layers = require_adapters(model, "unmerge")
    # What can fail comes before the first change.
    for name, layer in layers.items():
        with naming(name):
            layer.check_unmergeable()
    done: list[tuple[PeraLinear, bool]] = []
    try:
        for layer in layers.values():
            if layer.merged:
                kept = layer.merged_base is not None
                layer.unmerge()
                done.append((layer, kept))
    except BaseException:
        for layer, kept in done:
            layer.merge(safe=False, keep_base=kept)
        raise


def _plain(layer: PeraLinear) -> nn.Module:
    """The layer that was adapted, or one like it around the same parameters."""
    if isinstance(layer, PeraOverModule):
        return layer.base_layer
    layer.check_plain_weight()
    linear = nn.Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
    )
    weight = layer.weight
    linear.weight = (  # A buffer, where a parametrization was removed.
        weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    )
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)


def unload(model: ModelT, *, merge: bool = True, progress: Progress = iter) -> ModelT:
    """Take every adapter out of ``model``, in place: plain ``nn.Linear`` layers (or the modules
    that were adapted) on the same parameters, which stay frozen.

    Args:
        merge: leave the adapters' updates in the weights; else the model is what it was before.
        progress: as in :func:`merge`.

    Raises:
        TypeError, ValueError, TimeoutError: as :func:`merge`; or FSDP2 wraps a layer by itself. The
            model is unchanged.
    """
    layers = require_adapters(model, "unload")
    if isinstance(model, PeraLinear):
        raise ValueError("model is itself a PeraLinear, which cannot be replaced in place")
    wrapped = [name for name, layer in layers.items() if is_fsdp(layer)]
    if wrapped:
        raise ValueError(
            f"fully_shard wraps {some(wrapped)} by itself, and its module cannot be replaced: "
            "merge and save the state dict, or wrap the module around it"
        )
    with together(model, "unload"):
        # Made first: what can fail comes before the first change.
        plain = {layer: _plain(layer) for layer in layers.values()}
        if merge:
            _merge(model, safe=True, keep_base=False, progress=progress)
        else:
            _unmerge(model)
        for name, parent, layer in named_places(model, layers.values()):
            setattr(parent, name.rpartition(".")[2], plain[layer])  # type: ignore[index]
        for layer, linear in plain.items():
            if is_held(layer) and not isinstance(layer, PeraOverModule):
                take_over(layer, linear)
        forget_adapters(model, plain)
        remove_all_hooks(model)
    return model
