"""A decoder layer of the Llama shape with random weights, and the adapters' values on it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pera_kernels.terms import coefficient_count

__all__ = ["TARGETS", "Base", "Decoder", "Factors", "Problem", "missing", "projections"]

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
INSTALL = 'pip install -e ".[bench]"'


def missing(*packages: str) -> str | None:
    """What to install for ``packages`` to be there; None if they are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"it needs {' and '.join(absent)}: {INSTALL}" if absent else None


@dataclass(frozen=True)
class Problem:
    """One layer and its input: hidden states ``(batch, sequence, hidden)`` of ``dtype``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int
    r: int = 16
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    checkpointing: bool = False

    @property
    def T(self) -> int:
        return self.batch * self.sequence


@dataclass(frozen=True)
class Factors:
    """A ``(r, N)``, B ``(M, r)``, h ``(L,)`` of one projection, in float64."""

    A: torch.Tensor
    B: torch.Tensor
    h: torch.Tensor


class Decoder(nn.Module):
    """A decoder layer with its rotary tables, hidden states to hidden states.

    The tables are made once: in a model all layers share them.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        layer: nn.Module,
        tables: tuple[torch.Tensor, torch.Tensor],
        autocast: torch.dtype | None,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("cos", tables[0])
        self.register_buffer("sin", tables[1])
        self.autocast = autocast
        self.checkpointing = checkpointing

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        amp = torch.autocast(hidden.device.type, dtype=self.autocast) if self.autocast else None
        with amp or contextlib.nullcontext():
            if self.checkpointing:
                return checkpoint(self._run, hidden, use_reentrant=False)
            return self._run(hidden)

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.layer(hidden, position_embeddings=(self.cos, self.sin))
        # transformers 4 returned a tuple.
        return out[0] if isinstance(out, tuple) else out


class Base:
    """The frozen layer of a problem, the values of the adapters on it, an input and a gradient."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.problem = problem
        self.device = device
        config = LlamaConfig(
            hidden_size=problem.hidden,
            intermediate_size=problem.intermediate,
            num_attention_heads=problem.heads,
            num_key_value_heads=problem.kv_heads,
            max_position_embeddings=problem.sequence,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with device:
            self.layer = LlamaDecoderLayer(config, layer_idx=0).to(problem.dtype)
            self.layer.requires_grad_(False)
            rotary = LlamaRotaryEmbedding(config=config)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

        shape = (problem.batch, problem.sequence, problem.hidden)
        self.x = normal(*shape).to(device, problem.dtype).requires_grad_()
        self.dy = normal(*shape).to(device, problem.dtype)
        positions = torch.arange(problem.sequence, device=device).unsqueeze(0)
        self.tables = rotary(self.x.detach(), positions)
        self.factors = {}
        for name, layer in projections(self.layer).items():
            M, N = layer.weight.shape
            # Linear and quadratic part of the update alike, about as large as the base output.
            self.factors[name] = Factors(
                normal(problem.r, N, std=N**-0.5),
                normal(M, problem.r, std=0.5 * problem.r**-0.5),
                normal(coefficient_count(problem.r, "full"), std=(8 * N) ** 0.5),
            )

    def copy(self) -> nn.Module:
        """Another layer on the same weights."""
        shared: dict[int, Any] = {id(p): p for p in self.layer.parameters()}
        return copy.deepcopy(self.layer, shared)


def projections(layer: nn.Module) -> dict[str, Any]:
    """The modules under the names in ``TARGETS``."""
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    return {name: modules[name] for name in TARGETS}
