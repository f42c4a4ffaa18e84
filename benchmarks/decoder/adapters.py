"""Every way to adapt the layer that is timed, on the same weights and with the same factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels import backends
from pera_kernels.terms import Terms
from pera_kernels.verify.numerics import Case

from ..layers import FROZEN, Layer
from ..peers import PEER_ALLOWED, ReleasedPera
from .layer import TARGETS, Base, Decoder, Factors, Problem, missing, projections

__all__ = ["CONTENDERS", "Contender", "adapt_pera", "contenders"]


# (layer, problem, values of the factors, dtype of the adapters) -> what is trained, by the name of
# its gradient, as in "q_proj.dA".
Adapt = Callable[[nn.Module, Problem, dict[str, Factors], torch.dtype], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Contender:
    """One way to adapt the layer.

    ``terms`` is what it must match in the plain reference, None for the frozen layer. Adapters are
    of ``adapter_dtype``, None being the layer's; with ``autocast`` the layer runs in its own dtype
    by ``torch.autocast``. One whose dropout draws its ``own_mask``, not the reference's, is judged
    in eval mode. ``allowed`` is the largest error ratio that passes: 1 is the numeric rule.
    ``apart`` evaluates no projections together. ``unavailable`` says why it cannot run.
    """

    name: str
    plan: str
    terms: Terms | None
    adapt: Adapt
    adapter_dtype: torch.dtype | None = None
    autocast: bool = False
    own_mask: bool = False
    backend: str | None = None
    needs: tuple[str, ...] = ()
    allowed: float = 1.0
    apart: bool = False

    def build(self, base: Base) -> Layer:
        problem, layer = base.problem, base.copy()
        dtype = self.adapter_dtype or problem.dtype
        trains = self.adapt(layer, problem, base.factors, dtype)
        amp = problem.dtype if self.autocast else None
        return Layer(Decoder(layer, base.tables, amp, problem.checkpointing).train(), trains)

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        if self.backend == "triton" and device.type == "cpu":
            return "its kernels need a GPU; interpreted kernels are never timed"
        if self.backend is not None:
            dtypes = (problem.dtype, self.adapter_dtype or problem.dtype)
            return backends.unavailable(self.backend, device, dtypes)
        return missing(*self.needs)


def _adapt_nothing(
    layer: nn.Module, problem: Problem, factors: dict[str, Factors], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {}


def adapt_pera(
    layer: nn.Module,
    problem: Problem,
    factors: dict[str, Factors],
    dtype: torch.dtype,
    *,
    backend: str,
    terms: Terms = "full",
    group: bool = True,
) -> dict[str, torch.Tensor]:
    pk.inject(
        layer,
        TARGETS,
        problem.r,
        terms=terms,
        dropout=problem.dropout,
        adapter_dtype=dtype,
        backend=backend,
        group=group,
    )
    trains = {}
    for name, module in projections(layer).items():
        trains[f"{name}.dA"] = _filled(module.pera_A, factors[name].A)
        trains[f"{name}.dB"] = _filled(module.pera_B, factors[name].B)
        if module.pera_h is not None:
            trains[f"{name}.dh"] = _filled(module.pera_h, factors[name].h)
    return trains


def _adapt_peft(
    layer: nn.Module, problem: Problem, factors: dict[str, Factors], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=problem.r,
        lora_alpha=problem.r,
        lora_dropout=problem.dropout,
        target_modules=list(TARGETS),
    )
    inject_adapter_in_model(config, layer)
    trains = {}
    for name, module in projections(layer).items():
        A, B = (part["default"].to(dtype).weight for part in (module.lora_A, module.lora_B))
        trains[f"{name}.dA"] = _filled(A, factors[name].A)
        trains[f"{name}.dB"] = _filled(B, factors[name].B)
    return trains


def _adapt_released(
    layer: nn.Module, problem: Problem, factors: dict[str, Factors], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    parents = dict(layer.named_modules())
    trains: dict[str, torch.Tensor] = {}
    for path, linear in list(parents.items()):
        parent, _, name = path.rpartition(".")
        if name not in TARGETS:
            continue
        case = Case(r=problem.r, dropout_p=problem.dropout, scale=1.0)
        # Of the inputs it reads A, B and h.
        adapted = ReleasedPera(linear, case, factors[name], dtype)  # type: ignore[arg-type]
        setattr(parents[parent], name, adapted)
        trains |= {f"{name}.dA": adapted.A, f"{name}.dB": adapted.B, f"{name}.dh": adapted.h}
    return trains


def _filled(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return parameter.copy_(values)


def _peer(name: str, terms: Terms, adapt: Adapt, *needs: str) -> tuple[Contender, Contender]:
    """Someone else's adapter: in the layer's dtype, and in float32 under autocast."""
    plain = Contender(
        name, "factored", terms, adapt, own_mask=True, needs=needs, allowed=PEER_ALLOWED
    )
    amp = replace(plain, name=f"{name}-amp", adapter_dtype=torch.float32, autocast=True)
    return plain, amp


def _ours(backend: str) -> tuple[Contender, Contender]:
    """A backend of the package: adapters in the layer's dtype and in float32, without autocast."""
    adapt = functools.partial(adapt_pera, backend=backend)
    plain = Contender(backend, "auto", "full", adapt, backend=backend)
    return plain, replace(plain, adapter_dtype=torch.float32)


def _apart(backend: str) -> Contender:
    """The same without groups: q, k and v each for itself."""
    adapt = functools.partial(adapt_pera, backend=backend, group=False)
    return Contender(f"{backend}-apart", "auto", "full", adapt, backend=backend, apart=True)


CONTENDERS: tuple[Contender, ...] = (
    Contender(FROZEN, "dense", None, _adapt_nothing),
    *_peer("peft-lora", "linear", _adapt_peft, "peft"),
    *_peer("released", "full", _adapt_released),
    *_ours("reference"),
    *_ours("torch"),
    _apart("torch"),
    *_ours("triton"),
    _apart("triton"),
)


def contenders(problem: Problem) -> list[Contender]:
    """Who differs at the problem's dtype: float32 adapters are the layer's own in float32."""
    half = problem.dtype.itemsize < torch.float32.itemsize
    return [own for own in CONTENDERS if half or own.adapter_dtype is None]
