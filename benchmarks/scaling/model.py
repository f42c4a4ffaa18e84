"""Operations and bytes of one rank and one training step, from the shapes of a Llama.

Collectives are those of PyTorch's DDP, FSDP2 and styles of tensor parallelism, and of
pera_kernels.tensor_parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

from pera_kernels.terms import Terms, coefficient_count, lane_count
from pera_kernels.testing import Case

from ..decoder import TARGETS
from ..roofline import work

__all__ = [
    "BASE",
    "GPUS",
    "NODE",
    "SHAPES",
    "TOKENS",
    "Adapter",
    "Parallelism",
    "Shape",
    "adapter_bytes",
    "base_bytes",
    "input_bytes",
    "operations",
    "parallelisms",
    "payload",
    "sent",
]

TOKENS, GPUS, NODE = 8192, (1, 2, 8, 64, 256, 1024), 8
BASE, FACTORS = torch.bfloat16, torch.float32
# A parameter, its gradient and AdamW's two moments.
COPIES = 4
# The dimension of a weight (M, N) that tensor parallelism shards.
COLUMN_WISE, ROW_WISE = 0, 1


class Adapter(NamedTuple):
    terms: Terms
    r: int = 16


class Linear(NamedTuple):
    name: str
    N: int
    M: int
    dim: int

    def case(self, adapter: Adapter | None, tp: int, tokens: int) -> Case:
        """What one of ``tp`` ranks computes. Column-wise: of all of x, a part of y; row-wise: of a
        part of x, a summand of all of y.
        """
        terms, r = adapter or Adapter("linear")
        N, M = (self.N, self.M // tp) if self.dim == COLUMN_WISE else (self.N // tp, self.M)
        return Case(terms=terms, r=r, T=tokens, N=N, M=M, dtype=BASE, adapter_dtype=FACTORS)


class Parameter(NamedTuple):
    """``dim`` is what tensor parallelism shards; None is a parameter that every rank has whole."""

    shape: tuple[int, ...]
    dim: int | None
    trained: bool = False

    @property
    def bytes(self) -> int:
        return prod(self.shape) * (FACTORS if self.trained else BASE).itemsize

    def part(self, ranks: int, dim: int | None) -> int:
        """Bytes of the largest part of so many; FSDP2 pads the others to it."""
        if dim is None:
            return self.bytes
        return -(-self.shape[dim] // ranks) * (self.bytes // self.shape[dim])


@dataclass(frozen=True)
class Shape:
    """A Llama, adapted in :data:`~benchmarks.decoder.TARGETS`; ``kv`` are the features of k."""

    name: str
    layers: int
    hidden: int
    kv: int
    intermediate: int
    vocabulary: int = 128256

    @property
    def linears(self) -> tuple[Linear, ...]:
        hidden, kv, wide = self.hidden, self.kv, self.intermediate
        return (
            Linear("q_proj", hidden, hidden, COLUMN_WISE),
            Linear("k_proj", hidden, kv, COLUMN_WISE),
            Linear("v_proj", hidden, kv, COLUMN_WISE),
            Linear("o_proj", hidden, hidden, ROW_WISE),
            Linear("gate_proj", hidden, wide, COLUMN_WISE),
            Linear("up_proj", hidden, wide, COLUMN_WISE),
            Linear("down_proj", wide, hidden, ROW_WISE),
        )

    def block(self) -> list[Parameter]:
        """The frozen parameters of a block: its weights and the scales of two norms."""
        weights = [Parameter((own.M, own.N), own.dim) for own in self.linears]
        return [*weights, *2 * [Parameter((self.hidden,), None)]]

    def root(self) -> list[Parameter]:
        """Those outside of the blocks: the embedding, the head and a norm."""
        weights = 2 * [Parameter((self.vocabulary, self.hidden), COLUMN_WISE)]
        return [*weights, Parameter((self.hidden,), None)]

    def adapters(self, adapter: Adapter | None) -> list[Parameter]:
        """Those of a block's adapters: A, B and h of each."""
        found = []
        for own in self.linears:
            if adapter is not None and own.name in TARGETS:
                A, B = (None, 0) if own.dim == COLUMN_WISE else (1, None)
                found.append(Parameter((adapter.r, own.N), A, trained=True))
                found.append(Parameter((own.M, adapter.r), B, trained=True))
                if L := coefficient_count(adapter.r, adapter.terms):
                    found.append(Parameter((L,), None, trained=True))
        return found


SHAPES = (
    Shape("8B", 32, 4096, 1024, 14336),
    Shape("70B", 80, 8192, 1024, 28672),
    Shape("405B", 126, 16384, 1024, 53248),
)


