"""``python -m benchmarks.decoder``: a training step of one decoder layer under every adapter.

The layer is transformers' Llama layer with random weights. Time, peak memory, and what is kept for
the backward stand beside those of the frozen layer (forward and the gradient of the hidden states).
What fails the numeric rule in the layer is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.terms import Terms, coefficient_count
from pera_kernels.testing import Case, draws

from . import options, rows, timing
from .contenders import FROZEN, Layer
from .gate import Judgement, Outputs, compare, outputs
from .memory import memory
from .peers import PEER_ALLOWED, Autocast, ReleasedPera

__all__ = ["ADAPTED", "SIZES", "TARGETS", "Adapted", "Base", "Size", "judgement", "step_call"]

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Forward and backward; the same and AdamW on what is trained.
PHASES = ("both", "step")
LEARNING_RATE = 1e-4
MIB = 2**20
# A, B and h of a projection, by its name.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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
    """The frozen layer of a case, the values of the adapters on it, an input and a gradient."""

    def __init__(self, size: Size, case: Case, device: torch.device) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.case, self.device = case, device
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
        self.factors: Factors = {}
        for name, linear in projections(self.layer).items():
            M, N = linear.weight.shape
            # Linear and quadratic part of the update alike, about as large as the base output.
            self.factors[name] = (
                normal(case.r, N, std=N**-0.5),
                normal(M, case.r, std=0.5 * case.r**-0.5),
                normal(coefficient_count(case.r, "full"), std=(8 * N) ** 0.5),
            )

    def copy(self) -> nn.Module:
        """Another layer on the same weights."""
        shared: dict[int, Any] = {id(p): p for p in self.layer.parameters()}
        return copy.deepcopy(self.layer, shared)


def projections(module: nn.Module) -> dict[str, Any]:
    """The modules under the names in ``TARGETS``."""
    modules = {name.rpartition(".")[2]: own for name, own in module.named_modules()}
    return {name: modules[name] for name in TARGETS}


# Adapts a layer and returns what is trained, by the name of its gradient, as in "q_proj.dA".
Adapt = Callable[[nn.Module, Factors, torch.dtype], dict[str, torch.Tensor]]


def adapt_pera(
    module: nn.Module, factors: Factors, dtype: torch.dtype, **settings: Any
) -> dict[str, torch.Tensor]:
    r = factors[TARGETS[0]][0].shape[0]
    pk.inject(module, TARGETS, r, adapter_dtype=dtype, **settings)
    trains = {}
    for name, layer in projections(module).items():
        tensors = zip("ABh", (layer.pera_A, layer.pera_B, layer.pera_h), factors[name], strict=True)
        for letter, parameter, values in tensors:
            if parameter is not None:
                trains[f"{name}.d{letter}"] = _filled(parameter, values)
    return trains


def adapt_peft(module: nn.Module, factors: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, inject_adapter_in_model

    r = factors[TARGETS[0]][0].shape[0]
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=list(TARGETS)), module)
    trains = {}
    for name, layer in projections(module).items():
        A, B = (part["default"].to(dtype).weight for part in (layer.lora_A, layer.lora_B))
        trains[f"{name}.dA"] = _filled(A, factors[name][0])
        trains[f"{name}.dB"] = _filled(B, factors[name][1])
    return trains


def adapt_released(
    module: nn.Module, factors: Factors, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    parents = dict(module.named_modules())
    trains: dict[str, torch.Tensor] = {}
    for path, linear in list(parents.items()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS:
            A, B, h = (factor.to(dtype) for factor in factors[name])
            adapted = ReleasedPera(linear, (A, B, h), scale=1.0, dropout=0.0)  # type: ignore[arg-type]
            setattr(parents[parent], name, adapted)
            trains |= {f"{name}.dA": adapted.A, f"{name}.dB": adapted.B, f"{name}.dh": adapted.h}
    return trains


def _filled(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return parameter.copy_(values)


@dataclass(frozen=True)
class Adapted:
    """One way to adapt the layer; ``terms`` is what it must match in the plain reference.

    Adapters are in the layer's dtype or in float32; with ``autocast`` the layer then runs in its
    own dtype by ``torch.autocast``. ``allowed`` is the largest error ratio that passes the gate.
    """

    name: str
    adapt: Adapt | None
    terms: Terms = "full"
    float32: bool = False
    autocast: bool = False
    allowed: float = 1.0

    def build(self, base: Base) -> Layer:
        module = base.copy()
        dtype = torch.float32 if self.float32 else base.case.dtype
        trains = {} if self.adapt is None else self.adapt(module, base.factors, dtype)
        if self.autocast:
            module = Autocast(module, base.case.dtype)
        return Layer(module.train(), trains)


def _both(adapted: Adapted) -> tuple[Adapted, Adapted]:
    """Somebody else's adapter: in the layer's dtype, and in float32 under autocast."""
    plain = replace(adapted, allowed=PEER_ALLOWED)
    return replace(plain, name=f"{plain.name}-amp", float32=True, autocast=True), plain


ADAPTED: tuple[Adapted, ...] = (
    Adapted(FROZEN, None),
    *_both(Adapted("peft-lora", adapt_peft, "linear")),
    *_both(Adapted("released", adapt_released)),
    Adapted("auto", adapt_pera),
    Adapted("auto", adapt_pera, float32=True),
    # Query, key and value each for itself.
    Adapted("auto-apart", functools.partial(adapt_pera, shared_inputs=())),
)


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


def expected(base: Base, adapted: Adapted) -> tuple[list[Outputs], list[Outputs]]:
    """The plain reference in the layer's dtype, and the same in a float64 copy of the layer."""
    adapt = functools.partial(
        adapt_pera, backend="reference", terms=adapted.terms, shared_inputs=()
    )
    plain = replace(adapted, adapt=adapt, autocast=False).build(base)
    exact = _exact(plain)
    return (
        [outputs(plain, x, dy, seed=0) for x, dy in base.inputs],
        [outputs(exact, x.double(), dy.double(), seed=0) for x, dy in base.inputs],
    )


