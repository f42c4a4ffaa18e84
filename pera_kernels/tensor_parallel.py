"""A layer of which each rank has a part: the columns of the product (B's rows), or its rows (A's
columns).

By PyTorch's words a layer is column-wise parallel where ``weight (M, N)`` is sharded by M, and
row-wise where it is sharded by N. The expansion φ mixes neither the rows of B nor the columns of A,
so that each rank computes the formula on its part:

    column-wise: from x, A, h and its rows of B its columns of y; dx, dA and dh are sums over ranks
    row-wise: from its columns of x and A, B and h a summand of y; dB and dh are sums over ranks
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import broadcast, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from . import checks, functional
from .dropout import draw_seed, keep_mask, keep_scale
from .module import AdapterOptions, PeraLinear, PeraOverModule
from .operands import Base, Factors, Options, tokens

__all__ = ["ColumnWise", "RowWise", "TensorParallelLinear", "adapting", "shard"]


class TensorParallelLinear(PeraLinear):
    """A :class:`PeraLinear` whose parameters are DTensors on a mesh of one dimension. It takes a
    DTensor and returns one; the formulas are computed on plain tensors, the parts of this rank.
    """

    # On the mesh; asked for once, which torch.compile need not trace.
    rank: int

    def _mesh(self) -> DeviceMesh:
        if not (torch.compiler.is_compiling() or self.was_called):
            self.was_called = True
        return self.weight.device_mesh  # type: ignore[attr-defined, no-any-return]

    def _is_dense(self) -> bool:
        """Whether the adapter is merged or switched off."""
        if self.merged:
            checks.check_frozen(self.weight, self.bias)
        return self.merged or self._switch.is_off()

    def _weight(self) -> torch.Tensor:
        """This rank's part of the weight to compute with."""
        return _local(self.base_weight() if self._switch.is_off() else self.weight)

    def shared_call(self, x: torch.Tensor) -> None:
        """None: a part of a layer computes alone."""


class ColumnWise(TensorParallelLinear):
    """``weight``, ``bias`` and ``pera_B`` are sharded by M; ``pera_A`` and ``pera_h`` are whole."""

    def forward(self, input: Any) -> torch.Tensor:
        mesh = self._mesh()
        whole = _dtensor(input)
        # Where it is whole the sum of dx is left to who made it so, for all layers at once.
        if whole.placements != (Replicate(),):
            whole = whole.redistribute(mesh, [Replicate()])
        x, bias = whole.to_local(grad_placements=[Partial()]), _local(self.bias)
        if self._is_dense():
            y = F.linear(x, self._weight(), bias)
        else:
            A, B, h = self._factors()
            adapter, options = Factors(_added_up(A), _local(B), _added_up(h)), self._options()
            seed = _common_seed(x, mesh) if options.dropout_p > 0.0 else None
            y = functional.apply(x, Base(self._weight(), bias), adapter, options, seed)
        return DTensor.from_local(y, mesh, [Shard(-1)], run_check=False)


class RowWise(TensorParallelLinear):
    """``weight`` and ``pera_A`` are sharded by N; ``bias``, ``pera_B`` and ``pera_h`` are whole."""

    def forward(self, input: Any) -> torch.Tensor:
        mesh = self._mesh()
        x = _dtensor(input).redistribute(mesh, [Shard(-1)]).to_local()
        # The sum over ranks has the bias once.
        bias = _local(self.bias) if self.rank == 0 else None
        if self._is_dense():
            y = F.linear(x, self._weight(), bias)
        else:
            A, B, h = self._factors()
            adapter, options = Factors(_local(A), _added_up(B), _added_up(h)), self._options()
            base, p = Base(self._weight(), bias), options.dropout_p
            if p > 0.0:
                # The kernels' mask begins at the first column, which is another rank's.
                base = Base(None, None, F.linear(x, self._weight(), bias))
                T, N = tokens(x).shape
                mask = keep_mask(_common_seed(x, mesh), T, N, p, first=self.rank * N)
                x = x.masked_fill(~mask.view(x.shape), 0.0)
                terms, scale, _, *others = options
                options = Options(terms, scale * keep_scale(p), 0.0, *others)
            y = functional.apply(x, base, adapter, options)
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)


