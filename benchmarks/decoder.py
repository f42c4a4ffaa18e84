"""``python -m benchmarks.decoder``: a training step of one decoder layer under every adapter.

The layer is transformers' Llama layer with random weights. Time, peak memory, and what is kept for
the backward stand beside those of the frozen layer (forward and the gradient of the hidden states).
What fails the numeric rule in the layer is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.terms import coefficient_count
from pera_kernels.testing import Case, Inputs, draws

from . import options, rows, timing
from .contenders import FROZEN, Contender, Layer
from .gate import Judgement, Outputs, compare, outputs
from .layers import CONTENDERS, measure_phase

__all__ = ["SIZES", "TARGETS", "Adapted", "Base", "Size", "judgement"]

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Forward and backward; the same and AdamW on what is trained.
PHASES = ("both", "step")


@dataclass(frozen=True)
class Size:
    """Widths of a layer and its heads, and the hidden states ``(batch, sequence, hidden)``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int

    def __str__(self) -> str:
        """What the other keys of a row do not say."""
        return (
            f"batch {self.batch} x sequence {self.sequence}, {self.heads} heads, "
            f"{self.kv_heads} key-value heads"
        )


SIZES = {
    "llama3-8b": Size(4096, 14336, 32, 8, batch=4, sequence=2048),
    # An eighth of it in every width.
    "eighth": Size(512, 1792, 8, 2, batch=2, sequence=256),
    "tiny": Size(64, 112, 4, 2, batch=2, sequence=8),
}