def judgement(
    base: Base, adapted: Adapted, wanted: tuple[list[Outputs], list[Outputs]]
) -> Judgement:
    """Whether it may be timed, and its largest error beside what is allowed."""
    reference, truth = wanted
    try:
        layer = adapted.build(base)
        got = [outputs(layer, x, dy, seed=0) for x, dy in base.inputs]
    except Exception as error:
        return Judgement.of(error)
    if got[0].keys() != truth[0].keys():
        return Judgement(failure=f"it gives {', '.join(got[0])} instead of {', '.join(truth[0])}")
    return compare(got, reference, truth, base.case.dtype, adapted.allowed)


def step_call(layer: Layer, base: Base, phase: str) -> timing.Call:
    """A call of one phase; the frozen layer has nothing to optimize, so both are the same there."""
    x, dy, trained = base.x, base.dy, list(layer.trains.values())
    if phase == "both":
        return lambda: torch.autograd.grad(layer.module(x), [x, *trained], dy)
    # A captured step must not read the number of steps from the host.
    graph = x.is_cuda
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, capturable=graph) if trained else None

    def step() -> None:
        layer.module(x).backward(dy)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None

    return step


def kept_bytes(layer: Layer, base: Base) -> int:
    """What the forward keeps for the backward besides its input, parameters and output."""
    # What is made once and kept, such as a table, is made in the first call.
    layer.module(base.x)
    held = memory(lambda: layer.module(base.x), base.device).held
    # CUDA's allocator rounds sizes up: the output may count for a little more than it is.
    return max(0, held - base.dy.nbytes)


def measure(
    size: Size, base: Base, chosen: Sequence[Adapted], rounds: int, environment: rows.Row
) -> Iterator[rows.Row]:
    """Rows as they are measured: those that failed the gate, then those that were timed."""
    case, device = base.case, base.device
    judged: dict[Adapted, Judgement] = {}
    layers: dict[Adapted, Layer] = {}
    wanted: dict[tuple[Terms, bool], tuple[list[Outputs], list[Outputs]]] = {}

    def row(own: Adapted, phase: str, **measured: Any) -> rows.Row:
        adapter_dtype = torch.float32 if own.float32 else case.dtype
        key = rows.of_case(replace(case, terms=own.terms, adapter_dtype=adapter_dtype))
        plan = {"plan": "dense" if own.adapt is None else "auto"}
        error = {"error_ratio": judged[own].error_ratio}
        return {"contender": own.name, **plan, **key, "phase": phase, **error} | {
            **environment,
            **measured,
        }

    for own in chosen:
        judged[own] = Judgement()
        if own.adapt is not None:
            same = own.terms, own.float32
            if same not in wanted:
                wanted[same] = expected(base, own)
            judged[own] = judgement(base, own, wanted[same])
        if judged[own].failure:
            yield row(own, "gate", status="failed", note=judged[own].failure)
        else:
            layers[own] = own.build(base)
    # The float64 results take more memory than a layer does.
    wanted.clear()
    saved = {own: kept_bytes(layer, base) / MIB for own, layer in layers.items()}
    for phase in PHASES:
        calls = {own: step_call(layer, base, phase) for own, layer in layers.items()}
        for call in calls.values():
            # Libraries allocate and tune in the first call, the optimizer makes its state.
            call()
        peak = {own: memory(call, device).peak / MIB for own, call in calls.items()}
        numbered = {str(number): [call] for number, call in enumerate(calls.values())}
        timings = timing.time_calls(numbered, rounds, device)
        frozen = timings["0"]
        for own, found in zip(calls, timings.values(), strict=True):
            low, high = found.spread
            yield row(
                own,
                phase,
                median_ms=found.median,
                p20_ms=low,
                p80_ms=high,
                ratio_to_frozen=found.ratio_to(frozen),
                peak_mib=peak[own],
                saved_mib=saved[own],
                graph=found.graph,
                rounds=len(found.samples),
                note="; ".join(filter(None, (str(size), found.note))),
            )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.decoder",
        description=f"A training step of one decoder layer, adapted on {', '.join(TARGETS)}.",
        allow_abbrev=False,
    )
    add, names = made.add_argument, tuple(dict.fromkeys(own.name for own in ADAPTED))
    add("--device", type=options.device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--size", choices=tuple(SIZES), help="of the layer (eighth; on a GPU llama3-8b)")
    add("--rank", type=int, default=16, help="of every adapter (16)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtypes", type=options.list_of(str, dtypes), help=f"of the layer: {', '.join(dtypes)}")
    add("--only", type=options.list_of(str, names), default=names, help=", ".join(names))
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
            )
            chosen = [
                own
                for own in ADAPTED
                if own.name in (FROZEN, *given.only)
                # In a float32 layer float32 adapters are the layer's own.
                and not (own.float32 and case.dtype == torch.float32)
            ]
            print(f"\nhidden {size.hidden}, intermediate {size.intermediate}, {size}, r={case.r}")
            for row in measure(size, Base(size, case, device), chosen, given.rounds, environment):
                rows.append(path, row)
                print(rows.line({**row, "note": row["note"].removeprefix(str(size))}), flush=True)
                failed = failed or row["status"] == "failed"
    print(f"\nrows appended to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
