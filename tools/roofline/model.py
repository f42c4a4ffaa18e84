"""The launches of a training step, their work, and the time that it takes at a card's rates.

Launches, and PyTorch's operators between them, are recorded on tensors without storage: grids,
tiles and bytes are those that ship.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch

from pera_kernels.kernels import ops
from pera_kernels.kernels.launch import Launch, launching
from pera_kernels.kernels.plan import Operation, Recorder
from pera_kernels.terms import Terms, expanded_rank, lane_count

from ..compile_report import tiles_of
from ..problems import Job, Operands

__all__ = ["CARDS", "Card", "Layer", "Step", "job_of", "layer", "tensors"]

DTYPE, FEATURES = "bf16+fp32", 4096
# What a launch costs beside its work, in microseconds.
LAUNCH_US = 2.5
# For each kernel with matrix products, their sizes and the tiles that they are padded to; PIECES is
# how many blocks of lanes a program has, or how it divides its only one.
PADDED: dict[str, dict[str, tuple[str, ...]]] = {
    "project_kernel": {"T": ("BLOCK_T",), "N": ("BLOCK_N",), "LANES": ("PIECES", "BLOCK_K")},
    "accumulate_kernel": {"T": ("BLOCK_T",), "M": ("BLOCK_M",), "lanes": ("BLOCK_K",)},
    "compose_kernel": {"M": ("BLOCK_M",), "N": ("BLOCK_N",), "lanes": ("BLOCK_K",)},
}
# The same for T, N and lanes of each product of contract_kernel.
CONTRACTED = (("BLOCK_T",), ("BLOCK_N",), ("PIECES", "BLOCK_K"))
# Where the matrices of a product stand among the arguments of PyTorch's operator.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


@dataclass(frozen=True)
class Card:
    """A GPU: what large bfloat16 products and copies reach, where that is from, and what one of its
    multiprocessors holds.
    """

    name: str
    arch: str
    processors: int
    tflops: float
    tbps: float
    source: str
    shared: int = 228 * 1024
    # What the hardware takes of it for each program.
    reserved: int = 1024
    warp: int = 32
    warps: int = 64
    registers: int = 65536

    def floor(self, operations: float, moved: int) -> float:
        """Microseconds of so many operations, and bytes that move meanwhile."""
        return max(operations / self.tflops, moved / self.tbps) / 1e6

    def model(self, step: Step) -> float:
        """Microseconds of a step: the multiprocessor with the most programs decides."""
        uneven = 1.0
        if step.programs:
            uneven = math.ceil(step.programs / self.processors) * self.processors / step.programs
        return self.floor(step.issued, step.moved) * uneven + LAUNCH_US

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """How many programs a multiprocessor holds at a time."""
        # Registers are given out in groups of eight for each thread.
        of_registers = self.registers // (-(-max(1, registers) // 8) * 8 * self.warp * warps)
        return min(self.warps // warps, of_registers, self.shared // max(1, shared + self.reserved))


PRODUCT_SOURCE = "https://github.com/stas00/ml-engineering/tree/master/compute/accelerator"
ONE_CARD = "as recorded of one card, not by these benchmarks: PyTorch's copy and 8192³ product"
CARDS = (
    Card("H100", "sm_90", 132, 790, 3.0, f"{ONE_CARD} (798; taken as the H200's)"),
    Card("H200", "sm_90", 132, 790, 4.3, f"{ONE_CARD} (769 to 798)"),
    Card(
        "A100",
        "sm_80",
        108,
        271,
        1.8,
        f"products: [ml-engineering]({PRODUCT_SOURCE}), A100 SXM; copies: assumed, 89 % of the "
        "data sheet's 2.04 TB/s, the share that H100 and H200 reach and an [A800]"
        "(https://github.com/mli/transformers-benchmarks/issues/4)",
        shared=164 * 1024,
    ),
    Card(
        "MI300X",
        "gfx942",
        304,
        668,
        4.2,
        f"products: [ml-engineering]({PRODUCT_SOURCE}), ROCm 6.3; copies: "
        "[ROCm issue 5070](https://github.com/ROCm/legacy-rocm-build/issues/5070)",
        shared=65536,
        reserved=0,
        warp=64,
        warps=32,
        registers=131072,
    ),
)


class Step(NamedTuple):
    """A launch, or an operator of PyTorch's (``launch`` is None): the operations that the formula
    asks for, those with padded tiles and lanes, and the bytes of all tensors, each moved once.
    """

    name: str
    live: float
    issued: int
    moved: int
    launch: Launch | None = None

    @property
    def programs(self) -> int:
        return math.prod(self.launch.grid) if self.launch else 0


@dataclass(frozen=True)
class Layer:
    """Forward and backward of a layer, and the work of the frozen layer (y and dx alone)."""

    steps: tuple[Step, ...]
    moved: int
    frozen_moved: int
    frozen_operations: int

    def floor(self, card: Card) -> float:
        """The least time over the frozen layer's: live operations, each operand moved once."""
        return card.floor(sum(step.live for step in self.steps), self.moved) / self._frozen(card)

    def floor_of_steps(self, card: Card) -> float:
        """The same where each step moves its own tensors, as they do."""
        floors = (card.floor(step.live, step.moved) for step in self.steps)
        return sum(floors) / self._frozen(card)

    def model(self, card: Card) -> float:
        """The time of all steps over the frozen layer's."""
        return sum(map(card.model, self.steps)) / self.frozen_model(card)

    def frozen_model(self, card: Card) -> float:
        """Microseconds of the frozen layer, which is two products."""
        return self._frozen(card) + 2 * LAUNCH_US

    def _frozen(self, card: Card) -> float:
        return card.floor(self.frozen_operations, self.frozen_moved)


