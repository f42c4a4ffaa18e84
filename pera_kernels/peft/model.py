"""PEFT's model: it finds the modules to adapt and handles the named adapters."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from pera_kernels.adapters.export import best_of_rank, expanded
from pera_kernels.adapters.hooks import remove_all_hooks
from pera_kernels.adapters.inject import HEADS, refuse_parallel
from pera_kernels.adapters.optimizer import warn_of_idle_products
from pera_kernels.adapters.ranks import together
from pera_kernels.adapters.shared_inputs import shared_inputs
from pera_kernels.adapters.ties import refuse_shared, ties
from pera_kernels.adapters.uncalled import refuse_read_weights, watch
from pera_kernels.checks import naming, some
from pera_kernels.sharded import is_dtensor, is_partition, whole
from pera_kernels.terms import check_rank

from .config import PeraConfig
from .layer import BASE, PeraLayer, is_conv1d, unsupported

__all__ = ["PeraModel"]


class PeraModel(BaseTuner):
    """PERA adapters in a model; made by ``peft.get_peft_model`` from a :class:`PeraConfig`."""

    prefix = "pera_"
    tuner_layer_cls = PeraLayer
    # Those of LoRA: what is worth adapting is the same.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's; if it fails the model is left as it was.

        A module that stands under two names is adapted under both. Entries of the configuration
        that match nothing are named in a warning, but not where an adapter is loaded for inference.
        """
        refuse_parallel(model)
        layers = {m for m in model.modules() if isinstance(m, PeraLayer)}
        held = {m for m in layers if adapter_name in m.pera_A}
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        # PEFT writes the names that it found over some of these.
        config = copy.copy(self.peft_config[adapter_name])
        modules = [name for name, _ in model.named_modules()]
        parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            _adapt_other_names(model)
            new = {n: m for n, m in self._layers(model).items() if m not in layers}
            refuse_read_weights(model, new)
            shared_inputs(model)
            watch(model, new.values())
            found = ties(model, _weights(self._layers(model)))
            for name, layer in self._layers(model).items():
                layer.tied = tuple(found.get(f"{name}.base_layer.weight", ()))
        except BaseException:
            for name, layer in list(model.named_modules(remove_duplicate=False)):
                if not isinstance(layer, PeraLayer) or layer in held:
                    continue
                if layer not in layers:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.base_layer)
                elif adapter_name in layer.pera_A:
                    BaseTunerLayer.delete_adapter(layer, adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        if config.target_modules is None:
            config.target_modules = self.peft_config[adapter_name].target_modules
        if not config.inference_mode and kwargs.get("state_dict") is None:
            _warn_of_misses(config, modules, parameters)

    @torch.inference_mode(False)
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's, which makes new parameters: in inference mode they could never train."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeraConfig,
        adapter_name: str,
        state_dict: Mapping[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, for ``save_pretrained``: it warns where h trained to next to nothing.

        What is sharded is gathered: ``save_pretrained`` is then a call for every process that holds
        a part, of which one writes (``is_main_process``).

        Raises:
            ValueError: the state dict has not the values of what ZeRO-3 partitioned.
        """
        found: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        empty = [
            name
            for name, p in model.named_parameters()
            if is_partition(p) and (p.requires_grad or name in found)
            if name in state_dict and not state_dict[name].numel()
        ]
        if empty:
            raise ValueError(
                f"ZeRO-3 partitioned {some(empty)}, whose values a state dict has not: give "
                "save_pretrained one that has, state_dict=accelerator.get_state_dict(engine)"
            )
        if any(map(is_dtensor, found.values())):
            with together(model, "save_pretrained"):
                found = {name: whole(tensor).cpu() for name, tensor in found.items()}
        h = f".pera_h.{adapter_name}"
        if any(p.requires_grad for name, p in model.named_parameters() if name.endswith(h)):
            parts = PeraLayer.adapter_layer_names
            modules = [key.removesuffix(h) for key in found if key.endswith(h)]
            keys = [[f"{module}.{part}.{adapter_name}" for part in parts] for module in modules]
            # The state dict may be a caller's own, and PEFT does not judge such.
            if all(_is_whole(*map(found.get, own)) for own in keys):
                adapters = ([found[key] for key in own] for own in keys)
                warn_of_idle_products((A, B, h, config.terms) for A, B, h in adapters)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, which drops what it has no place for: here with a warning."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        parts = PeraLayer.adapter_layer_names
        lost = {
            key.rpartition(".")[0]
            for key in state_dict
            if key in remapped and key.rpartition(".")[2] in parts
        }
        if lost:
            warnings.warn(
                f"{len(lost)} modules with PERA adapters in the file are not in this model, and "
                f"their adapters are not loaded: {some(sorted(lost))}",
                stacklevel=2,
            )
        # PEFT knows a layer by its first name, and misses what it loads under the others.
        first = {layer: name for name, layer in model.named_modules()}
        for name, layer in model.named_modules(remove_duplicate=False):
            for part in parts if isinstance(layer, PeraLayer) else ():
                key = f"{first[layer]}.{part}.{adapter_name}"
                if key in remapped:
                    remapped[f"{name}.{part}.{adapter_name}"] = remapped[key]
        return remapped  # type: ignore[no-any-return]

    def _create_and_replace(
        self,
        peft_config: PeraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(
                f"{current_key}.{parameter_name}: PERA adapts modules, not parameters "
                "(target_parameters)"
            )
        r = _by_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = _by_pattern(peft_config.alpha_pattern, current_key, peft_config.pera_alpha)
        if isinstance(target, PeraLayer):
            target.update_layer(adapter_name, r, alpha, peft_config)
            if adapter_name not in self.active_adapters:
                _freeze(target, adapter_name)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"{current_key} holds an adapter of another method ({type(target).__name__})"
            )
        reason = unsupported(target)
        if reason is not None:
            raise ValueError(f"cannot adapt {current_key}, a {type(target).__name__}: {reason}")
        if peft_config.fan_in_fan_out != is_conv1d(target):
            peft_config.fan_in_fan_out = is_conv1d(target)
        layer = PeraLayer(target)
        layer.train(target.training)
        # It moves what is there to the base's device, which has no values where it is offloaded.
        self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, r, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def _layers(self, model: nn.Module | None = None) -> dict[str, PeraLayer]:
        named = (model or self.model).named_modules()
        return {name: module for name, module in named if isinstance(module, PeraLayer)}

    def _check_known(self, adapter_names: Sequence[str]) -> None:
        """Refuse names of adapters that are not in the model."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names; got {adapter_names!r}")
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"there is no adapter {', '.join(map(repr, unknown))}; the model has "
                f"{', '.join(map(repr, self.peft_config)) or 'none'}"
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, which takes unknown names for adapters that no layer has.

        Raises:
            ValueError: there is no adapter of this name; nothing is changed.
        """
        self._check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _check_merge_allowed(self) -> None:
        """Refuse to change a weight that another module uses."""
        refuse_shared(self.model, _weights(self._layers()))

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge into the base weights, in every layer or in none.

        Raises:
            TypeError: a base is not a plain dense layer.
            ValueError: there is no adapter of one of these names, a weight is shared with another
                module, or (``safe_merge``) a result is not finite.
        """
        with together(self.model, "merge_adapter"):
            self._merge_adapter(adapter_names, safe_merge)

    def _merge_adapter(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_known(adapter_names or [])
        self._check_merge_allowed()
        before = {layer: list(layer.merged_adapters) for layer in self._layers().values()}
        try:
            for name, layer in self._layers().items():
                with naming(name), onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    with onload_layer(layer):
                        layer.unmerge()
                        if names:
                            layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with together(self.model, "unload"):
            return self._unload(*args, **kwargs)

    def _unload(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # Layers are replaced one by one: what can fail is tried before the first.
        if merge:
            self._check_known(adapter_names or [])
            self._check_merge_allowed()
            for name, layer in self._layers().items():
                with naming(name), onload_layer(layer):
                    own = [n for n in adapter_names or layer.active_adapters if n in layer.pera_A]
                    if own and safe_merge:
                        layer.merged_weight(own, safe=True)
                    elif own:
                        layer._dense_weight()
        else:
            for layer in self._layers().values():
                if layer.merged:
                    with onload_layer(layer):
                        layer.unmerge()
        model = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=False,
            adapter_names=adapter_names,
        )
        # PEFT takes every layer out once: what stands under a second name is left.
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if isinstance(layer, PeraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
        remove_all_hooks(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within this context every sample has the adapter that ``adapter_names`` says, and the
        whole modules that were saved with it.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference; the model is in training mode")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(map(repr, unknown))}; the model has "
                f"{', '.join(map(repr, self.peft_config))} and {BASE!r}"
            )
        for name, config in self.peft_config.items():
            if config.bias != "none" and set(names) != {name}:
                raise ValueError(
                    f"adapter {name!r} has trained biases (bias={config.bias!r}), which are in the "
                    "base and the same for every sample: adapter_names must name it for all of "
                    f"them; got {', '.join(map(repr, dict.fromkeys(names)))}"
                )
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                raise ValueError("adapter_names with beams is not supported for encoder-decoders")
            names = [name for name in names for _ in range(beams)]
        handles = []
        for module in self.modules():
            own = list(names)
            if isinstance(module, AuxiliaryTrainingWrapper):
                # An adapter that has no copy of this module uses the original.
                held = module._get_available_adapters()
                own = [name if name in held else BASE for name in names]
            elif not isinstance(module, PeraLayer):
                continue
            hook = partial(_with_names, own)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """A new adapter whose ΔW is the weighted sum of those of others.

        The map from A and B to ΔW is not linear, so that parameters cannot be averaged: the
        expanded factors are put side by side, which is exact, as an adapter with ``terms="linear"``
        of the sum of their expanded ranks.

        Args:
            combination_type: ``"cat"``, or ``"svd"`` for the best approximation of ``svd_rank``.

        Raises:
            TypeError, ValueError: an unknown adapter or combination, lists of different lengths,
                weights or (``"svd"``) parameters that are not finite, or adapters with whole
                modules (``modules_to_save``), which have no sum; nothing is added.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"adapters and weights must have one length >= 1; got {len(adapters)} and "
                f"{len(weights)}"
            )
        self._check_known(adapters)
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already")
        if combination_type not in ("cat", "svd"):
            raise ValueError(
                f"combination_type must be 'cat' or 'svd'; got {combination_type!r}: averaging "
                "the parameters of PERA adapters does not average their updates"
            )
        if (combination_type == "svd") != (svd_rank is not None):
            raise ValueError(
                f"svd_rank goes with combination_type='svd'; got {combination_type!r} and "
                f"{svd_rank!r}"
            )
        if svd_rank is not None:
            check_rank(svd_rank, "svd_rank")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite; got {list(weights)}")
        whole = [
            module
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
            and not module._get_available_adapters().isdisjoint(adapters)
        ]
        if whole:
            raise ValueError(
                "adapters must have no whole modules (modules_to_save), for these have no weighted "
                f"sum; got {', '.join(map(repr, adapters))}"
            )
        factors, dtypes = {}, {}
        for name, layer in self._layers().items():
            parts = [
                (weight, view)
                for own, weight in zip(adapters, weights, strict=True)
                if (view := layer.pera_view(own)) is not None
            ]
            if not parts:
                continue
            pairs = [(weight, *expanded(view)) for weight, view in parts]
            lora_A = torch.cat([A for _, A, _ in pairs])
            lora_B = torch.cat([weight * B for weight, _, B in pairs], 1)
            dtypes[name] = parts[0][1].A.dtype
            for _, view in parts:
                dtypes[name] = torch.promote_types(dtypes[name], view.A.dtype)
            if svd_rank is not None and not (lora_A.isfinite().all() and lora_B.isfinite().all()):
                raise ValueError(
                    f"{name}: combination_type='svd' needs finite parameters; those of "
                    f"{', '.join(map(repr, adapters))} have infinite or NaN ones"
                )
            if svd_rank is not None and svd_rank < lora_A.shape[0]:
                lora_A, lora_B, _ = best_of_rank(lora_A, lora_B, svd_rank)
            factors[name] = lora_A, lora_B
        ranks = {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()}
        config = copy.deepcopy(self.peft_config[adapters[0]])
        config.terms, config.pera_alpha, config.alpha_pattern = "linear", None, {}
        config.use_rslora, config.init_weights, config.pera_dropout = False, True, 0.0
        config.r = max(ranks.values())
        config.rank_pattern = {n: rank for n, rank in ranks.items() if rank != config.r}
        config.target_modules, config.exclude_modules = set(ranks), None
        config.layers_to_transform = config.layers_pattern = None
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, layer in self._layers().items():
            if name in factors:
                for own, factor in zip((layer.pera_A, layer.pera_B), factors[name], strict=True):
                    # In the dtype of those combined, which may be wider than that of the base.
                    device = own[adapter_name].device
                    own[adapter_name].data = factor.to(device, dtypes[name])
                _freeze(layer, adapter_name)


def _adapt_other_names(model: nn.Module) -> None:
    """Put each adapted layer in every place of its base, of which PEFT only sees the first."""
    layers = {m.base_layer: m for m in model.modules() if isinstance(m, PeraLayer)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        path, _, child = name.rpartition(".")
        if module in layers and not isinstance(parent := model.get_submodule(path), PeraLayer):
            setattr(parent, child, layers[module])


def _warn_of_misses(config: PeraConfig, modules: Sequence[str], parameters: set[str]) -> None:
    """Name the entries of lists that match none of these modules: they may be misspelt."""

    def matches(**changes: Any) -> bool:
        probe = copy.copy(config)
        probe.exclude_modules = probe.modules_to_save = None
        for option, value in changes.items():
            setattr(probe, option, value)
        return any(check_target_module_exists(probe, name) for name in modules)

    misses: dict[str, list[Any]] = {}
    if not isinstance(config.target_modules, str):
        targets = sorted(config.target_modules or ())
        misses["target_modules"] = [t for t in targets if not matches(target_modules={t})]
    indices = config.layers_to_transform
    if isinstance(indices, list):
        misses["layers_to_transform"] = [i for i in indices if not matches(layers_to_transform=[i])]
    if not isinstance(config.exclude_modules, str):
        anywhere = {"layers_to_transform": None}
        excluded = sorted(config.exclude_modules or ())
        missed = [e for e in excluded if not matches(target_modules={e}, **anywhere)]
        # PEFT itself says so if it is all of them.
        misses["exclude_modules"] = missed if len(missed) < len(excluded) else []
    misses["modules_to_save"] = [
        entry
        for entry in config.modules_to_save or ()
        if entry not in HEADS and not any(name.endswith(entry) for name in modules)
    ]
    found = "; ".join(f"{option}: {', '.join(map(repr, m))}" for option, m in misses.items() if m)
    if not found:
        return
    fused = [t for t in misses.get("target_modules", ()) if t.rpartition(".")[2] in parameters]
    reason = (
        f" ({', '.join(map(repr, fused))}: a parameter, as experts in one tensor are, and PERA "
        "adapts linear modules only)"
        if fused
        else ""
    )
    warnings.warn(f"PeraConfig: nothing in the model matches {found}{reason}", stacklevel=3)


def _weights(layers: dict[str, PeraLayer]) -> dict[str, nn.Parameter]:
    """The parameters that are the weights of bases, by name."""
    found = {n: getattr(layer.base_layer, "weight", None) for n, layer in layers.items()}
    return {f"{n}.base_layer.weight": w for n, w in found.items() if isinstance(w, nn.Parameter)}


def _freeze(layer: PeraLayer, adapter_name: str) -> None:
    for own in (layer.pera_A, layer.pera_B, layer.pera_h):
        if adapter_name in own:
            own[adapter_name].requires_grad_(False)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(patterns.keys(), name), default) if patterns else default


def _with_names(
    names: list[str], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _is_whole(*parts: torch.Tensor | None) -> bool:
    """Whether A, B and h are all there: not sharded, packed, in two dtypes, or on no device."""
    dims = [p.dim() for p in parts if type(p) is torch.Tensor and not p.is_meta]
    dtypes = {p.dtype for p in parts if p is not None}
    return dims == [2, 2, 1] and len(dtypes) == 1 and dtypes.pop().is_floating_point
