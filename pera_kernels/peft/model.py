"""PEFT's model: it finds the modules to adapt and handles the named adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from pera_kernels.adapters.export import best_of_rank, expanded
from pera_kernels.adapters.shared_inputs import shared_inputs
from pera_kernels.adapters.ties import refuse_shared

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
        """As PEFT's; if it fails the model is left as it was."""
        layers = {m for m in model.modules() if isinstance(m, PeraLayer)}
        held = {m for m in layers if adapter_name in m.pera_A}
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            shared_inputs(model)
        except BaseException:
            for name, layer in list(model.named_modules()):
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
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"cannot adapt {current_key}: nn.MultiheadAttention reads its weight without "
                "calling it"
            )
        if peft_config.fan_in_fan_out != is_conv1d(target):
            peft_config.fan_in_fan_out = is_conv1d(target)
        layer = PeraLayer(target)
        layer.update_layer(adapter_name, r, alpha, peft_config)
        layer.train(target.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _layers(self) -> dict[str, PeraLayer]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, PeraLayer)}

    def _check_merge_allowed(self) -> None:
        """Refuse to change a weight that another module uses."""
        refuse_shared(
            self.model,
            {
                f"{name}.base_layer.weight": layer.base_layer.weight  # type: ignore[misc]
                for name, layer in self._layers().items()
                if isinstance(getattr(layer.base_layer, "weight", None), nn.Parameter)
            },
        )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge into the base weights, in every layer or in none.

        Raises:
            TypeError: a base is not a plain dense layer.
            ValueError: a weight is shared with another module, or (``safe_merge``) a result is not
                finite.
        """
        self._check_merge_allowed()
        before = {layer: list(layer.merged_adapters) for layer in self._layers().values()}
        try:
            for name, layer in self._layers().items():
                with _naming(name):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # Layers are replaced one by one: what can fail is tried before the first.
        if merge:
            self._check_merge_allowed()
            for name, layer in self._layers().items():
                with _naming(name):
                    own = [n for n in adapter_names or layer.active_adapters if n in layer.pera_A]
                    if own and safe_merge:
                        layer.merged_weight(own, safe=True)
                    elif own:
                        layer._dense_weight()
        else:
            for layer in self._layers().values():
                if layer.merged:
                    layer.unmerge()
        model = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=False,
            adapter_names=adapter_names,
        )
        shared_inputs(model, ())
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within this context every sample has the adapter that ``adapter_names`` says."""
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
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                raise ValueError("adapter_names with beams is not supported for encoder-decoders")
            names = [name for name in names for _ in range(beams)]
        handles = [
            layer.register_forward_pre_hook(partial(_with_names, list(names)), with_kwargs=True)
            for layer in self._layers().values()
        ]
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
            ValueError: an unknown adapter or combination, or lists of different lengths; nothing is
                added.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"adapters and weights must have one length >= 1; got {len(adapters)} and "
                f"{len(weights)}"
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"there is no adapter {', '.join(map(repr, unknown))}")
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
        factors = {}
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
                layer.pera_A[adapter_name].copy_(factors[name][0])
                layer.pera_B[adapter_name].copy_(factors[name][1])
                _freeze(layer, adapter_name)


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


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the module's name before an error's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