class Parallelism(NamedTuple):
    """``groups`` of ``ranks``: ranks share the work as ``kind`` says, groups as DDP does.

    "FSDP2 by N" shards A ``(r, N)`` by N, which FSDP2 does where it is told to.
    """

    kind: Literal["DDP", "FSDP2", "FSDP2 by N", "TP"]
    ranks: int
    groups: int = 1

    def __str__(self) -> str:
        if self.ranks == 1:
            return "1 GPU"
        return f"{self.kind}, {self.ranks}" + f" × DDP, {self.groups}" * (self.groups > 1)

    @property
    def tp(self) -> int:
        """Among how many a layer is divided."""
        return self.ranks if self.kind == "TP" else 1

    def part(self, parameter: Parameter) -> int:
        """Bytes that a rank holds."""
        dim = {"DDP": None, "TP": parameter.dim}.get(self.kind, 0)
        if self.kind == "FSDP2 by N" and parameter.trained:
            dim = parameter.shape.index(max(parameter.shape))
        return parameter.part(self.ranks, dim)


def parallelisms() -> Iterator[Parallelism]:
    yield from (Parallelism("DDP", p) for p in GPUS)
    yield from (Parallelism("FSDP2", p) for p in GPUS[1:])
    yield from (Parallelism("FSDP2 by N", p) for p in GPUS[1:])
    yield from (Parallelism("TP", min(p, NODE), max(1, p // NODE)) for p in GPUS[1:])


def total(sizes: Iterable[int], shape: Shape) -> int:
    return shape.layers * sum(sizes)


def operations(shape: Shape, adapter: Adapter | None, tp: int) -> int:
    """Floating-point operations of the linear layers: forward, dx, and all of the adapters."""
    head = Linear("head", shape.hidden, shape.vocabulary, COLUMN_WISE)
    done = work("dense", head.case(None, tp, TOKENS), "both").flops
    for own in shape.linears:
        plan = "factored" if adapter is not None and own.name in TARGETS else "dense"
        done += shape.layers * work(plan, own.case(adapter, tp, TOKENS), "both").flops
    return done


def base_bytes(shape: Shape, p: Parallelism) -> int:
    """Of the frozen weights. FSDP2 holds the root, and two blocks at a time, whole besides."""
    held = total(map(p.part, shape.block()), shape) + sum(map(p.part, shape.root()))
    if p.kind.startswith("FSDP2"):
        held += sum(own.bytes for own in (*shape.root(), *2 * shape.block()))
    return held


def input_bytes(shape: Shape, tp: int, tokens: int = TOKENS) -> int:
    """Of the x that a backward of adapters needs and a frozen layer's does not: one for q, k and v,
    one for up, one for down.
    """
    return shape.layers * tokens * BASE.itemsize * (2 * shape.hidden + shape.intermediate // tp)


def adapter_bytes(shape: Shape, adapter: Adapter, p: Parallelism) -> int:
    """Of adapters, gradients and moments, and of u ``(T, lanes)`` of every adapted layer."""
    own, lanes = shape.adapters(adapter), lane_count(adapter.r, adapter.terms)
    held = COPIES * total(map(p.part, own), shape)
    if p.kind.startswith("FSDP2"):
        held += sum(parameter.bytes for parameter in 2 * own)
    return held + shape.layers * len(TARGETS) * TOKENS * lanes * BASE.itemsize


def payload(
    shape: Shape, adapter: Adapter | None, p: Parallelism, tokens: int = TOKENS
) -> dict[str, int]:
    """Bytes of the whole tensors that a step's collectives among ``p.ranks`` take or make."""
    own = shape.adapters(adapter)
    if p.kind == "DDP":
        return {"all_reduce": total((parameter.bytes for parameter in own), shape)}
    if p.kind == "TP":
        # y or dx of every layer, what the embedding gives and dx of the head.
        rows = (shape.layers * len(shape.linears) + 2) * tokens * shape.hidden * BASE.itemsize
        return {"all_reduce": rows + total((q.bytes for q in own if q.dim is None), shape)}
    blocks, root, adapters = (
        p.ranks * sum(map(p.part, parameters)) for parameters in (shape.block(), shape.root(), own)
    )
    # A block for the forward and again for the backward; the root stays whole between them.
    gathered = 2 * shape.layers * (blocks + adapters) + root
    return {"all_gather": gathered, "reduce_scatter": shape.layers * adapters}


def ring(given: dict[str, int], ranks: int) -> float:
    """Bytes that each rank sends; an all-reduce is a reduce-scatter and an all-gather."""
    twice = given.get("all_reduce", 0)
    return (sum(given.values()) + twice) * (ranks - 1) / ranks


def sent(shape: Shape, adapter: Adapter | None, p: Parallelism) -> float:
    """Bytes that each rank sends in a step."""
    between = {"all_reduce": total(map(p.part, shape.adapters(adapter)), shape)}
    return ring(payload(shape, adapter, p), p.ranks) + ring(between, p.groups)
