"""Launchers: shapes to grids, splits and workspaces; two-dimensional tensors in.

``update`` is the low-rank path that the forward and the gradient of x share; ``contract`` makes
the gradients of a factor, ``compose`` W0 + ΔW. Importing this file imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from . import configs, plans
from .dropout import drop_threshold
from .kernels.accumulate import accumulate_kernel
from .kernels.compose import compose_kernel
from .kernels.contract import contract_kernel
from .kernels.expand import expand_kernel
from .kernels.project import project_kernel
from .kernels.reduce import sum_partials_kernel
from .terms import Terms, coefficient_count, expanded_rank, lane_count
from .triton_cache import run

__all__ = [
    "Dropout",
    "Factor",
    "Sink",
    "Source",
    "Sum",
    "accumulate",
    "compose",
    "contract",
    "expand",
    "project",
    "sum_partials",
    "update",
]

# A program of the contraction holds the gradient of so many rows of a factor, and no more.
CONTRACTED_ROWS = 128
SUM_BLOCKS = {"BLOCK_P": 16, "BLOCK_S": 128}


@dataclass(frozen=True)
class Dropout:
    """A probability and the seed tensor that chooses the mask."""

    p: float
    seed: torch.Tensor | None

    def arguments(self) -> dict[str, object]:
        return {
            "seed_ptr": self.seed,
            "drop_threshold": drop_threshold(self.p),
            "HAS_DROPOUT": self.active,
        }

    @property
    def active(self) -> bool:
        return self.p > 0.0

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


NO_DROPOUT = Dropout(0.0, None)


@dataclass(frozen=True)
class Factor:
    """A factor ``(members · R, N)`` of any strides (``A``, or ``B.t()``) whose expansion a kernel
    forms on chip, and its coefficients h ``(members · L,)``; several members are a stack of
    adapters of one rank.
    """

    rows: torch.Tensor
    h: torch.Tensor | None
    r: int
    terms: Terms
    members: int = 1

    @property
    def lanes(self) -> int:
        """How many lanes the expansion has, with the unused ones that pad each member's."""
        return self.members * lane_count(self.r, self.terms)

    def arguments(self) -> dict[str, object]:
        return {
            "R": self.r,
            "K": expanded_rank(self.r, self.terms),
            "LANES": lane_count(self.r, self.terms),
            "MEMBERS": self.members,
            "TERMS": self.terms,
        }


@dataclass(frozen=True)
class Expanded:
    """An expansion in memory ``(lanes, N)``, coefficients multiplied in: every lane is a row."""

    rows: torch.Tensor
    h: None = None

    @property
    def lanes(self) -> int:
        return self.rows.shape[0]

    def arguments(self) -> dict[str, object]:
        return {
            "R": self.lanes,
            "K": self.lanes,
            "LANES": self.lanes,
            "MEMBERS": 1,
            "TERMS": "linear",
        }


Expansion = Factor | Expanded


@dataclass(frozen=True)
class Sum:
    """A pending out = partial.sum(0): partial ``(parts, ...)`` float32, out of rows ``width``."""

    partial: torch.Tensor
    out: torch.Tensor
    width: int
    stride: int

    @property
    def numel(self) -> int:
        return self.partial.stride(0)


@dataclass(frozen=True)
class Source:
    """x ``(T, N)`` and the factor it is projected on."""

    x: torch.Tensor
    factor: Factor


@dataclass(frozen=True)
class Sink:
    """out = base + s u (c ∘ φ(factor)): base, out ``(T, M)``, unit last stride, maybe the same."""

    factor: Factor
    base: torch.Tensor | None
    out: torch.Tensor


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current while its kernels launch; nothing to do for the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless PyTorch's own setting allows tf32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def addressable(factor: torch.Tensor) -> torch.Tensor:
    """The factor, copied if its strides reach past the 32-bit offsets the kernels use for it."""
    reach = sum((n - 1) * s for n, s in zip(factor.shape, factor.stride(), strict=True))
    return factor if reach < 2**31 else factor.contiguous()


