"""The ``torch`` backend: the formulas of the paper and of their gradients in plain operators.

On any device and in any floating dtype, without (R, R, ·) temporaries. The functions have the
signatures of those in ``pera_kernels.kernels.ops``. As in the kernels and in the reference,
coefficients multiply φ(B) (φ(A) in dx) in at least float32, before the one rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .dropout import keep_mask, keep_scale
from .operands import Base, Factors, Options, Saved
from .terms import Terms, pair_rows

__all__ = ["backward", "composes", "delta_backward", "delta_forward", "forward"]

# A library sums a product of so few rows or columns lane by lane, one that is larger in blocks.
FEW_ROWS = 24
# So it is given so many lanes at a time.
BLOCK_LANES = 16
# What is summed over is written out in blocks of so many elements.
BLOCK_ELEMENTS = 2**17
# Factors with so few elements cost calls, not traffic.
FEW_ELEMENTS = 2**13

# Composing W0 + ΔW takes 2 M N K operations where a factored pass takes 2 T (N + M) K. A training
# step does two compositions and saves one pass of three, so by operations it pays from
# T (N + M) = 2 M N on; an evaluation pays earlier. Measured in float32 at 1024² and 2048²
# (benchmarks/results/composed-cpu.jsonl): a step is even or a little slower at 2 and not slower
# from 3 on. With a smaller expanded rank little is gained.
COMPOSED_RATIO = 3.0
COMPOSED_LANES = 64


def composes(x: torch.Tensor, weight: torch.Tensor, K: int) -> bool:
    """Whether ``plan="auto"`` composes: on a CPU in float32 and float64 (half precision would lose
    entries of ΔW), where there are so many tokens that it is faster.
    """
    (M, N), T = weight.shape, x.shape[:-1].numel()
    exact = x.dtype in (torch.float32, torch.float64) and weight.dtype == x.dtype
    on_cpu = x.device.type == "cpu"
    return on_cpu and exact and K >= COMPOSED_LANES and T * (N + M) >= COMPOSED_RATIO * M * N


def forward(
    x: torch.Tensor,
    bases: Sequence[Base],
    adapters: Sequence[Factors],
    seed: torch.Tensor | None,
    options: Options,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y ``(T, M)`` and u ``(T, K)`` of each of the layers that share x.

    They have one rank. Dropout and a composed plan, whose u is empty, are for one layer alone.
    """
    ys, us, kept = [], [], keep_scale(options.dropout_p)
    dropped = None if options.plan == "composed" else _dropped(x, seed, options)
    for base, adapter in zip(bases, adapters, strict=True):
        if dropped is None:
            assert base.weight is not None
            ys.append(F.linear(x, _composed(base.weight, adapter, options), base.bias))
            us.append(x.new_empty(0))
            continue
        y = _output(x, base)
        phi_A, phi_B = _rounded(adapter, options.terms, x.dtype)
        u = scaled_product(dropped, phi_A.t(), kept)
        _add_product(y, u, phi_B, options.scale)
        ys.append(y)
        us.append(u)
    return ys, us


