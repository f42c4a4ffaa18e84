"""``python -m benchmarks.kernels``: every kernel alone, beside cuBLAS on the same operands.

Each of the products of an adapter is timed three ways where there are three: our kernel with φ in
memory, our kernel that forms φ on chip, and cuBLAS with φ in memory. Beside them stand the base
products, alone and added to what is in y (beta=1), and a copy. Our kernels are judged by the
numeric rule first. Rows have contender "kernel:<name>" and phase "kernel".
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pera_kernels import reference
from pera_kernels.kernels import interpreting
from pera_kernels.terms import TERMS, circular_order, coefficient_count, lane_count
from pera_kernels.testing import Case

from . import options, rows, timing
from .gate import Judgement, compare
from .roofline import Ceilings, Work, speed

__all__ = ["Kernel", "Operands", "kernels"]

SCALE = 0.01
Tensors = tuple[torch.Tensor, ...]


def expansion(rows: torch.Tensor, h: torch.Tensor | None, case: Case) -> torch.Tensor:
    """c ∘ φ ``(lanes, N)`` of rows ``(r, N)`` in the kernels' circular order, unused lanes zero."""
    phi = reference.expand(rows, case.terms)
    if (c := reference.coefficients(h, case.r)) is not None:
        phi = phi * c.unsqueeze(1)
    products = case.r + circular_order(case.r, case.terms, rows.device)
    order = torch.cat([torch.arange(case.r, device=rows.device), products])
    return F.pad(phi[order], (0, 0, 0, lane_count(case.r, case.terms) - len(order)))


