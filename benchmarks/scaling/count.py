"""``torchrun --nproc-per-node 2 -m benchmarks.scaling.count``: bytes of the collectives of a step.

A small transformers Llama with adapters makes a forward and a backward on every rank, over gloo;
what PyTorch's CommDebugMode takes for a collective is counted by its tensors.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import pera_kernels as pk
from pera_kernels.cli import describe
from pera_kernels.parallel import ColwiseParallel, RowwiseParallel

from ..decoder import TARGETS
from ..rows import RESULTS, Row, append
from .model import Adapter, Parallelism, Shape

__all__ = ["CASES", "FILE", "SMALL", "TOKENS", "count"]

FILE = RESULTS / "collectives.jsonl"
# r is no multiple of the ranks, so that FSDP2 pads.
SMALL, RANK, TOKENS = Shape("small", 2, 16, 8, 24, 30), 3, (2, 5)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
CASES: tuple[tuple[Parallelism, Adapter | None], ...] = tuple(
    (Parallelism(kind, 2), None if terms is None else Adapter(terms, RANK))
    for kind in ("DDP", "FSDP2", "FSDP2 by N", "TP")
    for terms in (None, "linear", "square", "full")
    # DDP refuses a model that does not train; frozen parameters are sharded by N nowhere.
    if terms is not None or kind in ("FSDP2", "TP")
)


class Bytes(CommDebugMode):
    """Bytes by collective: of what it takes or what it makes, whichever is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = self.get_total_counts()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            name = COLLECTIVES[func._overloadpacket.__name__]
            self.bytes[name] += max(tensor.nbytes for tensor in tensors)
        return out


def count(p: Parallelism, adapter: Adapter | None) -> dict[str, int]:
    """Bytes of the collectives of one training step, on any of the ranks of the group."""
    model = _parallel(_llama(adapter), p)
    tokens = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS)
    with Bytes() as counted:
        model(input_ids=tokens).logits.float().square().mean().backward()
    return dict(counted.bytes)


def _llama(adapter: Adapter | None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.intermediate,
        num_hidden_layers=SMALL.layers,
        vocab_size=SMALL.vocabulary,
        tie_word_embeddings=False,
        use_cache=False,
        **HEADS,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if adapter is not None:
        pk.inject(model, TARGETS, adapter.r, terms=adapter.terms)
    model.enable_input_require_grads()
    return model


def _parallel(model: Any, p: Parallelism) -> nn.Module:
    if p.kind == "DDP":
        return DistributedDataParallel(model)
    if p.kind == "TP":
        styles = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1)),
        }
        for linear in SMALL.linears:
            part = "self_attn" if linear.name[0] in "qkvo" else "mlp"
            style = RowwiseParallel() if linear.dim else ColwiseParallel()
            styles[f"model.layers.*.{part}.{linear.name}"] = style
        return parallelize_module(model, init_device_mesh("cpu", (p.ranks,)), styles)
    where = by_longest if p.kind == "FSDP2 by N" else None
    for block in model.model.layers:
        fully_shard(block, shard_placement_fn=where)
    return fully_shard(model, shard_placement_fn=where)  # type: ignore[no-any-return]


def by_longest(parameter: nn.Parameter) -> Shard | None:
    """For ``fully_shard``: A by N, B by M, and frozen parameters as ever."""
    if not parameter.requires_grad:
        return None
    return Shard(parameter.shape.index(max(parameter.shape)))


def rows() -> Iterator[Row]:
    """One for each case, with what it was made with."""
    made = {"torch": torch.__version__, "commit": describe.commit()}
    for p, adapter in CASES:
        case = {"kind": p.kind, "ranks": p.ranks, "terms": adapter and adapter.terms, "r": RANK}
        size = {"tokens": TOKENS[0] * TOKENS[1], "shape": asdict(SMALL)}
        yield {**case, **size, "bytes": count(p, adapter), **made}


def main() -> int:
    dist.init_process_group("gloo")
    found = list(rows())
    if dist.get_rank() == 0:
        append(FILE, *found)
        print(f"{len(found)} rows for {FILE}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
