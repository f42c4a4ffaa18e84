"""The ``torch`` backend: the formulas of the paper and of their gradients in plain operators.

On any device and in any floating dtype, without (R, R, ·) temporaries. The functions have the
signatures of those in ``pera_kernels.kernels.ops``. As in the kernels and in the reference,
coefficients multiply φ(B) (φ(A) in dx) in at least float32, before the one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .dropout import keep_mask, keep_scale
from .operands import Base, Factors, Options, Saved
from .terms import Terms, circular_order, expanded_rank, offsets

__all__ = ["backward", "composes", "delta_backward", "delta_forward", "forward"]

# A library sums a product of so few rows or columns lane by lane, one that is larger in blocks.
FEW_ROWS = 24
# So it is given so many lanes at a time.
BLOCK_LANES = 16

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
    for base, (A, B, h) in zip(bases, adapters, strict=True):
        if dropped is None:
            assert base.weight is not None
            weight = _composed(base.weight, Factors(A, B, h), options)
            ys.append(F.linear(x, weight, base.bias))
            us.append(x.new_empty(0))
            continue
        y = _output(x, base)
        u = scaled_product(dropped, expand(A, options.terms, x.dtype).t(), kept)
        phi_B = expand(B.t(), options.terms, x.dtype, coefficients(h, A.shape[0], options.terms))
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
    (A, B, h), terms, scale = adapter, options.terms, options.scale
    need_x, need_A, need_B, need_h = needs
    c, kept = coefficients(h, A.shape[0], options.terms), keep_scale(options.dropout_p)
    composed = options.plan == "composed"
    dx = dA = dB = dh = None
    if need_x and weight is not None:
        dx = dy @ (_composed(weight, adapter, options) if composed else weight)
    dropped = None if x is None else _dropped(x, seed, options)
    if (need_x and not composed) or need_A:
        v = scaled_product(dy, expand(B.t(), terms, dy.dtype).t(), scale * kept)
    if need_x and not composed:
        phi_A = expand(A, terms, dy.dtype, c)
        if dx is not None and options.dropout_p == 0.0:
            _add_product(dx, v, phi_A, 1.0)
        else:
            part = _dropped(product(v, phi_A), seed, options)
            dx = part if dx is None else dx.add_(part)
    if need_A:
        assert dropped is not None
        dA, _ = contract(v.t() @ dropped, A, terms, c)
    if need_B or need_h:
        if u is None:
            assert dropped is not None
            u = scaled_product(dropped, expand(A, terms, dy.dtype).t(), kept)
        dB, dh = contract(scaled_product(u.t(), dy, scale), B.t(), terms, c, h if need_h else None)
        dB = dB.t().contiguous()
    return dx, dA, dB, dh


def delta_forward(adapter: Factors, options: Options) -> torch.Tensor:
    """ΔW ``(M, N)`` in the dtype of A."""
    A, B, h = adapter
    phi_B = expand(B.t(), options.terms, A.dtype, coefficients(h, A.shape[0], options.terms))
    # Not in place: torch 2.8 refuses to trace that for what a Function returns.
    return product(phi_B.t(), expand(A, options.terms, A.dtype)) * options.scale


def delta_backward(
    G: torch.Tensor, adapter: Factors, options: Options, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """(dA, dB, dh), those of ``needs``, from the gradient G ``(M, N)`` of ΔW."""
    (A, B, h), terms = adapter, options.terms
    need_A, need_B, need_h = needs
    dA = dB = dh = None
    c = coefficients(h, A.shape[0], terms)
    if need_A or need_h:
        dphi_A = scaled_product(expand(B.t(), terms, G.dtype), G, options.scale)
        dA, dh = contract(dphi_A, A, terms, c, h if need_h else None)
    if need_B:
        dphi_B = scaled_product(expand(A, terms, G.dtype), G.t(), options.scale)
        dB, _ = contract(dphi_B, B.t(), terms, c)
        dB = dB.t().contiguous()
    return dA, dB, dh


def coefficients(h: torch.Tensor | None, R: int, terms: Terms) -> torch.Tensor | None:
    """c = (1, h) ``(K,)`` in circular order and at least float32; None where there is no h."""
    if h is None:
        return None
    h = h.to(_at_least_float32(h.dtype))
    return torch.cat([h.new_ones(R), h.index_select(0, circular_order(R, terms, h.device))])


def expand(
    factor: torch.Tensor, terms: Terms, dtype: torch.dtype, c: torch.Tensor | None = None
) -> torch.Tensor:
    """φ(factor) ``(K, C)`` of a factor ``(R, C)`` in circular order (Eq. 2, 3), times ``c (K,)``
    if given; products are rounded once to ``dtype``.
    """
    R, kept = factor.shape[0], offsets(factor.shape[0], terms)
    if not kept:
        return factor.to(dtype)
    # A single product of equal dtypes is rounded once by PyTorch itself.
    work = dtype if factor.dtype == dtype and c is None else _at_least_float32(factor.dtype)
    rows = factor.to(work)
    wrapped = torch.cat([rows, rows[: kept.stop - 1]])
    rows = wrapped[:R]
    # The partner of row l at the circular offset d is row (l + d) mod R: R rows from row d on.
    partners = wrapped[kept.start :].unfold(0, R, 1).transpose(1, 2)
    phi = torch.cat([rows.unsqueeze(0), partners])
    phi[1:].mul_(rows)
    # The last offset of an even rank has half as many pairs.
    phi = phi.flatten(0, 1)[: expanded_rank(R, terms)]
    return (phi if c is None else phi.mul_(c.unsqueeze(1))).to(dtype)


def contract(
    dphi: torch.Tensor,
    factor: torch.Tensor,
    terms: Terms,
    c: torch.Tensor | None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """df ``(R, C)`` of a factor ``(R, C)`` from dφ ``(K, C)``, and dh where ``h`` is given:

        df_i  = dφ_i + Σ_j c_ij dφ_ij ∘ f_j        a square counts twice
        dh_ij = Σ dφ_ij ∘ f_i ∘ f_j

    Lane l of the circular offset d adds to the rows l and l + d. At least float32 inside.
    """
    R, kept = factor.shape[0], offsets(factor.shape[0], terms)
    work = _at_least_float32(dphi.dtype)
    if not kept:
        return dphi.to(factor.dtype), None if h is None else h.new_empty(0)
    # The transpose of B is strided: what follows reads it many times.
    rows, dphi = factor.to(work).contiguous(), dphi.to(work)
    dh = None
    if h is not None:
        products = (dphi[R:] * expand(rows, terms, work)[R:]).sum(1)
        order = circular_order(R, terms, h.device)
        dh = torch.empty_like(h).index_copy(0, order, products.to(h.dtype))
    if c is not None:
        dphi = dphi * c.unsqueeze(1)
    if torch.compiler.is_compiling():
        return _gathered(dphi, rows, kept).to(factor.dtype), dh
    wrapped = torch.cat([rows, rows[: kept.stop - 1]])
    df = dphi[:R].clone()
    for number, d in enumerate(kept):
        block = dphi[R + number * R :][:R]
        n = block.shape[0]
        df[:n].addcmul_(block, wrapped[d : d + n])
        # Row l + d, which for the last lanes is row l + d - R.
        inside = min(n, R - d)
        df[d : d + inside].addcmul_(block[:inside], rows[:inside])
        if inside < n:
            df[: n - inside].addcmul_(block[inside:], rows[inside:n])
    return df.to(factor.dtype), dh


def _gathered(dphi: torch.Tensor, rows: torch.Tensor, kept: range) -> torch.Tensor:
    """The sums of :func:`contract` as one sum over the offsets and their negatives.

    A compiler takes long over a loop that writes to slices. Of this it makes a single loop, without
    the temporaries ``(2 D, R, C)`` that an eager evaluation would write.
    """
    (R, C), D, device = rows.shape, len(kept), rows.device
    lane, number = torch.arange(R, device=device), torch.arange(2 * D, device=device).unsqueeze(1)
    block, ahead = number % D, number < D
    d = block + kept.start
    # Row l stands in lane l with the row that is d ahead, and in the lane of the row d behind.
    partner = torch.where(ahead, lane + d, lane + R - d) % R
    # The last offset of an even rank has half as many pairs.
    missing = dphi.new_zeros((D + 1) * R - dphi.shape[0], C)
    blocks = torch.cat([dphi, missing])[R:].view(D, R, C)
    return dphi[:R] + (blocks[block, torch.where(ahead, lane, partner)] * rows[partner]).sum(0)


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
        return out.add_((a @ b).mul_(scale))
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
    A, B, h = adapter
    phi_A = expand(A, options.terms, weight.dtype)
    phi_B = expand(B.t(), options.terms, weight.dtype, coefficients(h, A.shape[0], options.terms))
    return _add_product(weight.clone(), phi_B.t(), phi_A, options.scale)


def _output(x: torch.Tensor, base: Base) -> torch.Tensor:
    """The base's output ``(T, M)`` in new contiguous memory, which the update is added to."""
    if base.weight is not None:
        return F.linear(x, base.weight, base.bias).contiguous()
    assert base.out is not None
    return base.out.clone(memory_format=torch.contiguous_format)


def _dropped(x: torch.Tensor, seed: torch.Tensor | None, options: Options) -> torch.Tensor:
    """x ``(T, N)`` with the dropped elements zero; the factor 1 / (1 - p) is left to others."""
    if options.dropout_p == 0.0 or seed is None:
        return x
    return x.masked_fill(~keep_mask(seed, x.shape[0], x.shape[1], options.dropout_p), 0.0)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
