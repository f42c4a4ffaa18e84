"""Adapted models on several GPUs: styles for tensor parallelism, and a check that ranks agree.

    pk.inject(model, ["q_proj", "down_proj"])
    pera_kernels.parallel.check(model)
    parallelize_module(model, mesh, {"q_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})

DDP, FSDP2 and ZeRO-3 need nothing of this module.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module
from torch.distributed.tensor import parallel as styles

from .adapters.checkpoint import unwrapped
from .adapters.inject import base_name
from .adapters.ranks import all_ranks, exchange, together
from .checks import check_model, some
from .module import PeraLinear, is_adapted
from .sharded import whole
from .tensor_parallel import shard

__all__ = ["ColwiseParallel", "RowwiseParallel", "check"]


class ColwiseParallel(styles.ColwiseParallel):
    """:class:`torch.distributed.tensor.parallel.ColwiseParallel`, also for a :class:`PeraLinear`:
    ``weight``, ``bias`` and ``pera_B`` are sharded by ``out_features``.

    Raises:
        TypeError: the layer's base is called as it is (a quantized one, say).
        ValueError: the number of ranks does not divide ``out_features``, or the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, PeraLinear):
            return _distribute(self, module, device_mesh, 0)
        with _staying_frozen(module):
            return super()._apply(module, device_mesh)


class RowwiseParallel(styles.RowwiseParallel):
    """:class:`torch.distributed.tensor.parallel.RowwiseParallel`, also for a :class:`PeraLinear`:
    ``weight`` and ``pera_A`` are sharded by ``in_features``.

    Raises:
        TypeError: the layer's base is called as it is (a quantized one, say).
        ValueError: the number of ranks does not divide ``in_features``, or the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, PeraLinear):
            self.desired_input_layouts = (Shard(-1),)
            return _distribute(self, module, device_mesh, 1)
        with _staying_frozen(module):
            return super()._apply(module, device_mesh)


def _distribute(style: Any, layer: PeraLinear, mesh: DeviceMesh, dim: int) -> nn.Module:
    """As PyTorch's styles do: the parameters, and hooks for what comes in and goes out."""
    layer = shard(layer, mesh, dim, style.src_data_rank)
    come = partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts)
    go = partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    return distribute_module(layer, mesh, None, come, go)


@contextlib.contextmanager
def _staying_frozen(module: nn.Module) -> Iterator[None]:
    """What was frozen is frozen afterwards: PyTorch 2.8 makes new parameters, which train."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    yield
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)


def check(model: nn.Module, ranks: Sequence[int] | None = None) -> None:
    """Raise on every rank if the adapters of ``model`` differ between them, in their places,
    shapes, options or values, or what else trains in its values.

    It is a call for all ranks. Make it before the model is wrapped: DDP gives the first rank's
    values to all, and FSDP2 takes each rank's own part, whatever the others have.

    Args:
        ranks: those that have the same model; None means all.

    Raises:
        ValueError: they differ, with the first differences; or the model has no adapter, or
            ``torch.distributed`` is not initialised.
        TimeoutError: another rank did not call it.
    """
    check_model(model)
    model = unwrapped(model)
    layers = {base_name(name): m for name, m in model.named_modules() if is_adapted(m)}
    if not layers:
        raise ValueError(f"model has no adapter to check; got {type(model).__name__}")
    ranks = all_ranks() if ranks is None else tuple(ranks)
    if not ranks:
        raise ValueError(
            "check is for several ranks, and torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first, in a program that torchrun starts"
        )
    if dist.get_rank() not in ranks:
        raise ValueError(f"ranks must have this one, {dist.get_rank()}; got {ranks}")
    options = {name: _options(layer) for name, layer in layers.items()}
    _refuse_differences(ranks, options, "options")
    with together(model, "parallel.check"):
        values = {name: _digest(layer) for name, layer in layers.items()}
        others = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        values |= {base_name(n): _of([(n, p)]) for n, p in others if ".pera_" not in f".{n}"}
    _refuse_differences(ranks, values, "values")


# Of a PeraLinear, and what PEFT's layers call the same.
OPTIONS = (
    *("in_features", "out_features", "r", "terms", "init"),
    *("alpha", "dropout", "scaling", "pera_dropout"),
)


def _options(layer: nn.Module) -> str:
    return repr([getattr(layer, name, None) for name in OPTIONS])


def _digest(layer: nn.Module) -> str:
    """Of the values of all its adapters."""
    return _of((n, p) for n, p in layer.named_parameters() if n.startswith("pera_"))


def _of(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        own = whole(parameter).detach().cpu().contiguous()
        digest.update(f"{name} {own.dtype} {tuple(own.shape)} ".encode())
        digest.update(own.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_differences(ranks: Sequence[int], own: dict[str, str], what: str) -> None:
    call = "parallel.check" if what == "options" else f"parallel.check of {what}"
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    if len(set(exchange(ranks, call, digest).values())) == 1:
        return
    # Only now what is long.
    told = exchange(ranks, f"{call}, which differ", own)
    first, *others = told
    for rank in others:
        names = [
            n for n in {**told[first], **told[rank]} if told[first].get(n) != told[rank].get(n)
        ]
        if names:
            raise ValueError(
                f"adapters differ in their {what} between rank {first} and rank {rank}: "
                f"{some(names)}. Give every rank one seed before inject (torch.manual_seed), or "
                "load one checkpoint"
            )