def backward(
    dy: torch.Tensor, saved: Saved, options: Options, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dA, dB, dh) of one layer, those of ``needs``, from dy ``(T, M)``.

    dx is the adapter's part alone where there is no dense weight.
    """
    x, u, weight, adapter, seed = saved
    (A, B, h), terms = adapter, options.terms
    need_x, need_A, need_B, need_h = needs
    composed, kept = options.plan == "composed", keep_scale(options.dropout_p)
    dx = dA = dB = dh = None
    if need_x and weight is not None:
        dx = dy @ (_composed(weight, adapter, options) if composed else weight)
    dropped = None if x is None else _dropped(x, seed, options)
    phi_A, phi_B = _expanded(adapter, terms)
    if (need_x and not composed) or need_A:
        v = scaled_product(dy, phi_B.to(dy.dtype).t(), options.scale * kept)
    if need_B or need_h:
        if u is None:
            assert dropped is not None
            rows = expand(A, terms) if phi_A is None else phi_A
            u = scaled_product(dropped, rows.to(dy.dtype).t(), kept)
            del rows
        dphi_B = scaled_product(u.t(), dy, options.scale)
        dB, dh = contract(dphi_B, phi_B, h, terms, need_h)
        dB = dB.t().to(B.dtype).contiguous()
        del dphi_B
    del phi_B
    phi_A = expand(A, terms) if phi_A is None else phi_A
    if need_A:
        assert dropped is not None
        dA = contract(v.t() @ dropped, phi_A, h, terms)[0].to(A.dtype)
    if need_x and not composed:
        phi_A = weigh(phi_A, h).to(dy.dtype)
        if dx is not None and options.dropout_p == 0.0:
            _add_product(dx, v, phi_A, 1.0)
        else:
            part = _dropped(product(v, phi_A), seed, options)
            dx = part if dx is None else dx.add_(part)
    return dx, dA, dB, dh


def delta_forward(adapter: Factors, options: Options) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    phi_A, phi_B = _rounded(adapter, options.terms, adapter.A.dtype)
    # Not in place: torch 2.8 refuses to trace that for what a Function returns.
    return product(phi_B.t(), phi_A) * options.scale


def delta_backward(
    G: torch.Tensor, adapter: Factors, options: Options, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    (A, B, h), terms = adapter, options.terms
    need_A, need_B, need_h = needs
    dA = dB = dh = None
    phi_A, phi_B = _expanded(adapter, terms)
    phi_A = expand(A, terms) if phi_A is None else phi_A
    if need_A or need_h:
        dphi_A = scaled_product(phi_B.to(G.dtype), G, options.scale)
        dA, dh = contract(dphi_A, phi_A, h, terms, need_h)
        dA = dA.to(A.dtype)
    if need_B:
        dphi_B = scaled_product(phi_A.to(G.dtype), G.t(), options.scale)
        dB = contract(dphi_B, phi_B, h, terms)[0].t().to(B.dtype).contiguous()
    return dA, dB, dh


def _expanded(adapter: Factors, terms: Terms) -> tuple[torch.Tensor | None, torch.Tensor]:
    """φ(A) ``(K, N)`` and φ(B)ᵀ ``(K, M)`` from one expansion, which saves calls. φ(A) is None of
    large factors: made when φ(B) is done with, it saves memory.
    """
    A, B = adapter.A, adapter.B.t()
    if A.numel() + B.numel() > FEW_ELEMENTS:
        return None, expand(B, terms)
    phi = expand(torch.cat([A, B], 1), terms)
    return phi[:, : A.shape[1]], phi[:, A.shape[1] :]


def _rounded(
    adapter: Factors, terms: Terms, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(A) ``(K, N)`` and c ∘ φ(B)ᵀ ``(K, M)`` in ``dtype``."""
    phi_A, phi_B = _expanded(adapter, terms)
    phi_B = weigh(phi_B, adapter.h).to(dtype)
    phi_A = expand(adapter.A, terms) if phi_A is None else phi_A
    return phi_A.to(dtype), phi_B


def expand(factor: torch.Tensor, terms: Terms) -> torch.Tensor:
    """φ ``(K, C)`` of a factor ``(R, C)`` in the order of ``h`` (Eq. 2, 3), in at least float32."""
    rows = factor.to(_at_least_float32(factor.dtype))
    if terms == "linear":
        return rows
    # The transpose of B is strided: what follows reads whole rows many times.
    rows = rows.contiguous()
    R, index = rows.shape[0], _indices(rows.shape[0], terms, rows.device)
    phi = rows.index_select(0, index.first)
    for products, second in _blocks(rows.shape[1], phi[R:], index.second, dim=0):
        products.mul_(rows.index_select(0, second))
    return phi


