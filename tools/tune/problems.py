"""One kernel on one problem: its operands, a launch, the float64 truth, and how much it has to do.

The problems are those of a layer's forward, which projects x on ``"A"``, and of its backward,
which projects dy on ``"B"`` and contracts to both. Operands live on any device: on "meta" launches
are only recorded, on "cpu" Triton's interpreter runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from pera_kernels import configs
from pera_kernels.configs import Tile
from pera_kernels.terms import Terms, circular_order, coefficient_count, expanded_rank, lane_count
from pera_kernels.terms import pairs as pairs_of

__all__ = ["DTYPES", "Operands", "Problem", "representative", "using"]

# Operand and factor dtype of each class of ``configs.CLASSES``.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "half": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "single": (torch.float32, torch.float32),
}
SCALE = 0.5
# Token counts at which a kernel runs, see ``pera_kernels.plans``.
TOKENS: dict[str, tuple[int, ...]] = {
    "project": (4096, 512, 16),
    "project_expanded": (16384,),
    "accumulate": (4096, 512, 16, 16384),
    "contract": (4096, 512, 16, 16384),
    "compose": (1,),
    "expand": (1,),
}
# Kernels that read a factor, in one of two layouts.
ON_CHIP = ("project", "contract")
# Kernels that read an expansion instead.
FROM_MEMORY = ("project_expanded", "accumulate")


@dataclass(frozen=True)
class Problem:
    """A kernel of ``configs.KERNELS``, or ``"sum"`` of ``parts`` partial results ``(T, lanes)``.

    ``factor`` is the layout: ``"A"`` rows ``(r, N)``, ``"B"`` the transpose of ``(N, r)``.
    """

    kernel: str
    kind: str = "half"
    r: int = 16
    T: int = 4096
    N: int = 4096
    M: int = 4096
    terms: Terms = "full"
    factor: str = "A"
    parts: int = 8

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind][0]

    @property
    def lanes(self) -> int:
        return lane_count(self.r, self.terms)

    def __str__(self) -> str:
        layout = f" {self.factor}" if self.kernel in ON_CHIP else ""
        return f"T={self.T} {self.N}x{self.M} r={self.r} {self.terms}{layout}"

    def flops(self) -> int:
        """Floating-point operations of the live lanes; products that expand a factor included."""
        K, pairs = expanded_rank(self.r, self.terms), coefficient_count(self.r, self.terms)
        if self.kernel == "sum":
            return self.parts * self.T * self.lanes
        if self.kernel == "expand":
            return pairs * (self.N + 2 * self.M)
        if self.kernel == "compose":
            return 2 * K * self.N * self.M + pairs * (self.N + 2 * self.M)
        product = 2 * self.T * K * self.N
        if self.kernel == "contract":
            return product + 4 * pairs * self.N
        return product if self.kernel in FROM_MEMORY else product + pairs * self.N

    def bytes(self) -> int:
        """Compulsory bytes: every operand read once, every result written once."""
        size, factor_size = (dtype.itemsize for dtype in DTYPES[self.kind])
        r, T, N, M, lanes = self.r, self.T, self.N, self.M, self.lanes
        pairs = coefficient_count(r, self.terms)
        if self.kernel == "sum":
            return T * lanes * (4 * self.parts + size)
        if self.kernel == "expand":
            return r * (N + M) * factor_size + pairs * factor_size + lanes * (N + M) * size
        if self.kernel == "compose":
            return 2 * N * M * size + r * (N + M) * factor_size + pairs * factor_size
        rows = lanes * N * size if self.kernel in FROM_MEMORY else r * N * factor_size
        if self.kernel == "accumulate":
            return T * (2 * N + lanes) * size + rows
        read = T * (N + lanes) * size + rows
        return read + rows + 2 * pairs * factor_size if self.kernel == "contract" else read


def representative(kernel: str, kind: str) -> list[Problem]:
    """What a tile is judged by, the most telling problem first."""
    wide = Problem(kernel, kind, N=14336, M=4096)
    if kernel in ("expand", "compose"):
        shapes = [Problem(kernel, kind, r=r, T=1) for r in (16, 4, 32)]
        return [*shapes, Problem(kernel, kind, T=1, N=wide.N)]
    found = []
    for T in TOKENS[kernel]:
        layouts = "AB" if kernel in ON_CHIP else "A"
        found += [Problem(kernel, kind, T=T, factor=layout) for layout in layouts]
        # Forward and backward by turns.
        for number, r in enumerate((4, 32)):
            found.append(Problem(kernel, kind, r=r, T=T, factor=layouts[number % len(layouts)]))
        found.append(Problem(kernel, kind, T=T, N=wide.N))
    return found


@contextmanager
def using(table: str, kernel: str, kind: str, tile: Tile) -> Iterator[None]:
    """Within this context the launchers take ``tile`` for a kernel and class of a table."""
    with mock.patch.dict(configs.load_table(table), {(kernel, kind): tile}):
        configs.tile_for.cache_clear()
        try:
            yield
        finally:
            configs.tile_for.cache_clear()


class Operands:
    """The tensors of one problem on a device; random, from the problem and ``seed`` alone."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device | str,
        *,
        seed: int = 0,
        in_place: bool = True,
    ) -> None:
        """With ``in_place`` an accumulation overwrites its base, as in the layer; it can then not
        be repeated to the same result.
        """
        from pera_kernels import launch

        self.problem = p = problem
        self._device = torch.device(device)
        self._seed, self._drawn = seed, 0
        dtype, factor_dtype = DTYPES[p.kind]
        if p.kernel == "sum":
            self.partial = self._normal(p.parts, p.T, p.lanes, of=torch.float32)
            self.out = self._empty(p.T, p.lanes, of=dtype)
            return
        count = coefficient_count(p.r, p.terms)
        h = None if p.terms == "linear" else self._normal(count, of=factor_dtype)
        if p.kernel in ("expand", "compose"):
            A, B = self._factor("A", p.N), self._factor("B", p.M)
            self.a = launch.Factor(A, None, p.r, p.terms)
            self.b = launch.Factor(B, h, p.r, p.terms)
            if p.kernel == "compose":
                self.base = self._normal(p.M, p.N, of=dtype)
            return
        self.x = self._normal(p.T, p.N, of=dtype)
        self.u = self._normal(p.T, p.lanes, of=dtype)
        self.factor: Any
        if p.kernel in FROM_MEMORY:
            self.factor = launch.Expanded(self._normal(p.lanes, p.N, of=dtype).mul_(0.5))
        else:
            coefficients = None if p.kernel == "project" else h
            self.factor = launch.Factor(self._factor(p.factor, p.N), coefficients, p.r, p.terms)
        if p.kernel == "contract":
            self.df = torch.empty_like(self.factor.rows)
            self.dh = None if h is None else torch.empty_like(h)
        elif p.kernel == "accumulate":
            self.out = self.x if in_place else torch.empty_like(self.x)

    def _empty(self, *shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device=self._device)

    def _normal(self, *shape: int, of: torch.dtype) -> torch.Tensor:
        if self._device.type == "meta":
            return self._empty(*shape, of=of)
        generator = torch.Generator(self._device).manual_seed(1000 * self._seed + self._drawn)
        self._drawn += 1
        return torch.randn(*shape, generator=generator, device=self._device).to(of)

    def _factor(self, layout: str, features: int) -> torch.Tensor:
        r, dtype = self.problem.r, DTYPES[self.problem.kind][1]
        if layout == "A":
            return self._normal(r, features, of=dtype).mul_(0.5)
        return self._normal(features, r, of=dtype).mul_(0.5).t()

    def launch(self) -> Any:
        """Launch the kernel once (``compose``: after the expansion it reads); what came of it."""
        from pera_kernels import launch

        p = self.problem
        if p.kernel == "sum":
            return launch.sum_partials([self._sum()])
        if p.kernel == "expand":
            return launch.expand([self.b, self.a], dtype=p.dtype)
        if p.kernel == "compose":
            return launch.compose(self.base, self.a, self.b, scale=SCALE, dtype=p.dtype)
        if p.kernel == "contract":
            return launch.contract(self.u, self.x, self.factor, df=self.df, dh=self.dh, scale=SCALE)
        if p.kernel.startswith("project"):
            return launch.project(self.x, self.factor, out=self.u)
        return launch.accumulate(self.x, self.u, self.factor, out=self.out, scale=SCALE)

    def _sum(self) -> Any:
        from pera_kernels import launch

        width = self.problem.lanes
        return launch.Sum(self.partial, self.out, width, self.out.stride(0))

    def outputs(self) -> dict[str, torch.Tensor]:
        """Launch, add what was split, and copy the results by name."""
        from pera_kernels import launch

        p, result = self.problem, self.launch()
        if p.kernel == "expand":
            return {"phi_b": result[0].rows, "phi_a": result[1].rows}
        if p.kernel == "compose":
            return {"w": result}
        if p.kernel == "contract":
            launch.sum_partials(result)
            named = {"df": self.df, "dh": self.dh}
            return {name: t.clone() for name, t in named.items() if t is not None}
        if p.kernel.startswith("project"):
            launch.sum_partials([] if result is None else [result])
            return {"u": self.u.clone()}
        return {"out": self.out.clone()}

    def truth(self) -> dict[str, torch.Tensor]:
        """The same in float64, from the same rounded operands."""
        p = self.problem
        if p.kernel == "sum":
            return {"out": self.partial.double().sum(0)}
        if p.kernel in ("expand", "compose"):
            phi_b, phi_a = _expanded(self.b), _expanded(self.a)
            if p.kernel == "expand":
                return {"phi_b": phi_b, "phi_a": phi_a}
            return {"w": self.base.double() + SCALE * phi_b.t() @ phi_a}
        x, u = self.x.double(), self.u.double()
        if p.kernel == "contract":
            return self._contracted(SCALE * u.t() @ x)
        phi = _expanded(self.factor) if p.kernel in ON_CHIP else self.factor.rows.double()
        if p.kernel.startswith("project"):
            return {"u": x @ phi.t()}
        return {"out": x + SCALE * u @ phi}

    def _contracted(self, dphi: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.factor.rows.double().requires_grad_()
        h = None if self.factor.h is None else self.factor.h.double().requires_grad_()
        phi = _expansion(rows, h, self.problem.r, self.problem.terms)
        leaves = {"df": rows} if h is None else {"df": rows, "dh": h}
        gradients = torch.autograd.grad(phi, list(leaves.values()), dphi)
        return dict(zip(leaves, gradients, strict=True))


def _expanded(factor: Any) -> torch.Tensor:
    h = None if factor.h is None else factor.h.double()
    return _expansion(factor.rows.double(), h, factor.r, factor.terms)


def _expansion(rows: torch.Tensor, h: torch.Tensor | None, r: int, terms: Terms) -> torch.Tensor:
    """c ∘ φ ``(lanes, N)`` in circular order, unused lanes zero, from rows ``(r, N)``."""
    order = list(circular_order(r, terms))
    both = [pairs_of(r, terms)[position] for position in order]
    products = rows[[i for i, _ in both]] * rows[[j for _, j in both]]
    if h is not None:
        products = products * h[order].unsqueeze(1)
    phi = torch.cat([rows, products])
    unused = lane_count(r, terms) - phi.shape[0]
    return torch.cat([phi, phi.new_zeros(unused, phi.shape[1])])
