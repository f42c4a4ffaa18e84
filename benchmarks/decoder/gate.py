"""The correctness gate: what is wrong is not timed."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.verify.numerics import Case, draws, judge

from ..gate import Judgement
from ..layers import Layer
from .adapters import Contender, adapt_pera
from .layer import Base

__all__ = ["Gate", "exact", "outputs"]

Results = dict[str, torch.Tensor]
# Projections by the path of their parent.
Groups = dict[str, tuple[str, ...]]


def outputs(adapted: Layer, x: torch.Tensor, dy: torch.Tensor) -> Results:
    """y, dx and the gradient of everything that is trained; the seed chooses the dropout mask."""
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    y = adapted.module(leaf)
    leaves = {"dx": leaf, **adapted.trains}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(adapted: Layer) -> Layer:
    """A copy of everything in float64, the norms too, which compute in float32 whatever comes."""
    memo: dict[int, Any] = {}
    module = copy.deepcopy(adapted.module, memo)
    layer: Any = module.layer
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(layer, name)
        double = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        double.weight = norm.weight
        setattr(layer, name, double)
    trains = {name: memo[id(tensor)] for name, tensor in adapted.trains.items()}
    return Layer(module.double(), trains)


def share_masks(module: nn.Module, groups: Groups) -> None:
    """Let the projections of a group draw one dropout mask, as where they are evaluated together:
    the generator is put back to where it was before the first of them.
    """

    def remember(state: list[torch.Tensor], x: torch.Tensor) -> None:
        cuda = x.device.type == "cuda"
        state[:] = [torch.cuda.get_rng_state(x.device) if cuda else torch.get_rng_state()]

    def put_back(state: list[torch.Tensor], x: torch.Tensor) -> None:
        if x.device.type == "cuda":
            torch.cuda.set_rng_state(state[0], x.device)
        else:
            torch.set_rng_state(state[0])

    for parent, names in groups.items():
        state: list[torch.Tensor] = []
        for name in names:
            act = put_back if name != names[0] else remember
            projection = module.get_submodule(f"{parent}.{name}")
            projection.register_forward_pre_hook(
                lambda _, args, act=act, state=state: act(state, args[0])
            )


class Gate:
    """The numeric rule on the layers that are timed, at the sizes timed.

    Truth is the plain reference of PERA, or of LoRA, in a float64 copy of the whole layer; the
    error to compare with is that of the same reference in the layer's dtype. Few coefficients are
    judged on several draws of the input, as the rule says.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        generator = torch.Generator().manual_seed(1)
        self.inputs = [(base.x.detach(), base.dy)]
        for _ in range(1, draws(Case(r=base.problem.r))):
            x, dy = torch.randn(2, *base.x.shape, generator=generator).to(base.x.device).unbind()
            self.inputs.append((x.to(base.x.dtype), dy.to(base.x.dtype)))
        self._expected: dict[Any, tuple[list[Results], list[Results]]] = {}

    def _masked(self, contender: Contender) -> bool:
        """Judged with dropout."""
        return self.base.problem.dropout > 0.0 and not contender.own_mask

    def _groups(self, contender: Contender, layer: Layer) -> Groups:
        """Whose dropout mask is shared: the reference evaluates no projections together."""
        if not self._masked(contender) or contender.backend == "reference" or contender.apart:
            return {}
        return pk.group_projections(layer.module)

    def _reference(
        self, contender: Contender, groups: Groups
    ) -> tuple[list[Results], list[Results]]:
        masked = self._masked(contender)
        key = contender.terms, contender.adapter_dtype, masked, tuple(groups.items())
        if key not in self._expected:
            assert contender.terms is not None
            adapt = functools.partial(adapt_pera, backend="reference", terms=contender.terms)
            plain = replace(contender, adapt=adapt, autocast=False).build(self.base)
            plain.module.train(masked)
            share_masks(plain.module, groups)
            double = exact(plain)
            self._expected[key] = (
                [outputs(plain, x, dy) for x, dy in self.inputs],
                [outputs(double, x.double(), dy.double()) for x, dy in self.inputs],
            )
        return self._expected[key]

    def judgement(self, contender: Contender, layer: Layer) -> Judgement:
        """Whether the contender may be timed, and its largest error beside what is allowed."""
        if contender.terms is None:
            return Judgement()
        reference, truth = self._reference(contender, self._groups(contender, layer))
        layer.module.train(self._masked(contender))
        got = [outputs(layer, x, dy) for x, dy in self.inputs]
        layer.module.train()
        if absent := set(truth[0]) - set(got[0]):
            return Judgement(failure=f"no {', '.join(sorted(absent))}")
        verdicts = []
        for name in truth[0]:
            mine, plain, double = (
                torch.stack([o[name] for o in group]) for group in (got, reference, truth)
            )
            verdicts.append(judge(name, mine, plain, double, self.base.problem.dtype))
        worst = max(verdicts, key=lambda verdict: (bool(verdict.notes), verdict.ratio))
        if not worst.notes and worst.ratio <= contender.allowed:
            return Judgement(worst.ratio)
        wrong = sum(bool(v.notes) or v.ratio > contender.allowed for v in verdicts)
        return Judgement(
            worst.ratio, f"{wrong} of {len(verdicts)} results are wrong, the worst is {worst}"
        )