def _blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``; triton.cdiv takes ten times as long on the host."""
    return -(-size // block)


def _sum_arguments(suffix: str, job: Sum | None) -> dict[str, object]:
    return {
        f"partial{suffix}_ptr": None if job is None else job.partial,
        f"out{suffix}_ptr": None if job is None else job.out,
        f"parts{suffix}": None if job is None else job.partial.shape[0],
        f"numel{suffix}": None if job is None else job.numel,
        f"width{suffix}": None if job is None else job.width,
        f"stride_out{suffix}": None if job is None else job.stride,
    }


@functools.cache
def _no_expansion(number: int) -> dict[str, object]:
    pointers = dict.fromkeys((f"{name}_{number}_ptr" for name in ("f", "h", "phi")), None)
    sizes = (f"N_{number}", f"lanes_{number}", f"stride_f_{number}_r", f"stride_f_{number}_n")
    return {
        **pointers,
        **dict.fromkeys(sizes, None),
        f"MEMBERS_{number}": 1,
        f"HAS_H_{number}": False,
    }


def sum_partials(jobs: Sequence[Sum]) -> None:
    """Up to three sums in one launch, each in a fixed order."""
    if not jobs:
        return
    arguments: dict[str, object] = {}
    for number, job in itertools.zip_longest(range(3), jobs):
        arguments |= _sum_arguments(f"_{number}", job)
    most = max(job.numel for job in jobs)
    run(
        sum_partials_kernel,
        (_blocks(most, SUM_BLOCKS["BLOCK_S"]), len(jobs)),
        **arguments,
        JOBS=len(jobs),
        **SUM_BLOCKS,
    )


def expand(
    factors: Sequence[Factor], pending: Sum | None = None, *, dtype: torch.dtype
) -> list[Expanded]:
    """c ∘ φ of one or two factors in memory, in ``dtype``, and a pending sum, in one launch."""
    first = factors[0]
    arguments: dict[str, object] = {}
    phis, blocks = [], []
    tile = configs.tile_for("expand", first.rows.device, dtype, first.rows.dtype)
    for number, factor in itertools.zip_longest(range(2), factors):
        if factor is None:
            arguments |= _no_expansion(number)
            continue
        rows = addressable(factor.rows)
        N = rows.shape[1]
        phi = rows.new_empty((factor.lanes, N), dtype=dtype)
        phis.append(phi)
        blocks.append(_blocks(factor.lanes, tile.block_k) * _blocks(N, tile.block_n))
        arguments |= {
            f"f_{number}_ptr": rows,
            f"h_{number}_ptr": factor.h,
            f"phi_{number}_ptr": phi,
            f"N_{number}": N,
            f"lanes_{number}": factor.lanes,
            f"stride_f_{number}_r": rows.stride(0),
            f"stride_f_{number}_n": rows.stride(1),
            f"MEMBERS_{number}": factor.members,
            f"HAS_H_{number}": factor.h is not None,
        }
    if pending is not None:
        blocks.append(_blocks(pending.numel, SUM_BLOCKS["BLOCK_S"]))
    run(
        expand_kernel,
        (max(blocks), len(blocks)),
        **arguments,
        **_sum_arguments("", pending),
        R=first.r,
        K=expanded_rank(first.r, first.terms),
        LANES=lane_count(first.r, first.terms),
        TERMS=first.terms,
        JOBS=len(factors),
        HAS_SUM=pending is not None,
        BLOCK_K=tile.block_k,
        BLOCK_N=tile.block_n,
        **SUM_BLOCKS,
        **tile.options(),
    )
    return [Expanded(phi) for phi in phis]


def project(
    x: torch.Tensor,
    factor: Expansion,
    *,
    out: torch.Tensor,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
) -> Sum | None:
    """out = s dropout(x) φ(factor)ᵀ: x ``(T, N)``, out ``(T, lanes)`` in circular order, of any row
    stride.

    Where x was split along N, it is not there yet: the sum that makes it is returned.
    """
    rows, lanes = addressable(factor.rows), factor.lanes
    T, N = x.shape
    kernel = "project" if isinstance(factor, Factor) else "project_expanded"
    tile = configs.tile_for(kernel, x.device, x.dtype, rows.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, lanes)
    # One block of tokens is read again from the cache at once: more programs win then.
    blocks_t = _blocks(T, block_t)
    pieces = configs.pieces(lanes, block_k, tile.pieces if blocks_t > 1 else 1)
    tiles = blocks_t * _blocks(lanes, pieces * block_k)
    wanted = configs.processor_count(x.device) // tiles
    splits, n_per_split = configs.split(N, wanted, 2 * tile.block_n)
    partial = None if splits == 1 else x.new_empty((splits, T, lanes), dtype=torch.float32)
    target = out if partial is None else partial
    run(
        project_kernel,
        (tiles, splits),
        x_ptr=x,
        f_ptr=rows,
        u_ptr=target,
        scale=scale * dropout.keep_scale,
        T=T,
        N=N,
        lanes=lanes,
        n_per_split=n_per_split,
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=rows.stride(0),
        stride_f_n=rows.stride(1),
        stride_u_split=T * lanes,
        stride_u_t=target.stride(-2),
        PRECISION=dot_precision(x.dtype),
        PIECES=pieces,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        **factor.arguments(),
        **tile.options(),
        **dropout.arguments(),
    )
    return None if partial is None else Sum(partial, out, lanes, out.stride(0))


def accumulate(
    base: torch.Tensor | None,
    u: torch.Tensor,
    phi: Expanded,
    *,
    out: torch.Tensor,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out = base + s u φ: u ``(T, lanes)``, base and out ``(T, M)``, unit last stride, maybe the
    same.
    """
    lanes, M = phi.rows.shape
    T = u.shape[0]
    tile = configs.tile_for("accumulate", u.device, u.dtype, u.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, lanes)
    blocks_t = _blocks(T, block_t)
    block_m = configs.narrow(tile.block_n, M, configs.processor_count(u.device) // blocks_t)
    run(
        accumulate_kernel,
        (blocks_t * _blocks(M, block_m),),
        base_ptr=base,
        u_ptr=u,
        phi_ptr=phi.rows,
        y_ptr=out,
        scale=scale,
        keep_scale=dropout.keep_scale,
        T=T,
        M=M,
        lanes=lanes,
        stride_base_t=0 if base is None else base.stride(0),
        stride_u_t=u.stride(0),
        stride_y_t=out.stride(0),
        HAS_BASE=base is not None,
        PRECISION=dot_precision(u.dtype),
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **tile.options(),
        **dropout.arguments(),
    )


def update(
    sources: Sequence[Source],
    sinks: Sequence[Sink],
    *,
    scale: float = 1.0,
    scale_u: float = 1.0,
    drop_x: Dropout = NO_DROPOUT,
    drop_out: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Project the sources on their factors, add what they give to the sinks; returns u
    ``(T, lanes)``, which has ``scale_u`` in it. ``scale`` meets what is added alone.

    The forward of one layer is one of each. Projections that share their input are one source, a
    stack of factors, with a sink for each; in the gradient of that input it is the other way round.
    """
    x = sources[0].x
    T, lanes = x.shape[0], sum(source.factor.lanes for source in sources)
    u = x.new_empty(T, lanes)
    bare = [replace(source.factor, h=None) for source in sources]
    back = [sink.factor for sink in sinks]
    onto: Sequence[Expansion] = bare
    phis: list[Expanded] = []
    if T >= plans.EXPANDED_SOURCE_TOKENS:
        expanded = _expand_all([*back, *bare], x.dtype)
        phis, onto = expanded[: len(back)], expanded[len(back) :]

    pending, column = [], 0
    for source, factor in zip(sources, onto, strict=True):
        target = u[:, column : column + factor.lanes]
        sums = project(source.x, factor, out=target, scale=scale_u, dropout=drop_x)
        if sums is not None:
            pending.append(sums)
        column += factor.lanes
    if back and not phis:
        phis = _expand_all(back, x.dtype, pending.pop() if pending else None)
    for start in range(0, len(pending), 3):
        sum_partials(pending[start : start + 3])

    column = 0
    for sink, phi in zip(sinks, phis, strict=True):
        own = u[:, column : column + phi.lanes]
        accumulate(sink.base, own, phi, out=sink.out, scale=scale, dropout=drop_out)
        column += phi.lanes
    return u


def _expand_all(
    factors: Sequence[Factor], dtype: torch.dtype, pending: Sum | None = None
) -> list[Expanded]:
    """Every factor expanded, two in a launch."""
    done: list[Expanded] = []
    for start in range(0, len(factors), 2):
        done += expand(factors[start : start + 2], pending, dtype=dtype)
        pending = None
    return done


def contract(
    left: torch.Tensor,
    x: torch.Tensor,
    factor: Factor,
    *,
    df: torch.Tensor | None,
    dh: torch.Tensor | None,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> list[Sum]:
    """Contract dφ = s leftᵀ dropout(x) into df ``(members · R, N)`` (dense, any layout) and dh.

    left is ``(T, lanes)`` in circular order, of any strides; x is ``(T, N)``. Gradients that were
    split are not there yet: the sums that make them are returned.
    """
    rows, lanes = addressable(factor.rows), factor.lanes
    T, N = x.shape
    coefficients = factor.members * coefficient_count(factor.r, factor.terms)
    tile = configs.tile_for("contract", x.device, x.dtype, rows.dtype)
    block_t, block_k = configs.shrink(tile.block_t, T), configs.shrink(tile.block_k, lanes)
    blocks_n = _blocks(N, tile.block_n)
    processors = configs.processor_count(x.device)
    splits_t, t_per_split = configs.split(T, 2 * processors // blocks_n, 4 * block_t)
    # Fewer lanes to a program where there would be too few programs: x is small then.
    crowd = max(1, processors // (blocks_n * splits_t))
    pieces = configs.pieces(lanes, block_k, max(1, tile.pieces // crowd))
    parts = splits_t * _blocks(lanes, pieces * block_k)
    df_out, dh_out, sums = df, dh, []
    if df is not None and parts > 1:
        df_out = df.new_empty((parts, df.numel()), dtype=torch.float32)
        sums.append(Sum(df_out, df, df.numel(), 0))
    if dh is not None:
        dh_out = dh.new_empty((splits_t * blocks_n, coefficients), dtype=torch.float32)
        sums.append(Sum(dh_out, dh, coefficients, 0))
    run(
        contract_kernel,
        (blocks_n, parts),
        left_ptr=left,
        x_ptr=x,
        f_ptr=rows,
        h_ptr=factor.h,
        df_ptr=df_out,
        dh_ptr=dh_out,
        scale=scale * dropout.keep_scale,
        T=T,
        N=N,
        lanes=lanes,
        coefficients=coefficients,
        t_per_split=t_per_split,
        stride_left_t=left.stride(0),
        stride_left_k=left.stride(1),
        stride_x_t=x.stride(0),
        stride_x_n=x.stride(1),
        stride_f_r=rows.stride(0),
        stride_f_n=rows.stride(1),
        stride_df_split=rows.shape[0] * N,
        stride_df_r=0 if df is None else df.stride(0),
        stride_df_n=0 if df is None else df.stride(1),
        HAS_H=factor.h is not None,
        HAS_DF=df is not None,
        HAS_DH=dh is not None,
        PRECISION=dot_precision(x.dtype),
        PIECES=pieces,
        BLOCK_R=configs.shrink(1 << 30, rows.shape[0]),
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        **factor.arguments(),
        **tile.options(),
        **dropout.arguments(),
    )
    return sums


def compose(
    base: torch.Tensor | None, a: Factor, b: Factor, *, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """base + s φ(B) diag(c) φ(A): a ``(R, N)``, b ``(R, M)`` with h, base ``(M, N)``."""
    phi_b, phi_a = expand([b, a], dtype=dtype)
    (lanes, N), M = phi_a.rows.shape, phi_b.rows.shape[1]
    w = phi_a.rows.new_empty(M, N)
    tile = configs.tile_for("compose", w.device, dtype, dtype)
    run(
        compose_kernel,
        (_blocks(M, tile.block_t) * _blocks(N, tile.block_n),),
        base_ptr=base,
        phi_b_ptr=phi_b.rows,
        phi_a_ptr=phi_a.rows,
        w_ptr=w,
        scale=scale,
        M=M,
        N=N,
        lanes=lanes,
        stride_base_m=0 if base is None else base.stride(0),
        stride_base_n=0 if base is None else base.stride(1),
        stride_w_m=w.stride(0),
        HAS_BASE=base is not None,
        PRECISION=dot_precision(dtype),
        BLOCK_M=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=configs.shrink(tile.block_k, lanes),
        **tile.options(),
    )
    return w