def weigh(phi: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """φ with its products times ``c (L,)``, in place."""
    if c is not None:
        phi[phi.shape[0] - c.shape[0] :].mul_(c.unsqueeze(1))
    return phi


def contract(
    dphi: torch.Tensor,
    phi: torch.Tensor,
    h: torch.Tensor | None,
    terms: Terms,
    need_h: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """df ``(R, C)`` of a factor from dφ ``(K, C)``, which may be overwritten, and φ, and dh:

        df_i  = dφ_i + Σ_j h_ij dφ_ij ∘ f_j        a square counts twice
        dh_ij = Σ dφ_ij ∘ f_i ∘ f_j

    df is in the dtype of φ.
    """
    if h is None or h.shape[0] == 0:
        return dphi.to(phi.dtype), None if h is None else h.new_empty(0)
    R, dfs, dhs = phi.shape[0] - h.shape[0], [], []
    index = _indices(R, terms, phi.device)
    c = (h.to(phi.dtype) * index.counts).unsqueeze(1)
    for block, own in _blocks(R * R, dphi, phi):
        block = block.to(phi.dtype)
        rows, products = own[:R], block[R:]
        if need_h:
            dhs.append((products * own[R:]).sum(1))
        products.mul_(c)
        if terms == "square":
            dfs.append(block[:R] + products.mul_(rows))
            continue
        products = products.index_select(0, index.lanes).view(R, R, -1)
        if terms == "cross":
            products.diagonal().zero_()
        dfs.append(block[:R] + products.mul_(rows).sum(1))
    dh = reduce(torch.add, dhs).to(h.dtype) if need_h else None
    return dfs[0] if len(dfs) == 1 else torch.cat(dfs, 1), dh


def _blocks(
    length: int, *tensors: torch.Tensor, dim: int = 1
) -> Iterable[tuple[torch.Tensor, ...]]:
    """The tensors in blocks along ``dim`` of as many lines of ``length`` as stay in a cache. For a
    compiler, which writes less out, there is one.
    """
    count = max(1, BLOCK_ELEMENTS // max(1, length))
    if tensors[0].shape[dim] <= count or torch.compiler.is_compiling():
        return [tensors]
    return zip(*(t.split(count, dim) for t in tensors), strict=True)


class Indices(NamedTuple):
    """Of which rows the lanes of φ are products, and where a row stands in them."""

    # The row of a linear lane, i of a product (K,); j of a product (L,).
    first: torch.Tensor
    second: torch.Tensor
    # The product of any two rows (R * R,); how often a product counts in df (L,).
    lanes: torch.Tensor
    counts: torch.Tensor


def _indices(R: int, terms: Terms, device: torch.device) -> Indices:
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    # What is made on a GPU may be part of a graph that is captured, or of one stream.
    return _new_indices(R, terms, device) if traced or device.type != "cpu" else _kept(R, terms)


@lru_cache(maxsize=256)
def _kept(R: int, terms: Terms) -> Indices:
    with torch.inference_mode(False):
        return _new_indices(R, terms, torch.device("cpu"))


def _new_indices(R: int, terms: Terms, device: torch.device) -> Indices:
    i, j = pair_rows(R, terms, device)
    rows, lanes = torch.arange(R, device=device), i.new_zeros(R, R)
    lanes[i, j] = lanes[j, i] = torch.arange(i.shape[0], device=device)
    return Indices(torch.cat([rows, i]), j, lanes.view(-1), 1 + (i == j))


def scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """s a b, scaled before it is rounded: a small product would underflow in float16."""
    if scale == 1.0:
        return a @ b
    return torch.addmm(a.new_empty(b.shape[1]), a, b, beta=0.0, alpha=scale)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b ``(T, C)``, summed over K lanes in blocks however few T or C are."""
    (T, K), C = a.shape, b.shape[1]
    blocks = K // BLOCK_LANES
    if blocks < 2 or not _summed_lane_by_lane((T, C), a.dtype):
        return a @ b
    split = blocks * BLOCK_LANES
    parts = torch.bmm(
        a[:, :split].unflatten(1, (blocks, BLOCK_LANES)).transpose(0, 1),
        b[:split].unflatten(0, (blocks, BLOCK_LANES)),
    )
    out = parts.sum(0)
    return out if split == K else out + a[:, split:] @ b[split:]


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """out + s a b, in place. float16 rounds the product, then s times it, as the reference does."""
    if out.dtype == torch.float16:
        return out.add_(_own(a @ b).mul_(scale))
    # An update onto a far larger base would be rounded at the base's size once for every lane where
    # the library sums in place: at few rows, and in float64 at any shape on some processors.
    if out.dtype == torch.float64 or _summed_lane_by_lane(out.shape, out.dtype):
        return out.add_(product(a, b), alpha=scale)
    return out.addmm_(a, b, alpha=scale)


def _summed_lane_by_lane(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the rounding errors of such a product grow with every lane. Those of half precision
    are far below its own rounding. An exported program takes any number of rows: as for many.
    """
    if torch.compiler.is_exporting():
        return False
    return min(shape) <= FEW_ROWS and dtype == _at_least_float32(dtype)


def _composed(weight: torch.Tensor, adapter: Factors, options: Options) -> torch.Tensor:
    """W0 + ΔW ``(M, N)`` in the weight's dtype."""
    phi_A, phi_B = _rounded(adapter, options.terms, weight.dtype)
    return _add_product(weight.clone(), phi_B.t(), phi_A, options.scale)


def _output(x: torch.Tensor, base: Base) -> torch.Tensor:
    """The base's output ``(T, M)`` in new contiguous memory, which the update is added to."""
    if base.weight is not None:
        return _own(F.linear(x, base.weight, base.bias).contiguous())
    assert base.out is not None
    return base.out.clone(memory_format=torch.contiguous_format)


def _own(product: torch.Tensor) -> torch.Tensor:
    """A product that may be changed in place: a copy where a dispatch mode has seen it, as a
    selective checkpoint keeps products for its second forward.
    """
    seen = not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()
    return product.clone() if seen else product


def _dropped(x: torch.Tensor, seed: torch.Tensor | None, options: Options) -> torch.Tensor:
    """x ``(T, N)`` with the dropped elements zero; the factor 1 / (1 - p) is left to others."""
    if options.dropout_p == 0.0 or seed is None:
        return x
    return x.masked_fill(~keep_mask(seed, x.shape[0], x.shape[1], options.dropout_p), 0.0)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