class Decoder(nn.Module):
    """A decoder layer with its rotary tables, which all layers of a model share."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, layer: nn.Module, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("cos", tables[0])
        self.register_buffer("sin", tables[1])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.layer(hidden, position_embeddings=(self.cos, self.sin))
        # transformers 4 returned a tuple.
        return out[0] if isinstance(out, tuple) else out


class Base:
    """The frozen layer of a case, the values of the adapters on it, inputs and their gradients."""

    def __init__(self, size: Size, case: Case, device: torch.device) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.case = case
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.sequence,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with device:
            layer = LlamaDecoderLayer(config, layer_idx=0).to(case.dtype)
            rotary = LlamaRotaryEmbedding(config=config)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(std)

        def hidden_states() -> torch.Tensor:
            return normal(size.batch, size.sequence, size.hidden).to(case.dtype)

        # Several draws where the numeric rule pools them; the first one is timed.
        self.inputs = [(hidden_states(), hidden_states()) for _ in range(draws(case))]
        self.x, self.dy = self.inputs[0][0].requires_grad_(), self.inputs[0][1]
        positions = torch.arange(size.sequence, device=device).unsqueeze(0)
        self.layer = Decoder(layer, rotary(self.x.detach(), positions)).requires_grad_(False)
        self.projections: dict[str, Inputs] = {}
        for path, linear in self.layer.named_modules():
            if isinstance(linear, nn.Linear) and path.rpartition(".")[2] in TARGETS:
                M, N = linear.weight.shape
                self.projections[path] = Inputs(
                    x=self.x,
                    weight=linear.weight,
                    bias=linear.bias,
                    # Linear and quadratic part alike, together about as large as the base output.
                    A=normal(case.r, N, std=N**-0.5),
                    B=normal(M, case.r, std=0.5 * case.r**-0.5),
                    h=normal(coefficient_count(case.r, "full"), std=(8 * N) ** 0.5),
                    dy=self.dy,
                )

    def adapted(self, contender: Contender, case: Case, together: bool) -> Layer:
        """Another layer on the same weights whose targets are those of a contender of layers;
        ``together`` evaluates query, key and value, and gate and up, on their shared input.
        """
        memo: dict[int, Any] = {id(p): p for p in self.layer.parameters()}
        module = copy.deepcopy(self.layer, memo)
        trains: dict[str, torch.Tensor] = {}
        for path, inputs in self.projections.items():
            M, N = inputs.weight.shape
            made = contender.build(replace(case, N=N, M=M), inputs)
            module.set_submodule(path, made.module)
            name = path.rpartition(".")[2]
            trains |= {f"{name}.{gradient}": t for gradient, t in made.trains.items()}
        if together:
            pk.shared_inputs(module)
        return Layer(module.train(), trains)


@dataclass(frozen=True)
class Adapted:
    """One way to adapt the layer: a contender of layers, with adapters of a dtype (None: the
    layer's), query, key and value evaluated together or apart.
    """

    contender: Contender
    adapter_dtype: torch.dtype | None = None
    together: bool = True

    @property
    def name(self) -> str:
        return self.contender.name + ("" if self.together else "-apart")

    def judged_as(self, base: Base) -> Case:
        """The case of the plain reference that it must match; the frozen layer's own."""
        case = replace(base.case, adapter_dtype=self.adapter_dtype)
        return self.contender.judged_as(case) or case

    def build(self, base: Base) -> Layer:
        return base.adapted(self.contender, self.judged_as(base), self.together)


def everybody(case: Case) -> list[Adapted]:
    """Who can adapt a layer of this case; the frozen layer is the first one."""
    names = (FROZEN, "peft-lora-amp", "peft-lora", "released-amp", "released", "auto")
    auto = CONTENDERS["auto"]
    found = [Adapted(CONTENDERS[name]) for name in names]
    found += [Adapted(auto, torch.float32), Adapted(auto, together=False)]
    return [
        own
        for own in found
        if own.contender.unavailable(case, torch.device("cpu")) is None
        # In a float32 layer float32 adapters are the layer's own.
        and own.adapter_dtype != case.dtype
    ]


def _exact(layer: Layer) -> Layer:
    """A copy in float64, the norms too, which compute in float32 whatever comes."""
    memo: dict[int, Any] = {}
    module = copy.deepcopy(layer.module, memo)
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
            if epsilon is not None and isinstance(weight, nn.Parameter):
                double = nn.RMSNorm(weight.shape, eps=epsilon)
                double.weight = weight
                setattr(parent, name, double)
    return Layer(module.double(), {name: memo[id(t)] for name, t in layer.trains.items()})


def expected(base: Base, judged: Case) -> tuple[list[Outputs], list[Outputs]]:
    """The plain reference in the layer's dtype, and the same in a float64 copy of the layer."""
    plain = base.adapted(CONTENDERS["reference"], judged, together=False)
    exact = _exact(plain)
    return (
        [outputs(plain, x, dy, seed=0) for x, dy in base.inputs],
        [outputs(exact, x.double(), dy.double(), seed=0) for x, dy in base.inputs],
    )


def judgement(
    base: Base, adapted: Adapted, wanted: tuple[list[Outputs], list[Outputs]]
) -> Judgement:
    """Whether it may be timed, and its largest error beside what is allowed."""
    try:
        layer = adapted.build(base)
        got = [outputs(layer, x, dy, seed=0) for x, dy in base.inputs]
    except Exception as error:
        return Judgement.of(error)
    return compare(got, *wanted, base.case.dtype, adapted.contender.allowed)


def measure(size: Size, base: Base, rounds: int, environment: rows.Row) -> Iterator[rows.Row]:
    """Rows as they are measured: those that failed the gate, then those that were timed."""
    judged: dict[Adapted, Judgement] = {}
    built: dict[Adapted, list[Layer]] = {}
    wanted: dict[Case, tuple[list[Outputs], list[Outputs]]] = {}

    def row(own: Adapted, phase: str, **measured: Any) -> rows.Row:
        key = {"contender": own.name, "plan": own.contender.plan, "phase": phase}
        error = {"error_ratio": judged[own].error_ratio}
        return {**key, **rows.of_case(own.judged_as(base)), **error, **environment, **measured}

    for own in everybody(base.case):
        judged[own] = Judgement()
        if own.contender.name != FROZEN:
            case = own.judged_as(base)
            wanted[case] = wanted.get(case) or expected(base, case)
            judged[own] = judgement(base, own, wanted[case])
        if judged[own].failure:
            yield row(own, "gate", status="failed", note=judged[own].failure)
        else:
            built[own] = [own.build(base)]
    # The float64 results take more memory than a layer does.
    wanted.clear()
    for phase in PHASES:
        for own, keys in measure_phase(built, [(base.x, base.dy)], phase, rounds).items():
            note = "; ".join(filter(None, (str(size), keys["note"])))
            yield row(own, phase, **{**keys, "note": note})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.decoder",
        description=f"A training step of one decoder layer, adapted on {', '.join(TARGETS)}.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--device", type=options.device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--size", choices=tuple(SIZES), help="of the layer (eighth; on a GPU llama3-8b)")
    add("--rank", type=int, default=16, help="of every adapter (16)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtypes", type=options.list_of(str, dtypes), help=f"of the layer: {', '.join(dtypes)}")
    add("--rounds", type=int, default=12, help="turns of every contender, at most (12)")
    add("--out", type=Path, help="append rows here (benchmarks/results/decoder-<device>.jsonl)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    device, gpu = given.device, given.device.type == "cuda"
    size = SIZES[given.size or ("llama3-8b" if gpu else "eighth")]
    path = given.out or rows.default_file(device, "decoder-")
    environment, failed = rows.environment(device), False
    with timing.place(device):
        for dtype in given.dtypes or (("bfloat16",) if gpu else ("float32", "bfloat16")):
            tokens = size.batch * size.sequence
            case = Case(
                r=given.rank,
                T=tokens,
                N=size.hidden,
                M=size.intermediate,
                dtype=rows.DTYPES[dtype][0],
                scale=1.0,
            )
            print(f"\nhidden {size.hidden}, intermediate {size.intermediate}, {size}, r={case.r}")
            for row in measure(size, Base(size, case, device), given.rounds, environment):
                rows.append(path, row)
                print(rows.line({**row, "note": row["note"].removeprefix(str(size))}), flush=True)
                failed = failed or row["status"] == "failed"
    print(f"\nrows appended to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