def job_of(terms: Terms, r: int, T: int, variant: str = "layer") -> Job:
    return Job(variant, terms, r, DTYPE, T, FEATURES, FEATURES)


@cache
def layer(arch: str, processors: int, job: Job) -> Layer:
    """What a training step launches on a GPU of this kind, recorded without one."""
    # Under a dispatch mode a registered op would stand for the launches.
    launched = mock.patch.object(ops, "_traced", lambda *tensors: False)
    own = Operands(job)
    with tiles_of(arch, processors), launched, Recorder() as recorder:
        with launching(recorder.steps.append):
            own.call()
    share = expanded_rank(job.r, job.terms) / lane_count(job.r, job.terms)
    base = sorted((job.T, job.N, job.M))
    adapter = sum(tensor.nbytes for tensor in tensors(own.adapter))
    frozen = 2 * (own.x.nbytes + own.weight.nbytes + own.dy.nbytes)
    return Layer(
        tuple(_step(call, share, base) for call in recorder.steps),
        # The backward reads x too; the adapter is read twice, and its gradients are written.
        frozen + own.x.nbytes + 3 * adapter,
        frozen,
        4 * job.T * job.N * job.M,
    )


def _step(call: Launch | Operation, share: float, base: list[int]) -> Step:
    """``share`` of a low-rank product's lanes are live; that of the ``base`` sizes has none."""
    if isinstance(call, Operation):
        name, arguments = call.operator.overloadpacket.__name__, call.arguments
        moved = sum(tensor.nbytes for tensor in tensors((arguments, call.result)))
        if name not in PRODUCTS:
            return Step(name, 0, 0, moved)
        left, right = arguments[PRODUCTS[name] :][:2]
        sizes = [*left.shape, right.shape[-1]]
        operations = 2 * math.prod(sizes)
        live = operations if sorted(sizes) == base else operations * share
        return Step(f"{name} {'×'.join(map(str, sizes))}", live, operations, moved)
    name, given = call.kernel.fn.__name__, call.arguments
    moved = sum(tensor.nbytes for tensor in tensors(tuple(given.values())))
    if name == "contract_kernel":
        products = [
            _padded((*x.shape, left.shape[1]), CONTRACTED, given) for left, x, *_ in given["jobs"]
        ]
        live, issued = map(sum, zip(*products, strict=True))
        return Step(name, live * share, issued, moved, call)
    if name not in PADDED:
        if "PRECISION" in given:
            raise ValueError(f"{name} computes products: PADDED has to say of which sizes")
        return Step(name, 0, 0, moved, call)
    sizes = [given[size] for size in PADDED[name]]
    live, issued = _padded(sizes, PADDED[name].values(), given)
    return Step(name, live * share, issued, moved, call)


def _padded(
    sizes: Sequence[int], blocks: Iterable[tuple[str, ...]], given: Mapping[str, Any]
) -> tuple[int, int]:
    """The operations of a product of these sizes, and with the blocks that they are padded to."""
    tiles = [_tile(given[name] for name in names) for names in blocks]
    padded = [-(-size // tile) * tile for size, tile in zip(sizes, tiles, strict=True)]
    return 2 * math.prod(sizes), 2 * math.prod(padded)


def _tile(blocks: Iterable[Any]) -> int:
    return math.prod(block for block in blocks if isinstance(block, int))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples and lists, as often as it stands there."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for own in value:
            yield from tensors(own)
