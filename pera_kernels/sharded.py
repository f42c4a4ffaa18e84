"""Tensors of which a process holds a part, or that lie elsewhere: DTensor's shards (FSDP2, tensor
parallelism), ZeRO-3's partitions, and what accelerate offloads.

To make a shard or a partition whole, or to write one, is for all processes that hold a part of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .checks import is_dtensor
from .operands import Factors

__all__ = [
    "factors_of_part",
    "fsdp_groups",
    "groups_of",
    "here",
    "in_memory",
    "is_dtensor",
    "is_offloaded",
    "is_partition",
    "kept",
    "like",
    "offloading",
    "part",
    "put_back",
    "refuse_active",
    "reshard",
    "shape_of",
    "stored",
    "whole",
    "write",
]


def is_partition(tensor: object) -> bool:
    """Whether it is a parameter of DeepSpeed's ZeRO-3, of which each process has a part."""
    return hasattr(tensor, "ds_id")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module elsewhere between its calls."""
    return offloading(module) is not None


def offloading(module: nn.Module) -> Any:
    """The hook of accelerate that does so, or None."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return None
    return next((h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)), None)


def stored(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of a module, where accelerate offloaded it the one that is kept."""
    tensor: torch.Tensor = getattr(module, name)
    hook = offloading(module) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name]  # type: ignore[no-any-return]


def _held(weights: Any, name: str) -> tuple[dict[str, torch.Tensor], str, Any]:
    """What accelerate holds in memory, a tensor's name in it, and the map over memory and files."""
    # One of its maps adds a prefix to the names of another.
    while hasattr(weights, "dataset"):
        name, weights = weights.prefix + name, weights.dataset
    return getattr(weights, "state_dict", weights), name, weights


def in_memory(module: nn.Module, name: str) -> torch.Tensor | None:
    """As :func:`stored`; None where it is in a file."""
    tensor: torch.Tensor = getattr(module, name)
    hook = offloading(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    held, name, _ = _held(hook.weights_map, name)
    return held.get(name)


def groups_of(state: Any) -> list[Any]:
    """The groups of parameters that one ``fully_shard`` made."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def fsdp_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """FSDP2's groups that hold parameters of these modules, whichever module it wraps."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping

    inside, found = set(modules), []
    for reference in list(_module_state_mapping.values()):
        state = reference()
        if type(state).__name__ == "FSDPState":
            for group in groups_of(state):
                if any(p._module_info.module in inside for p in group.fsdp_params):
                    found.append(group)
    return found


def reshard(modules: Iterable[nn.Module]) -> None:
    """Shard again what FSDP2 keeps whole of these modules, as the outermost one does after a
    forward: what is written to the whole would be lost.
    """
    for group in fsdp_groups(modules):
        group.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this is a part of, differentiable where it is a DTensor; the tensor itself
    where it is no part.
    """
    if is_dtensor(tensor):
        shard: Any = tensor
        device = shard.device_mesh.device_type
        # What FSDP2 offloads is gathered where the processes can talk.
        return (shard if shard.device.type == device else shard.to(device)).full_tensor()  # type: ignore[no-any-return]
    if not is_partition(tensor):
        return tensor
    if not _is_empty(tensor):
        return tensor.detach().clone()
    with _gathered([tensor]):
        return tensor.detach().clone()


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole."""
    return tuple(tensor.ds_shape if is_partition(tensor) else tensor.shape)


@torch.no_grad()
def write(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Write the whole value of a parameter or buffer of ``module``; each process keeps its part."""
    with here(module, [name], written=True):
        tensor = getattr(module, name)
        if is_dtensor(tensor):
            tensor, value = tensor.to_local(), value[part(tensor)]
        tensor.copy_(value)


def part(tensor: Any) -> tuple[slice, ...]:
    """Where this process's part of a DTensor lies in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))


def factors_of_part(factors: Factors, weight: torch.Tensor, transposed: bool = False) -> Factors:
    """Of whole factors what makes this process's part of ΔW ``(M, N)``, where the weight is a
    DTensor (``transposed``: of shape ``(N, M)``): the rows of B and the columns of A. The expansion
    mixes neither.
    """
    if not is_dtensor(weight):
        return factors
    rows, columns = reversed(part(weight)) if transposed else part(weight)
    return Factors(factors.A[:, columns], factors.B[rows], factors.h)


def kept(tensor: Any) -> torch.Tensor:
    """What this process keeps of a tensor, in its memory."""
    if is_dtensor(tensor):
        return tensor.to_local()  # type: ignore[no-any-return]
    return tensor.ds_tensor if is_partition(tensor) else tensor


def put_back(tensor: Any, local: torch.Tensor) -> None:
    """Write what :func:`kept` gave, or where it was whole then, what this process keeps of it."""
    if local.shape == tensor.shape and not is_dtensor(tensor):
        tensor.copy_(local)
        return
    kept(tensor).copy_(_part_of(tensor, local))
    if is_partition(tensor) and not _is_empty(tensor):
        # The whole, where it stays gathered, is no longer what the parts say.
        tensor.partition()


def like(tensor: Any, local: torch.Tensor) -> torch.Tensor:
    """This process's part as a tensor on the device of ``tensor``, and a DTensor where that is one.

    Raises:
        RuntimeError: ``tensor`` is gathered, and of ``local`` only a part is here.
    """
    if is_dtensor(tensor):
        return type(tensor).from_local(  # type: ignore[no-any-return]
            _part_of(tensor, local),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    if local.shape != tensor.shape:
        raise RuntimeError(
            "the base weight of this merged layer is sharded, and its forward has the merged one "
            "alone: unmerge before computing without the adapter"
        )
    return local.to(tensor.device)


def _part_of(tensor: Any, local: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that was sharded after it was copied, or the part itself."""
    if is_dtensor(tensor) and local.shape != kept(tensor).shape:
        return local[part(tensor)]
    return local


def refuse_active(parameters: Iterable[torch.Tensor]) -> None:
    """Raise if a forward under ZeRO-3 has not ended, whose parameters cannot be partitioned."""
    if any(getattr(parameter, "ds_active_sub_modules", None) for parameter in parameters):
        raise RuntimeError(
            "a forward of this model began and did not end, and ZeRO-3 keeps its parameters whole: "
            "call engine.empty_partition_cache() first, on every rank"
        )


def _is_empty(partition: torch.Tensor) -> bool:
    return partition.numel() == 0


def _gathered(parameters: Sequence[torch.Tensor], written: bool = False) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None)


@contextlib.contextmanager
def here(module: nn.Module, names: Sequence[str], *, written: bool = False) -> Iterator[None]:
    """Within this context the named parameters of a module, of those that it has itself, have their
    values on its device: what accelerate offloaded is fetched, what ZeRO-3 partitioned gathered.
    DTensors stay what they are.

    Args:
        written: they are changed: at the end the new values go where the old ones were.
    """
    if written:
        reshard([module])
    own = {name: p for name in names if (p := module._parameters.get(name)) is not None}
    partitions = [p for p in own.values() if is_partition(p) and (written or _is_empty(p))]
    if partitions:
        refuse_active(partitions)
        with _gathered(partitions, written):
            yield
        for partition in partitions if written else ():
            _tell_optimizer(partition)
    elif is_offloaded(module) and any(p.is_meta for p in own.values()):
        hook = offloading(module)
        hook.pre_forward(module)
        try:
            yield
            for name in own if written else ():
                _return(hook.weights_map, name, module.get_parameter(name).detach())
        finally:
            hook.post_forward(module, None)
    else:
        yield
        for parameter in own.values() if written else ():
            _tell_optimizer(parameter)


def _tell_optimizer(parameter: Any) -> None:
    """Give new values to DeepSpeed's optimizer, which steps from a copy that it keeps."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is not None:
        if optimizer.get_param_id(parameter) in optimizer.grad_position:
            optimizer.set_local_hp_param(parameter.ds_tensor, parameter)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(parameter)


def _return(weights: Any, name: str, value: torch.Tensor) -> None:
    """Put a value where accelerate fetches it: into memory, or the file that holds it."""
    held, name, weights = _held(weights, name)
    if name in held:
        held[name].copy_(value)
    elif weights.index[name].get("safetensors_file") is not None:
        # A checkpoint of the user's own is not written to.
        held[name] = value.to("cpu", copy=True)
    else:
        from accelerate.utils import offload_weight

        offload_weight(value, name, weights.save_folder, index=weights.index)