def _dtensor(x: object) -> DTensor:
    if not isinstance(x, DTensor):
        raise TypeError(
            "x of a tensor-parallel layer must be a DTensor, which the styles of "
            f"parallelize_module make it; got {type(x).__name__}"
        )
    return x


def _local(parameter: Any) -> Any:
    """This rank's part of what is sharded."""
    return None if parameter is None else parameter.to_local()


def _added_up(parameter: Any) -> Any:
    """What every rank has whole, and whose gradient is the sum of theirs."""
    if parameter is None:
        return None
    added = parameter.redistribute(placements=parameter.placements)
    return added.to_local(grad_placements=[Partial()])


def _common_seed(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The first rank's seed, for all: the mask is that of a layer that is not sharded."""
    return wait_tensor(broadcast(draw_seed(x.device), 0, mesh))  # type: ignore[no-any-return]


def shard(
    layer: PeraLinear, mesh: DeviceMesh, dim: int, src_data_rank: int | None = 0
) -> TensorParallelLinear:
    """Distribute the parameters of a layer, in place, and make it compute on its part.

    Args:
        dim: of the weight: 0 is column-wise, 1 row-wise.
        src_data_rank: whose values all ranks take; None where they have the same.

    Raises:
        TypeError: the layer calls its base as it is, which is not distributed.
        ValueError: it is merged, or the ranks do not divide what is sharded.
    """
    if isinstance(layer, PeraOverModule):
        raise TypeError(
            "tensor parallelism needs a plain nn.Linear as base; "
            f"{type(layer.base_layer).__name__} is called as it is"
        )
    if layer.merged:
        raise ValueError("a merged layer is not distributed: unmerge first")
    name, size = (("out_features", layer.out_features), ("in_features", layer.in_features))[dim]
    if mesh.ndim != 1 or size % mesh.size():
        raise ValueError(
            f"{name} must be a multiple of the number of ranks of a mesh of one dimension; "
            f"got {name}={size} and a mesh of {tuple(mesh.shape)}"
        )
    sharded = {"weight": dim, ("pera_B", "pera_A")[dim]: dim} | ({"bias": 0} if dim == 0 else {})
    for part_name, parameter in list(layer._parameters.items()):
        if parameter is None or isinstance(parameter, DTensor):
            continue
        placement = Shard(sharded[part_name]) if part_name in sharded else Replicate()
        value = distribute_tensor(parameter, mesh, [placement], src_data_rank=src_data_rank)
        layer._parameters[part_name] = nn.Parameter(value, parameter.requires_grad)
    layer.__class__ = (ColumnWise, RowWise)[dim]
    layer.rank = mesh.get_local_rank()  # type: ignore[assignment]
    return layer  # type: ignore[return-value]


def adapting(layer: Any, options: AdapterOptions) -> TensorParallelLinear:
    """:meth:`PeraLinear.adapting` of an ``nn.Linear`` whose weight is sharded already.

    Raises:
        TypeError: it is sharded in a way that is neither column-wise nor row-wise.
    """
    mesh, placements = layer.weight.device_mesh, tuple(layer.weight.placements)
    dim = {(Shard(0),): 0, (Shard(1),): 1}.get(placements)
    if dim is None or type(layer) is not nn.Linear:
        raise TypeError(
            f"layer must be an nn.Linear that is sharded by its rows or columns on a mesh of one "
            f"dimension, to take an adapter; got a {type(layer).__name__} sharded as {placements}"
        )
    self = PeraLinear.__new__(PeraLinear)
    nn.Module.__init__(self)
    self._adopt(layer)
    self._add_adapter(options)
    return shard(self.train(layer.training), mesh, dim)  # type: ignore[return-value]
