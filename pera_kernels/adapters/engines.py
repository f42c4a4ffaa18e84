"""What engines attach to a layer goes along when another takes its place: hooks of tensor
parallelism and of DeepSpeed, FSDP2's list of parameters, accelerate's offloading.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..module import PARTS, PeraLinear
from ..sharded import groups_of, is_dtensor, is_offloaded, is_partition

__all__ = [
    "forget_adapters",
    "is_deepspeed",
    "is_fsdp",
    "is_held",
    "is_in_deepspeed",
    "refuse_offloaded_elsewhere",
    "take_over",
]

HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
)


def is_held(layer: nn.Module) -> bool:
    """Whether an engine holds the layer's weight."""
    weight = getattr(layer, "weight", None)
    return is_dtensor(weight) or is_partition(weight) or hasattr(layer, "_hf_hook")


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Attach to ``new`` what an engine attached to ``old``."""
    for name in HOOKS:
        # Not copied: who registered a hook can still remove it.
        setattr(new, name, getattr(old, name))
    for name, value in vars(old).items():
        if name.startswith(("ds_", "pre_bwd", "post_bwd", "applied_pre_backward", "_external")):
            vars(new)[name] = value
    for function in (getattr(old, name, None) for name in ("pre_bwd_fn", "post_bwd_fn")):
        # DeepSpeed makes it for one layer.
        for cell in getattr(getattr(function, "setup_context", None), "__closure__", None) or ():
            if cell.cell_contents is old:
                cell.cell_contents = new
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    elif (style := _style(old)) is not None:
        style["self"].install_forward(new, style["mesh"])


def _style(layer: nn.Module) -> dict[str, Any] | None:
    """What transformers' tensor parallelism keeps in the forward that it gives to a layer."""
    forward = vars(layer).get("forward")
    if not inspect.isfunction(forward) or forward.__name__ != "tp_forward":
        return None
    return dict(inspect.getclosurevars(forward).nonlocals)


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` wraps this module itself."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_deepspeed(module: nn.Module) -> bool:
    """Whether it is DeepSpeed's engine around a model."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__)


def is_in_deepspeed(module: nn.Module) -> bool:
    """Whether DeepSpeed's engine attached something to a module that it wraps: ZeRO-3 to every
    module, ZeRO-1 and 2 to parameters that train.
    """
    own = module._parameters.values()
    return "ds_id" in vars(module) or any(getattr(p, "_hp_mapping", None) for p in own)


def forget_adapters(model: nn.Module, now: Mapping[PeraLinear, nn.Module]) -> None:
    """Let FSDP2 hold the weights of layers in those that took their place, and no adapters."""
    for module in filter(is_fsdp, model.modules()):
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        for group in groups_of(state):
            held = [p for p in group.fsdp_params if not _is_adapter(p._module_info, now)]
            group.fsdp_params[:] = held
            for parameter in held:
                info = parameter._module_info
                info.module = now.get(info.module, info.module)
                info.shared_modules = [now.get(m, m) for m in info.shared_modules]
        # As fully_shard leaves a module without parameters.
        left = [group for group in groups_of(state) if group.fsdp_params]
        if hasattr(state, "_fsdp_param_groups"):
            state._fsdp_param_groups[:] = left
        elif not left:
            state._fsdp_param_group = None


def refuse_offloaded_elsewhere(model: nn.Module) -> None:
    """Raise for adapted layers that accelerate offloads by a hook of another module."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, module in model.named_modules() if hooked else ():
        own = module.weight if isinstance(module, PeraLinear) else None
        if own is not None and own.is_meta and not _fetches(module):
            raise RuntimeError(
                f"{name} is offloaded by a hook of a module around it (preload_module_classes): "
                "offload the model without it"
            )


def _fetches(layer: nn.Module) -> bool:
    return any(map(is_offloaded, layer.modules()))


def _is_adapter(info: Any, layers: Mapping[PeraLinear, nn.Module]) -> bool:
    return info.module in layers and info.param_name in PARTS
