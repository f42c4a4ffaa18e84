"""PEFT's layer around a linear base: it holds parameters, the formulas are in ``functional``."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from pera_kernels import functional
from pera_kernels.adapters.export import AdapterView
from pera_kernels.checks import FLOATING
from pera_kernels.linear import features, is_plain_linear, unobserved
from pera_kernels.memory import Tie, refuse_tied
from pera_kernels.module import PeraLinear, Sharing
from pera_kernels.operands import Base, Factors, Options
from pera_kernels.sharded import (
    factors_of_part,
    here,
    is_dtensor,
    is_offloaded,
    is_partition,
    kept,
    like,
    offloading,
    put_back,
    reshard,
    whole,
)
from pera_kernels.switch import Switch
from pera_kernels.terms import Terms, coefficient_count

from .config import PeraConfig

__all__ = ["PeraLayer", "is_conv1d", "unsupported"]

BASE = "__base__"


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def unsupported(module: nn.Module) -> str | None:
    """Why a module takes no PERA adapter."""
    if isinstance(module, PeraLinear):
        return "it has an adapter of pera_kernels.inject already: unload that first"
    if isinstance(module, nn.Embedding):
        return "an embedding looks rows up and has no input to project"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling them"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution is not a linear layer"
    if features(module) is None:
        return "it is not a linear layer: in_features and out_features are missing"
    weight = getattr(module, "weight", None)
    if is_dtensor(weight) or hasattr(module, "_hf_tp_plan"):
        return "its weight is sharded: use pera_kernels.inject, or adapt it before"
    if isinstance(weight, torch.Tensor) and weight.dim() > 2:
        return f"its weight has {weight.dim()} dimensions: experts are not supported"
    return None


def _fits(adapter: Factors, x: torch.Tensor) -> bool:
    """PERA takes factors in the dtype of x, or in float32 under half precision."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return adapter.A.dtype == x.dtype or (half and adapter.A.dtype == torch.float32)


