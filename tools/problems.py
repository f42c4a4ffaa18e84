"""Every kernel on the operands of one adapter, by the name of what it computes there.

On the device "meta" launches are only recorded; with random values kernels are judged and timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pera_kernels.kernels import accumulate, compose, contract, expand, ops, project, reduce
from pera_kernels.kernels.launch import NO_DROPOUT, Dropout, Factor, in_memory
from pera_kernels.operands import Base, Factors, Options, Saved
from pera_kernels.terms import Terms, circular_order, coefficient_count, lane_count, pairs

__all__ = ["DTYPES", "FEATURES", "TOKENS", "VARIANTS", "Job", "Operands", "expected", "random_on"]

# Operand dtype and adapter dtype.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}
TOKENS, FEATURES = 8192, 4096
SCALE = 0.5
Outputs = dict[str, torch.Tensor]
Draw = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A variant of a kernel, see VARIANTS, for one adapter on ``T`` tokens, N -> M features."""

    variant: str
    terms: Terms
    r: int
    dtype: str
    T: int = TOKENS
    N: int = FEATURES
    M: int = FEATURES


def meta(*shape: int, of: torch.dtype) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=of, device="meta")


def random_on(device: torch.device, seed: int) -> Draw:
    """Draws normal tensors, always the same ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(of)

    return draw


class Operands:
    """The tensors of one job; ``call`` launches its kernel and returns the outputs by name.

    With ``finish`` outputs that were split are summed, which takes a further launch.
    """

    def __init__(self, job: Job, draw: Draw = meta, *, finish: bool = False) -> None:
        dtype, own = DTYPES[job.dtype]
        r, lanes = job.r, lane_count(job.r, job.terms)
        self.job, self.draw, self.finish = job, partial(draw, of=dtype), finish
        self.x, self.dy = self.draw(job.T, job.N), self.draw(job.T, job.M)
        self.u, self.weight = self.draw(job.T, lanes), self.draw(job.M, job.N)
        self.phi_a, self.phi_b = self.draw(lanes, job.N), self.draw(lanes, job.M)
        A, B = SCALE * draw(r, job.N, of=own), SCALE * draw(job.M, r, of=own)
        h = None if job.terms == "linear" else draw(coefficient_count(r, job.terms), of=own)
        self.adapter = Factors(A, B, h)
        self.a, self.b = (Factor(rows, h, r, job.terms) for rows in (A, B.t()))
        self.dropout = Dropout(0.05, draw(1, of=torch.int64))
        self.partial = draw(4, *self.u.shape, of=torch.float32)

    def call(self) -> Outputs:
        return VARIANTS[self.job.variant](self)

    def expand(self) -> Outputs:
        phi_a, phi_b = expand.expand([self.a, self.b], self._sum(), dtype=self.x.dtype)
        return {"phi_a": phi_a, "phi_b": phi_b}

    def sum(self) -> Outputs:
        sums = [self._sum() for _ in range(3)]
        reduce.sum_partials(sums)
        return {str(number): own.out for number, own in enumerate(sums)}

    def _sum(self) -> reduce.Sum:
        return reduce.Sum(self.partial, torch.empty_like(self.u), *self.u.shape[1:] * 2)

    def project(self, source: str, dropout: bool = False) -> Outputs:
        x = self.dy if source == "B" else self.x
        A, r, terms = self.adapter.A, self.job.r, self.job.terms
        factor = {
            "A": lambda: self.a,
            "B": lambda: self.b,
            "A of 3": lambda: Factor(A, None, r, terms, (A, A)),
            "memory": lambda: in_memory(self.phi_a),
        }[source]()
        u = x.new_empty(len(x), factor.lanes)
        drop = self.dropout if dropout else NO_DROPOUT
        whole = source == "memory"
        pending = project.project(x, factor, out=u, scale=SCALE, dropout=drop, whole=whole)
        if self.finish:
            reduce.sum_partials([] if pending is None else [pending])
        return {"u": u}

    def accumulate(self, dropout: bool = False) -> Outputs:
        y, drop = torch.empty_like(self.x), self.dropout if dropout else NO_DROPOUT
        accumulate.accumulate(self.x, self.u, self.phi_a, out=y, scale=SCALE, dropout=drop)
        return {"y": y}

    def contract(self, *what: str, dropout: bool = False) -> Outputs:
        (A, B, h), drop = self.adapter, self.dropout if dropout else NO_DROPOUT
        operands = {
            "dA": (self.u, self.x, self.a),
            "dB": (self.u, self.dy, self.b),
            # The gradient of ΔW on φ(B) and on φ(A).
            "G to A": (self.phi_b.t(), self.weight, self.a),
            "G to B": (self.phi_a.t(), self.weight.t(), self.b),
        }
        jobs, outputs = [], Outputs()
        for name in what:
            df = torch.empty_like(B).t() if name.endswith("B") else torch.empty_like(A)
            dh = None if h is None or name in ("dA", "G to B") else torch.empty_like(h)
            masks = drop if name == "dA" else NO_DROPOUT
            jobs.append(contract.Contraction(*operands[name], df, dh, SCALE, masks))
            outputs |= {f"df {name}": df} | ({} if dh is None else {f"dh {name}": dh})
        sums = contract.contract(jobs)
        if self.finish:
            reduce.sum_partials(sums)
        return outputs

    def compose(self) -> Outputs:
        return {"w": compose.compose(self.weight, self.phi_b, self.phi_a, scale=SCALE)}

    def layer(self, count: int = 1, plan: str = "factored", keep: str = "u") -> Outputs:
        """A training step of ``count`` layers on one x, as the autograd boundary calls it."""
        options = Options(self.job.terms, SCALE, plan=plan, keep=keep)
        bases, adapters = [Base(self.weight)] * count, [self.adapter] * count
        ys, us = ops.forward(self.x, bases, adapters, None, options)
        u = us[-1] if plan == "factored" and keep == "u" else None
        needs = [True, True, True, self.adapter.h is not None]
        saved = Saved(self.x, u, self.weight, self.adapter, None)
        ops.backward(self.dy, saved, options, needs)
        return {"y": ys[-1]}


VARIANTS: dict[str, Callable[[Operands], Outputs]] = {
    "expand": Operands.expand,
    "sum": Operands.sum,
    "project A": partial(Operands.project, source="A"),
    "project A dropout": partial(Operands.project, source="A", dropout=True),
    "project A of 3": partial(Operands.project, source="A of 3"),
    "project B": partial(Operands.project, source="B"),
    "project expanded": partial(Operands.project, source="memory"),
    "project expanded dropout": partial(Operands.project, source="memory", dropout=True),
    "accumulate": Operands.accumulate,
    "accumulate dropout": partial(Operands.accumulate, dropout=True),
    "contract": lambda own: own.contract("dB", "dA"),
    "contract dropout": lambda own: own.contract("dB", "dA", dropout=True),
    "contract dA": lambda own: own.contract("dA"),
    "contract dB": lambda own: own.contract("dB"),
    "contract G": lambda own: own.contract("G to A") | own.contract("G to B"),
    "compose": Operands.compose,
    "layer": Operands.layer,
    "layer of 3": partial(Operands.layer, count=3),
    "layer that keeps x": partial(Operands.layer, keep="x"),
    "layer composed": partial(Operands.layer, plan="composed"),
}


def expected(own: Operands, dtype: torch.dtype) -> Outputs:
    """The outputs of variants without dropout by their formulas, in ``dtype``, from the same
    rounded operands.
    """
    tensors = (own.x, own.dy, own.u, own.weight, own.phi_a, own.phi_b, *own.adapter[:2])
    x, dy, u, weight, phi_a, phi_b, A, B = (tensor.to(dtype) for tensor in tensors)
    h = None if own.adapter.h is None else own.adapter.h.to(dtype)
    phi: Any = partial(_expansion, job=own.job)

    def gradients(rows: torch.Tensor, dphi: torch.Tensor, *more: torch.Tensor) -> Any:
        return torch.autograd.grad(phi(rows, h), (rows, *more), SCALE * dphi)

    match own.job.variant:
        case "expand":
            return {"phi_a": phi(A, h), "phi_b": phi(B.t(), h)}
        case "project A":
            return {"u": SCALE * x @ phi(A).t()}
        case "project B":
            return {"u": SCALE * dy @ phi(B.t()).t()}
        case "project expanded":
            return {"u": SCALE * x @ phi_a.t()}
        case "accumulate":
            return {"y": x + SCALE * u @ phi_a}
        case "contract":
            assert h is not None, "there is no dh where there are only linear terms"
            (dA,) = gradients(A.detach().requires_grad_(), u.t() @ x)
            h = h.detach().requires_grad_()
            dB, dh = gradients(B.t().detach().requires_grad_(), u.t() @ dy, h)
            return {"df dB": dB, "dh dB": dh, "df dA": dA}
        case "compose":
            return {"w": weight + SCALE * phi_b.t() @ phi_a}
    raise ValueError(f"there is no formula here for {own.job.variant!r}")


def _expansion(rows: torch.Tensor, h: torch.Tensor | None = None, *, job: Job) -> torch.Tensor:
    """c ∘ φ ``(lanes, N)`` in circular order, unused lanes zero, from rows ``(r, N)``."""
    order = circular_order(job.r, job.terms, rows.device)
    first, second = torch.tensor(pairs(job.r, job.terms), device=rows.device)[order].unbind(1)
    products = rows[first] * rows[second]
    if h is not None:
        products = products * h[order].unsqueeze(1)
    phi = torch.cat([rows, products])
    return torch.nn.functional.pad(phi, (0, 0, 0, lane_count(job.r, job.terms) - len(phi)))
