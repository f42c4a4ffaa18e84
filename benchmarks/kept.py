"""What a layer keeps for its backward, counted: bytes for each token, and bytes beside them.

    TRITON_INTERPRET=1 python -m benchmarks.kept    count anew: ten minutes; needs peft, and no GPU

``benchmarks.report`` writes the table into docs/memory.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from pera_kernels.cli import describe
from pera_kernels.terms import Terms, coefficient_count
from pera_kernels.testing import Case, Inputs, make_inputs
from tools.documents import table

from . import options, rows
from .contenders import FROZEN, Contender, Frozen, Pera
from .peers import PeftLora, Released

__all__ = ["LINES", "count", "markdown"]

FILE = rows.RESULTS / "kept.jsonl"
# In and out features: an attention projection, and the last layer of a wide MLP.
SHAPES = ((4096, 4096), (14336, 4096))
DROPOUTS = (0.0, 0.05)
# What is kept of two numbers of tokens shows what is kept of each.
FEW, MORE = 8, 16


class PeftLoraCast(PeftLora):
    """PEFT's LoRA with float32 adapters and no autocast: it casts x to them."""

    def _adapter_dtype(self, case: Case) -> torch.dtype:
        return case.factor_dtype


KERNELS = Pera("triton", backend="triton")
COMPOSED = Pera("triton-composed", plan="composed", backend="triton")
# Who is counted, with which terms, and what it is told to keep.
LINES: dict[str, tuple[Contender, Terms, str]] = {
    "frozen layer": (Frozen(FROZEN, plan="dense"), "linear", "u"),
    "PERA, full": (KERNELS, "full", "u"),
    "PERA, square": (KERNELS, "square", "u"),
    'PERA, full, keep="x"': (KERNELS, "full", "x"),
    'PERA, full, plan="composed"': (COMPOSED, "full", "u"),
    "PEFT LoRA under autocast": (PeftLora("peft-lora-amp", autocast=True), "linear", "u"),
    "PEFT LoRA without autocast": (PeftLoraCast("peft-lora-cast"), "linear", "u"),
    "released PERA under autocast": (Released("released-amp", autocast=True), "full", "u"),
}


def _dropout_as_on_gpus(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
    """PyTorch's dropout whose mask has one byte for each element; on a CPU it has x's dtype."""
    return torch.native_dropout(x, p, training)[0]


def _kept(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps of a call, but for the module's own."""
    tensors = (*module.parameters(), *module.buffers())
    own, found = {t.untyped_storage().data_ptr() for t in tensors}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mock.patch.object(F, "dropout", _dropout_as_on_gpus), hooks:
        y = module(x)
    del y
    return sum(size for at, size in found.items() if at not in own)


def count(name: str, case: Case, inputs: Inputs) -> rows.Row:
    """The row of a line, without where it was made; inputs may have too many coefficients."""
    contender, terms, keep = LINES[name]
    case = replace(case, terms=terms, keep=keep)
    length = coefficient_count(case.r, terms)
    h = None if inputs.h is None or terms == "linear" else inputs.h[:length]
    module = contender.build(case, replace(inputs, h=h)).module.train()
    few, more = (_kept(module, inputs.x[:T].clone().requires_grad_()) for T in (FEW, MORE))
    per_token, rest = divmod(more - few, MORE - FEW)
    if rest:
        raise ValueError(f"{name}: what it keeps does not grow with the tokens evenly")
    numbers = {"bytes_per_token": per_token, "bytes_beside": few - FEW * per_token}
    return {"line": name, "contender": contender.name, "keep": keep, **rows.of_case(case)} | numbers


def counted(device: torch.device) -> Iterator[rows.Row]:
    """A row for each line, shape and dropout."""
    environment = rows.environment(device)
    environment |= {"status": "counted", "peft": describe.version("peft")}
    for N, M in SHAPES:
        case = Case(r=16, T=MORE, N=N, M=M, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        inputs = make_inputs(case, device)
        for name, dropout in itertools.product(LINES, DROPOUTS):
            if not (dropout and LINES[name][0] is COMPOSED):
                yield count(name, replace(case, dropout_p=dropout), inputs) | environment


def markdown() -> str:
    """A line for each of ``LINES``, shapes and dropout across."""
    found = rows.read(FILE)
    cells = {(row["line"], row["n"], row["dropout"]): row for row in found}
    places = [(shape, dropout) for shape in SHAPES for dropout in DROPOUTS]
    heads = [f"{N}→{M}" + f", dropout {p}" * (p > 0) for (N, M), p in places]
    lines = []
    for name in LINES:
        own = [cells.get((name, N, dropout)) for (N, _), dropout in places]
        numbers = [f"{row['bytes_per_token']:,}" if row else "" for row in own]
        lines.append([name, *numbers, f"{cells[name, SHAPES[0][0], 0.0]['bytes_beside']:,}"])
    first = found[0]
    return (
        f"{table(['bytes per token', *heads, f'beside, {heads[0]}'], lines)}\n\n"
        f"r={first['r']}, {first['dtype']}. Counted by hooks on saved tensors, torch "
        f"{first['torch']}, peft {first['peft']}, commit {first['commit']}, {first['date'][:10]}."
    )


if __name__ == "__main__":
    made = list(counted(options.device("auto")))
    FILE.unlink(missing_ok=True)
    rows.append(FILE, *made)