def _base_apart(layer: PeraLayer, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """In the state dict of a merged layer, put W0 in the place of the merged weight: with the
    adapters beside it, the merged weight would count them twice.
    """
    key = prefix + "base_layer.weight"
    if layer._merged_base is None or key not in state_dict:
        return
    state_dict[key] = like(layer.get_base_layer().weight, layer._merged_base)
    if not _asked_by_peft():
        warnings.warn(
            "PERA adapters are merged, but this state dict holds the weights of the base and the "
            "adapters apart, as before merging; for merged weights take it from the model that "
            "merge_and_unload() returns",
            stacklevel=2,
        )


def _asked_by_peft() -> bool:
    """Whether PEFT asks for the state dict: it saves and loads no more than the adapters."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).startswith("peft."):
            return True
        frame = frame.f_back
    return False


class PeraLayer(nn.Module, BaseTunerLayer):
    """A linear base layer with any number of named PERA adapters.

    ``pera_A[name]`` ``(r, N)``, ``pera_B[name]`` ``(M, r)`` and ``pera_h[name]`` ``(L,)``, which
    ``terms="linear"`` has not.
    """

    # What BaseTunerLayer has.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[[list[str]], None]
    _get_base_layer_device_and_dtype: Callable[
        [nn.Module], tuple[torch.device | None, torch.dtype | None]
    ]
    _merged_base: torch.Tensor | None

    adapter_layer_names = ("pera_A", "pera_B", "pera_h")
    other_param_names = (
        *("r", "pera_alpha", "scaling", "own_scaling", "pera_dropout", "terms", "init", "keep"),
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(self.get_base_layer())  # type: ignore[misc]
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self.pera_A = nn.ParameterDict()
        self.pera_B = nn.ParameterDict()
        self.pera_h = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.pera_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        # Before scale_layer and the like.
        self.own_scaling: dict[str, float] = {}
        self.pera_dropout: dict[str, float] = {}
        self.terms: dict[str, Terms] = {}
        self.init: dict[str, str] = {}
        self.keep: dict[str, str] = {}
        self._disable_adapters = False
        self.was_called = False
        # A checkpoint that computes again finds what its forward had.
        self._switch = Switch()
        self.merged_adapters: list[str] = []
        self.shared_inputs: Sharing | None = None
        self.tied: tuple[Tie, ...] = ()
        # W0 while adapters are merged, so that unmerging is exact.
        self.register_buffer("_merged_base", None, persistent=False)
        self.register_state_dict_post_hook(_base_apart)

    # Parameters that are made in inference mode could never train.
    @torch.inference_mode(False)
    def update_layer(
        self, adapter_name: str, r: int, alpha: float | None, config: PeraConfig
    ) -> None:
        """Add an adapter, in the dtype and on the device of the base.

        It is drawn in float32 on the CPU: one seed gives one adapter, whatever the defaults are.
        """
        if adapter_name in self.pera_A:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already")
        self.r[adapter_name] = r
        self.pera_alpha[adapter_name] = float(r if alpha is None else alpha)
        divisor = math.sqrt(r) if config.use_rslora else r
        self.own_scaling[adapter_name] = self.pera_alpha[adapter_name] / divisor
        self.scaling[adapter_name] = self.own_scaling[adapter_name]
        self.pera_dropout[adapter_name] = float(config.pera_dropout)
        self.terms[adapter_name] = config.terms
        self.keep[adapter_name] = config.keep
        self.init[adapter_name] = "gaussian" if config.init_weights == "gaussian" else "kaiming"
        L = coefficient_count(r, config.terms)
        A, B, h = (
            torch.zeros(*shape, device="cpu", dtype=torch.float32)
            for shape in ((r, self.in_features), (self.out_features, r), (L,))
        )
        if self.init[adapter_name] == "gaussian":
            nn.init.normal_(A, std=1.0 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_weights is False:
            nn.init.normal_(B, std=0.1)
            nn.init.normal_(h, std=0.1)
        device, dtype = self._place()
        dtype = dtype if dtype in FLOATING else torch.float32
        self.pera_A[adapter_name] = nn.Parameter(A.to(device, dtype))
        self.pera_B[adapter_name] = nn.Parameter(B.to(device, dtype))
        if L:
            self.pera_h[adapter_name] = nn.Parameter(h.to(device, dtype))
        self.set_adapter(self.active_adapters)

    def _place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the base; of an offloaded one the device on which it computes."""
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        if (hook := offloading(base)) is not None:
            device = torch.device(hook.execution_device)
        return device, dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """What PEFT calls once it has loaded an adapter. Its dtype stays: PEFT's own method would
        round it to that of the base.
        """
        device = device or self._place()[0]
        for own in (self.pera_A, self.pera_B, self.pera_h):
            if adapter_name in own and device is not None and not own[adapter_name].is_meta:
                own[adapter_name].data = own[adapter_name].data.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, which must not be merged.

        Raises:
            ValueError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge before deleting it")
        super().delete_adapter(adapter_name)

    def _factors(self, name: str) -> Factors:
        h = self.pera_h[name] if name in self.pera_h else None
        return Factors(self.pera_A[name], self.pera_B[name], h)

    def _whole_factors(self, name: str) -> Factors:
        """The same, of an adapter that is sharded or offloaded."""
        found: list[torch.Tensor | None] = []
        for own in (self.pera_A, self.pera_B, self.pera_h):
            with here(own, [name]):
                found.append(whole(own[name]) if name in own else None)
        return Factors(*found)  # type: ignore[arg-type]

    def pera_view(self, adapter: str | None = None) -> AdapterView | None:
        """One adapter as ``export_lora`` takes it; the active one if none is named."""
        if adapter is None:
            own = [name for name in self.active_adapters if name in self.pera_A]
            if len(own) > 1:
                raise ValueError(
                    f"{len(own)} adapters are active ({', '.join(own)}): name one of them, or "
                    "combine them by add_weighted_adapter"
                )
            adapter = own[0] if own else None
        if adapter is None or adapter not in self.pera_A:
            return None
        A, B, h = self._whole_factors(adapter)
        return AdapterView(
            A, B, h, self.scaling[adapter], self.terms[adapter], self.merged, self.fan_in_fan_out
        )

    # What transformers and diffusers call to weaken an adapter.
    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self._rescale(adapter, scale * self.own_scaling[adapter])

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self._rescale(adapter, scale * self.scaling[adapter])

    def _rescale(self, adapter: str, scaling: float) -> None:
        if adapter in self.merged_adapters and scaling != self.scaling[adapter]:
            warnings.warn(
                f"PERA adapter {adapter!r} is merged: its new scale has no effect until it is "
                "unmerged",
                stacklevel=3,
            )
        self.scaling[adapter] = scaling

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                if scale is None:
                    self.scaling[adapter] = self.own_scaling[adapter]
                else:
                    self.scaling[adapter] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """s φ(B) diag(1, h) φ(A) as the base stores its weight; in at least float32. Of a sharded
        layer the whole: a call for every process that holds a part.
        """
        factors = self._whole_factors(adapter)
        return self._exact_delta(adapter, factors, factors.A)

    def _exact_delta(self, adapter: str, factors: Factors, like: torch.Tensor) -> torch.Tensor:
        delta = functional.exact_delta_weight(
            factors, scale=self.scaling[adapter], terms=self.terms[adapter], like=like
        )
        return delta.t() if self.fan_in_fan_out else delta

    def _dense_weight(self) -> torch.Tensor:
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        if type(weight) is torch.Tensor:
            raise TypeError(
                f"the weight of this {type(base).__name__} is computed anew from other tensors (by "
                "a parametrization, weight_norm or pruning), so that nothing can be merged into "
                "it: make it a plain parameter first"
            )
        # A class with a forward of its own may compute something else from its weight.
        known = is_conv1d(base) or type(base).forward is nn.Linear.forward
        if is_partition(weight):
            raise TypeError(
                "the weight is partitioned by ZeRO-3, where PEFT's layers do not merge: save the "
                "adapter and merge it into a model that is whole"
            )
        plain = type(weight) is nn.Parameter or is_dtensor(weight)
        if not (known and plain and weight.dtype in FLOATING):
            raise TypeError(
                f"merging needs a plain dense base; {type(base).__name__} with a weight of type "
                f"{type(weight).__name__} is none, for its class computes something else or its "
                "weight is quantized: dequantize the base model first"
            )
        return weight

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str], safe: bool) -> torch.Tensor:
        """W0 with the updates of these adapters, summed in at least float32 and rounded once.

        Raises:
            TypeError: the base has no dense weight.
            ValueError: with ``safe``, the result is not finite.
        """
        weight = self._dense_weight()
        base = weight if self._merged_base is None else like(weight, self._merged_base)
        total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for name in adapter_names:
            factors = factors_of_part(self._whole_factors(name), weight, self.fan_in_fan_out)
            total += like(weight, self._exact_delta(name, factors, total))
        merged = total.to(weight.dtype)
        if safe and whole((~torch.isfinite(merged)).sum()):
            raise ValueError(
                f"merging {', '.join(adapter_names)} would make weights infinite or NaN; the "
                "weight is unchanged"
            )
        return merged

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters, by default the active ones, into the base weight.

        Raises:
            TypeError, ValueError: see :meth:`merged_weight`; nothing is changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or () if name in self.pera_A]
        if not names:
            return
        reshard([self.get_base_layer()])
        weight = self._dense_weight()
        refuse_tied(weight, self.tied)
        merged = self.merged_weight([*self.merged_adapters, *names], safe_merge)
        if self._merged_base is None:
            # A copy that is made in inference mode could not be used outside of it.
            with torch.inference_mode(False):
                self._merged_base = kept(weight).detach().clone()
        weight.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._merged_base is not None
        reshard([self.get_base_layer()])
        put_back(self._dense_weight(), self._merged_base)
        self._merged_base = None
        self.merged_adapters.clear()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        by_sample = kwargs.pop("adapter_names", None)
        if not (torch.compiler.is_compiling() or self.was_called):
            self.was_called = True
        disabled = self._switch.is_off(self.disable_adapters)
        if disabled or by_sample is not None:
            if self.merged:
                if by_sample is not None:
                    raise ValueError("adapter_names needs unmerged adapters: unmerge first")
                if torch._C._current_graph_task_id() != -1:
                    raise RuntimeError(
                        "a backward computes again with adapters that are merged and disabled: "
                        "unmerging them now would change what the forward computed; run the "
                        "backward outside of disable_adapter()"
                    )
                self.unmerge()
            y = self.base_layer(x, *args, **kwargs)
            return y if disabled else self._mixed(x, y, by_sample)
        names = [name for name in self.active_adapters if name in self.pera_A]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self.shared_inputs is not None and not (args or kwargs):
            y = self.shared_inputs.take(self, x)
            if y is not None:
                return y
        base = None if args or kwargs else self._plain_base()
        if base is None:
            base = Base(None, None, self.base_layer(x, *args, **kwargs))
        for name in names:
            base = Base(None, None, self._add(name, x, base))
        assert base.out is not None
        return base.out

    def _plain_base(self) -> Base | None:
        """Weight ``(M, N)`` and bias of a base that does nothing else; None otherwise."""
        base = self.base_layer
        trains = any(p.requires_grad for p in base.parameters(recurse=False))
        if is_plain_linear(base) and not trains:
            return Base(base.weight, base.bias)  # type: ignore[arg-type]
        return None

    def _options(self, name: str) -> Options:
        dropout = self.pera_dropout[name] if self.training else 0.0
        scale, keep = self.scaling[name], self.keep[name]
        return Options(self.terms[name], scale, dropout, "auto", "auto", keep)

    def shared_call(self, x: torch.Tensor) -> tuple[Base, Factors, Options] | None:
        """As :meth:`pera_kernels.PeraLinear.shared_call`, for the one active adapter."""
        names = [name for name in self.active_adapters if name in self.pera_A]
        disabled = self._switch.is_off(self.disable_adapters)
        if disabled or self.merged or len(names) != 1 or not unobserved(self):
            return None
        base, adapter = self._plain_base(), self._factors(names[0])
        if base is None or not _fits(adapter, x):
            return None
        return base, adapter, self._options(names[0])

    def _add(self, name: str, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The base's output, made or given, and the update of one adapter."""
        adapter = self._factors(name)
        if adapter.A.is_meta and is_offloaded(self.pera_A):
            adapter = self._whole_factors(name)
        if base.out is not None and base.out.dtype != x.dtype:
            x = x.to(base.out.dtype)
        if not _fits(adapter, x):
            adapter = Factors(*(None if t is None else t.to(x.dtype) for t in adapter))  # type: ignore[arg-type]
        return functional.apply(x, base, adapter, self._options(name))

    def _mixed(
        self, x: torch.Tensor, y: torch.Tensor, adapter_names: Sequence[str]
    ) -> torch.Tensor:
        """Every sample of the batch under an adapter of its own, ``"__base__"`` for none."""
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                f"adapter_names must have one name for each of the {x.shape[0]} samples of the "
                f"batch; got {len(adapter_names)}"
            )
        parts = y.clone()
        for name in dict.fromkeys(adapter_names):
            if name == BASE or name not in self.pera_A:
                continue
            own = [i for i, other in enumerate(adapter_names) if other == name]
            index = torch.tensor(own, device=x.device)
            parts[index] = self._add(name, x[index], Base(None, None, y[index])).to(parts.dtype)
        return parts

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As usual; a merged layer is unmerged if its base or a merged adapter is loaded."""
        loaded = {prefix + "base_layer.weight"}
        for name in self.merged_adapters:
            loaded |= {f"{prefix}{part}.{name}" for part in self.adapter_layer_names}
        if self.merged and not loaded.isdisjoint(state_dict):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __repr__(self) -> str:
        return "pera." + super().__repr__()
