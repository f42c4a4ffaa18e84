"""The measurement: a fixed matrix W of known singular values, fitted by φ(B) diag(1, h) φ(A).

LoRA's best error is known: the tail of the singular values. The others are found by Adam on A, B
and h at once, from several starts. W is scaled so that A and B start with entries of size 1: then
rates need no tuning, and h is the size of a product beside that of a linear term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pera_kernels.terms import Terms, coefficient_count, offsets

__all__ = ["Problem", "extra_ranks", "fit", "phi", "spectrum", "tail"]

# Adam's rate for A, B and h, and the share of the steps in which it rises.
RATE, WARMUP = 0.1, 0.05
# The size of A and B where a start is random.
RANDOM_START = 0.3


@dataclass(frozen=True)
class Problem:
    """What is fitted: an (m, n) matrix of a named spectrum, by an adapter of rank r."""

    m: int
    n: int
    r: int
    spectrum: str
    terms: Terms
    # Of random singular vectors: one target each.
    seeds: int = 3
    # How far a start lies from the truncated singular value decomposition; infinite: it is random.
    starts: tuple[float, ...] = (0.1, 0.5)
    steps: int = 2000


def spectrum(name: str, count: int) -> torch.Tensor:
    """Singular values, in falling order: of "0.5" they are k^-0.5, "gaussian" are those of a
    square matrix of independent normal entries; "exponential" and "spiked" are neither.
    """
    k = torch.arange(1, count + 1, dtype=torch.float64)
    if name == "exponential":
        return torch.exp(-8 * k / count)
    if name not in ("gaussian", "spiked"):
        return k ** -float(name)
    # Quantiles of the quarter-circle law, by bisection.
    low, high = torch.zeros_like(k), torch.full_like(k, 2.0)
    for _ in range(50):
        x = (low + high) / 2
        below = (x * (1 - x * x / 4).sqrt() + 2 * torch.asin(x / 2)) / math.pi
        wanted = 1 - (k - 0.5) / count
        low, high = torch.where(below < wanted, x, low), torch.where(below < wanted, high, x)
    # Four directions carry half of the energy.
    return torch.where(k <= 4, count**0.5 / 2, low) if name == "spiked" else low


def tail(singular_values: torch.Tensor) -> torch.Tensor:
    """LoRA's relative error ‖W - BA‖² / ‖W‖² at every rank from 0 to full."""
    energy = singular_values.double().square()
    beyond = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([beyond, beyond.new_zeros(1)]) / energy.sum()


def extra_ranks(error: float, singular_values: torch.Tensor, r: int) -> float:
    """How many ranks more than r LoRA needs for this error, between two ranks interpolated."""
    errors = tail(singular_values)
    k = int((errors > error).sum())
    if k == 0:
        return float(-r)
    above, below = float(errors[k - 1]), float(errors[k])
    return k - 1 + (above - error) / (above - below) - r


def phi(factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    """φ of factors (..., r, n), in the circular order of the kernels."""
    r, blocks = factor.shape[-2], [factor]
    for d in offsets(r, terms):
        products = factor * factor.roll(-d, -2)
        blocks.append(products[..., : r // 2, :] if d > 0 and 2 * d == r else products)
    return torch.cat(blocks, -2)


def fit(problem: Problem) -> list[dict[str, Any]]:
    """One row for each seed: the best of its starts, and what every start came to."""
    m, n, r, terms = problem.m, problem.n, problem.r, problem.terms
    sigma = spectrum(problem.spectrum, min(m, n))
    sigma = sigma * (m * n) ** 0.5 / sigma[:r].mean()
    W, A, B = (torch.cat(parts) for parts in zip(*_begin(problem, sigma), strict=True))
    h = torch.zeros(len(W), coefficient_count(r, terms))
    for parameter in (A, B, h):
        parameter.requires_grad_()
    optimizer = torch.optim.Adam([A, B, h], RATE, betas=(0.9, 0.99), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=problem.steps, pct_start=WARMUP, cycle_momentum=False
    )
    for _ in range(problem.steps):
        optimizer.zero_grad()
        ((_update(A, B, h, terms) - W).square().sum() / n).backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        update, linear = _update(A, B, h, terms), B.mT @ A
        error = _energy(update - W) / _energy(W)
        share = (_energy(update - linear) / _energy(linear)).sqrt()
        sizes = _sizes(A, B, h, terms)
    rows, count = [], len(problem.starts)
    for seed in range(problem.seeds):
        mine = slice(seed * count, (seed + 1) * count)
        best = int(error[mine].argmin()) + mine.start
        rows.append(
            {
                **{"m": m, "n": n, "r": r, "spectrum": problem.spectrum, "terms": terms},
                **{"seed": seed, "steps": problem.steps},
                "error": float(error[best]),
                "worth": extra_ranks(float(error[best]), sigma, r),
                # ‖ΔW - BA‖ / ‖BA‖
                "share": float(share[best]),
                **{name: own[best] for name, own in sizes.items()},
                "worths": [extra_ranks(float(e), sigma, r) for e in error[mine]],
            }
        )
    return rows


def _begin(problem: Problem, sigma: torch.Tensor) -> Any:
    """W, A, B of each seed, stacked over its starts."""
    m, n, r = problem.m, problem.n, problem.r
    for seed in range(problem.seeds):
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(m, len(sigma), generator=generator))[0]
        V = torch.linalg.qr(torch.randn(n, len(sigma), generator=generator))[0]
        root = sigma[:r].float().sqrt()[:, None]
        # Of one size: what a row of A gains, the column of B loses.
        balance = (n / m) ** 0.25
        As, Bs = [], []
        for noise in problem.starts:
            a, b = (torch.randn(r, size, generator=generator) for size in (n, m))
            if noise == math.inf:
                As.append(RANDOM_START * a)
                Bs.append(RANDOM_START * b)
            else:
                As.append(V[:, :r].T * root * balance + noise * a)
                Bs.append(U[:, :r].T * root / balance + noise * b)
        W = (U * sigma.float()) @ V.T
        yield W.expand(len(As), -1, -1), torch.stack(As), torch.stack(Bs)


def _update(A: torch.Tensor, B: torch.Tensor, h: torch.Tensor, terms: Terms) -> torch.Tensor:
    """ΔW = φ(B) diag(1, h) φ(A), of every problem; B is (..., r, m) here."""
    c = torch.cat([h.new_ones(*h.shape[:-1], A.shape[-2]), h], -1)
    return (phi(B, terms) * c[..., None]).mT @ phi(A, terms)


def _sizes(A: torch.Tensor, B: torch.Tensor, h: torch.Tensor, terms: Terms) -> Any:
    """Quantiles (10 %, 50 %, 90 %) of |h| in two units in which it has no scale of its own: times
    rms(A) rms(B), one number for all pairs, and times s_i s_j with s_i² = rms(a_i) rms(b_i).
    """
    if terms == "linear":
        return {}
    rows = (A.square().mean(-1) * B.square().mean(-1)).sqrt()
    layer = (A.square().mean((-1, -2)) * B.square().mean((-1, -2))).sqrt()
    pairs = phi(rows.sqrt()[..., None], terms)[..., A.shape[-2] :, 0]
    units = {"h_layer": h * layer[:, None], "h_pair": h * pairs}
    at = torch.tensor([0.1, 0.5, 0.9])
    return {name: own.abs().quantile(at, -1).T.tolist() for name, own in units.items()}


def _energy(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.double().square().sum((-1, -2))