class Operands:
    """The tensors of one layer with T tokens and square shape: x, dy and y ``(T, N)``, the weight,
    the factors, their expansions, and u ``(T, lanes)``.
    """

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(seed)
        dtype, factor = case.dtype, case.factor_dtype

        def normal(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(std).to(of)

        T, N, r, lanes = case.T, case.N, case.r, lane_count(case.r, case.terms)
        self.x, self.dy, self.y = normal(T, N), normal(T, N), normal(T, N)
        self.weight, self.bias = normal(N, N, std=N**-0.5), normal(N)
        self.A, self.B = normal(r, N, std=0.5, of=factor), normal(N, r, std=0.5, of=factor)
        L = coefficient_count(r, case.terms)
        self.h = normal(L, of=factor) if L else None
        self.phi_a = expansion(self.A, None, case).to(dtype)
        self.phi_b = expansion(self.B.t(), self.h, case).to(dtype)
        self.u, self.out = normal(T, lanes), torch.empty(T, lanes, dtype=dtype, device=device)
        self.dA, self.dB = torch.empty_like(self.A), torch.empty_like(self.B)
        self.dh = None if self.h is None else torch.empty_like(self.h)

    def contracted(self, x: torch.Tensor, rows: torch.Tensor, with_dh: bool) -> Tensors:
        """The gradients of rows, and of h, where that of their expansion is uᵀ x."""
        leaves = [rows.double().requires_grad_()]
        h = None if self.h is None else self.h.double()
        if with_dh and h is not None:
            leaves.append(h.requires_grad_())
        phi = expansion(leaves[0], h, self.case)
        return torch.autograd.grad(phi, leaves, self.u.double().t() @ x.double())

    def composed(self) -> Tensors:
        """W0 + ΔW."""
        product = self.phi_b.double().t() @ self.phi_a.double()
        return (self.weight.double() + SCALE * product,)


@dataclass(frozen=True)
class Kernel:
    """One call on its operands, what it has to do, and what it must give in float64.

    ``results`` are the tensors that it writes; where there are none, it returns them.
    """

    call: Callable[[], Any]
    work: Work
    truth: Callable[[], Tensors] | None = None
    results: Tensors = ()


def kernels(o: Operands) -> dict[str, Kernel]:
    """Everything that is timed on these operands; the first one is the measure of a sample."""
    from pera_kernels.kernels.accumulate import accumulate
    from pera_kernels.kernels.compose import compose
    from pera_kernels.kernels.contract import Contraction, contract
    from pera_kernels.kernels.expand import expand
    from pera_kernels.kernels.launch import Factor, in_memory
    from pera_kernels.kernels.project import project
    from pera_kernels.kernels.reduce import sum_partials

    case, size = o.case, o.x.element_size()
    T, N, lanes = case.T, case.N, o.u.shape[1]
    on_y = Work(0, T * N * size)
    base = Work(2 * T * N * N, (2 * T * N + N * N) * size)
    skinny = Work(2 * T * lanes * N, (T * (N + lanes) + lanes * N) * size)
    on_phi = Work(0, 2 * lanes * N * size)

    def factor(rows: torch.Tensor, h: torch.Tensor | None) -> Factor:
        return Factor(rows, h, case.r, case.terms)

    a, b, phi_a = factor(o.A, None), factor(o.B.t(), None), in_memory(o.phi_a)
    a_h, b_h = factor(o.A, o.h), factor(o.B.t(), o.h)

    def linear_first() -> None:
        y = F.linear(o.x, o.weight, o.bias)
        accumulate(y, o.u, o.phi_b, out=y, scale=SCALE)

    def update_first() -> None:
        accumulate(None, o.u, o.phi_b, out=o.y, scale=SCALE)
        o.y.addmm_(o.x, o.weight.t())

    def exact(rows: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
        return expansion(rows.double(), None if h is None else h.double(), case)

    def projected(x: torch.Tensor, phi: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.double() @ phi.double().t(),)

    def update(y: torch.Tensor | None) -> tuple[torch.Tensor]:
        product = SCALE * o.u.double() @ o.phi_b.double()
        return (product if y is None else y.double() + product,)

    found: dict[str, Kernel] = {}

    def add(
        name: str,
        call: Callable[[], Any],
        work: Work,
        truth: Callable[[], Tensors] | None = None,
        *results: torch.Tensor | None,
    ) -> None:
        found[name] = Kernel(call, work, truth, tuple(t for t in results if t is not None))

    add("x W0ᵀ + bias", lambda: F.linear(o.x, o.weight, o.bias), base)
    add("dy W0", lambda: o.dy @ o.weight, base)
    add("y += x W0ᵀ", lambda: o.y.addmm_(o.x, o.weight.t()), base + on_y)
    add("y += dy W0", lambda: o.y.addmm_(o.dy, o.weight), base + on_y)
    add("x W0ᵀ + bias, then += u φ", linear_first, base + skinny + on_y)
    add("u φ, then += x W0ᵀ", update_first, base + skinny + on_y)
    add("copy x to y", lambda: o.y.copy_(o.x), on_y + on_y)

    memory, chip_a, chip_b = (
        functools.partial(project, x, phi, out=o.out, whole=phi is phi_a)
        for x, phi in ((o.x, phi_a), (o.x, a), (o.dy, b))
    )
    add("x φᵀ, φ in memory", memory, skinny, lambda: projected(o.x, o.phi_a), o.out)
    add("x φᵀ, φ(A) on chip", chip_a, skinny, lambda: projected(o.x, exact(o.A)), o.out)
    add("x φᵀ, φ(B) on chip", chip_b, skinny, lambda: projected(o.dy, exact(o.B.t())), o.out)
    add("x φᵀ, cuBLAS", lambda: torch.mm(o.x, o.phi_a.t(), out=o.out), skinny)

    onto, alone = (
        functools.partial(accumulate, y, o.u, o.phi_b, out=o.y, scale=SCALE) for y in (o.y, None)
    )
    add("y += u φ", onto, skinny + on_y, lambda: update(o.y), o.y)
    add("y = u φ", alone, skinny, lambda: update(None), o.y)
    add("y += u φ, cuBLAS", lambda: o.y.addmm_(o.u, o.phi_b, alpha=SCALE), skinny + on_y)
    add("y = u φ, cuBLAS", lambda: torch.mm(o.u, o.phi_b, out=o.y), skinny)

    job_b = Contraction(o.u, o.dy, b_h, o.dB.t(), o.dh, 1.0)
    job_a = Contraction(o.u, o.x, a_h, o.dA, None, 1.0)
    to_b, to_a, to_both = (
        functools.partial(contract, jobs) for jobs in ([job_b], [job_a], [job_b, job_a])
    )
    truth_b = functools.partial(o.contracted, o.dy, o.B.t(), with_dh=True)
    truth_a = functools.partial(o.contracted, o.x, o.A, with_dh=False)
    add("dφ(B) to dB and dh", to_b, skinny, truth_b, o.dB.t(), o.dh)
    add("dφ(A) to dA", to_a, skinny, truth_a, o.dA)
    add("both in one launch", to_both, skinny + skinny)
    add("dφ, cuBLAS", lambda: o.u.t() @ o.dy, skinny)
    if o.x.is_cuda:
        single = functools.partial(torch.mm, o.u.t(), o.dy, out_dtype=torch.float32)
        add("dφ, cuBLAS, float32 out", single, skinny)
    if sums := to_b():
        read = sum(pending.partial.nbytes for pending in sums)
        add("sum the parts of dB and dh", lambda: sum_partials(sums), Work(0, read))

    both = functools.partial(expand, [b_h, a], dtype=case.dtype)
    add("expand both", both, on_phi, lambda: (exact(o.B.t(), o.h), exact(o.A)))
    composed = functools.partial(compose, o.weight, o.phi_b, o.phi_a, scale=SCALE)
    add("W0 + ΔW", composed, Work(2 * lanes * N * N, 2 * N * N * size) + on_phi, o.composed)
    return found


def judgement(kernel: Kernel, dtype: torch.dtype) -> Judgement:
    """The numeric rule on one call; its reference is the truth, rounded."""
    from pera_kernels.kernels.reduce import Sum, sum_partials

    if kernel.truth is None:
        return Judgement()
    truth = kernel.truth()
    try:
        returned = kernel.call()
    except Exception as error:
        return Judgement.of(error)
    found = returned if isinstance(returned, (list, tuple)) else [returned]
    # What was split is complete after these sums.
    sum_partials([pending for pending in found if isinstance(pending, Sum)])
    got = {f"result {number}": own for number, own in enumerate(kernel.results or found)}
    exact = dict(zip(got, truth, strict=True))
    rounded = {name: own.to(got[name].dtype) for name, own in exact.items()}
    return compare([got], [rounded], [exact], dtype)


def measure(
    case: Case, rounds: int, ceilings: Ceilings, environment: rows.Row
) -> Iterator[rows.Row]:
    """The rows of one case: those that failed the rule, then those that were timed."""
    device = ceilings.device
    # The interpreter takes so long that a cache makes no difference.
    touched = case.T * case.N * case.dtype.itemsize
    count = 1 if device.type == "cpu" else timing.set_count(touched, device)
    sets = [kernels(Operands(case, device, seed)) for seed in range(count)]
    judged = {name: judgement(kernel, case.dtype) for name, kernel in sets[0].items()}

    def row(name: str, **measured: Any) -> rows.Row:
        key = {"contender": f"kernel:{name}", "plan": "factored", "phase": "kernel"}
        error = {"error_ratio": judged[name].error_ratio}
        return {**key, **rows.of_case(case), **error, **environment, **measured}

    for name, own in judged.items():
        if own.failure:
            yield row(name, status="failed", note=own.failure)
    calls = {name: [own[name].call for own in sets] for name in sets[0] if not judged[name].failure}
    for name, timed in timing.time_calls(calls, rounds, device).items():
        achieved = speed(sets[0][name].work, timed.median, ceilings, case.dtype)
        yield row(name, **timed.keys(), **achieved)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Time every kernel alone, beside cuBLAS, the base products and a copy.",
        allow_abbrev=False,
    )
    add, list_of = made.add_argument, options.list_of
    add("--device", type=options.device, default="auto", help="auto, cuda, cuda:N, cpu (dry run)")
    add("--T", type=list_of(int), default=(16384, 4096, 512), help="tokens (16384,4096,512)")
    add("--size", type=int, default=4096, help="in and out features (4096)")
    add("--rank", type=int, default=16, help="rank (16)")
    add("--terms", choices=TERMS, default="full", help=", ".join(TERMS))
    add(
        "--dtype",
        choices=tuple(rows.DTYPES),
        default="bfloat16+float32",
        help=", ".join(rows.DTYPES),
    )
    add("--rounds", type=int, default=8, help="turns of every kernel (8; 2 in a dry run)")
    add("--budget", type=int, metavar="SECONDS", help="start no case that would end later")
    add("--out", type=Path, help="append rows here (benchmarks/results/<device>.jsonl)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    given = parser().parse_args(arguments)
    device = given.device
    if device.type == "cpu" and not interpreting():
        parser().error("there is no GPU here; TRITON_INTERPRET=1 makes a dry run on the CPU")
    path = given.out or rows.default_file(device)
    environment, ceilings = rows.environment(device), Ceilings(device)
    failed, longest, rounds = False, 0.0, 2 if interpreting() else given.rounds
    dtype, adapter_dtype = rows.DTYPES[given.dtype]
    with timing.place(device):
        for T in given.T:
            start = time.monotonic()
            if given.budget and start - began + longest > given.budget:
                print(f"the budget of {given.budget} s is used up before T={T}")
                break
            case = Case(
                terms=given.terms,
                r=given.rank,
                T=T,
                N=given.size,
                M=given.size,
                dtype=dtype,
                adapter_dtype=adapter_dtype,
            )
            print("\n" + "  ".join(f"{k}={v}" for k, v in rows.of_case(case).items()))
            for row in measure(case, rounds, ceilings, environment):
                rows.append(path, row)
                print(rows.line(row), flush=True)
                failed = failed or row["status"] == "failed"
            longest = max(longest, time.monotonic() - start)
    print(f"\nrows appended to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
