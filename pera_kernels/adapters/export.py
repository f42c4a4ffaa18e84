"""Export to plain LoRA: a rank-r PERA is a LoRA of rank K, exactly (Eq. 4, 9).

What is written is a PEFT checkpoint that needs nothing of this package: one rank and one scale for
all modules, so that serving engines, which ignore patterns, read it right.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import reference
from ..checks import FLOATING
from ..terms import Terms, check_rank
from . import files
from .checkpoint import CONFIG_FILE, TENSORS_FILE, unwrapped
from .inject import adapted_modules

__all__ = ["AdapterView", "LoraExport", "adapters_of", "export_lora", "vllm_max_lora_rank"]

# What vLLM accepts as --max-lora-rank; an adapter may have any rank up to it.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class AdapterView:
    """One module's adapter, whoever holds it: A ``(r, N)``, B ``(M, r)``, h ``(L,)`` or None."""

    A: torch.Tensor
    B: torch.Tensor
    h: torch.Tensor | None
    scale: float
    terms: Terms
    merged: bool
    # The base keeps its weight (in, out), as transformers' Conv1D does.
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class LoraExport:
    """What :func:`export_lora` wrote.

    ``rank`` is that of every module (K′, padded), ``ranks`` what each of them needs, ``errors`` the
    relative error ‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F of each before rounding to ``dtype``, all zero
    for a lossless export. ``vllm_max_lora_rank`` is None where vLLM has no such rank.
    """

    folder: Path
    rank: int
    alpha: float
    ranks: dict[str, int]
    errors: dict[str, float]
    dtype: torch.dtype
    vllm_max_lora_rank: int | None

    def __str__(self) -> str:
        if self.vllm_max_lora_rank is not None:
            vllm = f"vLLM: --max-lora-rank {self.vllm_max_lora_rank}"
        else:
            vllm = (
                f"vLLM: no --max-lora-rank is as large as {self.rank} (the largest is "
                f"{VLLM_RANKS[-1]}); merge, drop pairs with h = 0 (prune_zero=True), or "
                f"approximate (rank={VLLM_RANKS[-1]})"
            )
        worst = max(self.errors.values())
        error = "exact" if worst == 0.0 else f"relative error at most {worst:.3g}"
        return (
            f"{len(self.ranks)} modules as LoRA of rank {self.rank}, alpha {self.alpha:g}, "
            f"{str(self.dtype).removeprefix('torch.')}, {error}: {self.folder}\n{vllm}"
        )


def vllm_max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM for an adapter of this rank; None if none is."""
    return next((bucket for bucket in VLLM_RANKS if bucket >= rank), None)


def adapters_of(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterView]:
    """Every PERA adapter in ``model`` by its module's name: of :class:`PeraLinear`, or of PEFT.

    Args:
        adapter: the name of a PEFT adapter; by default the active one.
    """
    found = {
        name: AdapterView(m.pera_A, m.pera_B, m.pera_h, m.scale, m.terms, m.merged)
        for name, m in adapted_modules(model).items()
    }
    if found:
        return found
    # PEFT's layers say it themselves, so that this module need not know PEFT.
    for name, module in model.named_modules():
        view = getattr(module, "pera_view", None)
        own = view(adapter) if callable(view) else None
        if own is not None:
            found[name.removeprefix("base_model.model.")] = own
    return found


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype must be float64, float32, bfloat16, float16 or None; got {dtype!r}")


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    pad_to: int = 16,
    dtype: torch.dtype | None = None,
    *,
    exact_scale: bool = False,
    prune_zero: bool = False,
    rank: int | None = None,
    base_model: str | None = None,
    adapter: str | None = None,
    quiet: bool = False,
) -> LoraExport:
    """Write the adapters of ``model`` as one plain LoRA checkpoint, which PEFT loads without this
    package.

    The factors are expanded in float32 (float64 for float64), s and h are folded into ``lora_B``,
    and every module is padded with zeros to one rank K′, with ``lora_alpha = r = K′``.

    Args:
        model: with :class:`PeraLinear` layers, or a PEFT model with a PERA adapter.
        pad_to: K′ is a multiple of it.
        dtype: of the written factors; None means that of the adapters.
        exact_scale: leave s out of ``lora_B`` and write it as ``lora_alpha = s K``; it must be the
            same everywhere. Nothing is padded beyond the largest module's K, whatever ``pad_to``
            is. In float32 PEFT then computes what ``pera_kernels.reference`` does, bit for bit.
        prune_zero: leave out pairs whose coefficient is zero.
        rank: approximate each ΔW by its best of at most this rank (truncated SVD), no longer
            lossless; the errors are in the result.
        base_model: name or path of the base model for the configuration.
        adapter: which adapter of a PEFT model; by default the active one.
        quiet: do not print the result.

    Returns:
        What was written; printed as well, with the ``--max-lora-rank`` that vLLM needs.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model without adapters or with
            merged ones, scales that differ with ``exact_scale``, or factors that overflow
            ``dtype``. Nothing is written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    model = unwrapped(model)
    views = adapters_of(model, adapter)
    if not views:
        raise ValueError(f"model has no PERA adapter to export; got {type(model).__name__}")
    merged = [name for name, view in views.items() if view.merged]
    if merged:
        raise ValueError(
            "export takes an unmerged model, or the update would count twice; merged: "
            f"{', '.join(merged[:8])}{', ...' if len(merged) > 8 else ''}; unmerge first"
        )
    done = export_views(
        views,
        folder,
        _target_modules(model, list(views)),
        base_model or _name(model),
        pad_to,
        dtype,
        exact_scale=exact_scale,
        prune_zero=prune_zero,
        rank=rank,
    )
    if not quiet:
        print(done)
    return done


def export_views(
    views: Mapping[str, AdapterView],
    folder: str | os.PathLike[str],
    target_modules: list[str],
    base_model: str | None,
    pad_to: int,
    dtype: torch.dtype | None,
    *,
    exact_scale: bool,
    prune_zero: bool,
    rank: int | None,
) -> LoraExport:
    """:func:`export_lora` of adapters that need not be in a model."""
    check_rank(pad_to, "pad_to")
    _check_dtype(dtype)
    if rank is not None:
        check_rank(rank, "rank")
    scale = _one_scale(views) if exact_scale else None
    factors, errors = {}, {}
    for name, view in views.items():
        lora_A, lora_B = expanded(view, prune_zero, scale is None)
        errors[name] = 0.0
        if rank is not None and rank < lora_A.shape[0]:
            lora_A, lora_B, errors[name] = best_of_rank(lora_A, lora_B, rank)
        factors[name] = lora_A, lora_B
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()}
    dtype = dtype or _common_dtype(views)
    # Padding a product with zeros changes the order in which a library sums it.
    padded = -(-max(ranks.values()) // pad_to) * pad_to if scale is None else max(ranks.values())
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        for part, factor, dim in (("lora_A", lora_A, 0), ("lora_B", lora_B, 1)):
            rounded = _pad(factor.to(dtype), padded, dim)
            if not torch.isfinite(rounded).all() and torch.isfinite(factor).all():
                raise ValueError(f"{name}: {part} overflows {dtype}; export in another dtype")
            tensors[f"base_model.model.{name}.{part}.weight"] = rounded
    alpha: float = padded if scale is None else _alpha(scale, padded, dtype)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": padded,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": any(view.fan_in_fan_out for view in views.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / TENSORS_FILE, tensors, {})
    files.write_json(folder / CONFIG_FILE, config)
    return LoraExport(folder, padded, alpha, ranks, errors, dtype, vllm_max_lora_rank(padded))


def _one_scale(views: Mapping[str, AdapterView]) -> float:
    scales = {view.scale for view in views.values()}
    if len(scales) > 1:
        raise ValueError(
            "exact_scale=True needs one scale alpha / r for all modules; got "
            f"{', '.join(f'{scale:g}' for scale in sorted(scales))}"
        )
    return scales.pop()


def _alpha(scale: float, rank: int, dtype: torch.dtype) -> float:
    """lora_alpha with ``lora_alpha / rank == scale`` to the last bit of ``dtype``'s arithmetic."""
    work = torch.promote_types(dtype, torch.float32)
    alpha = scale * rank
    for near in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0)):
        if torch.tensor(near / rank, dtype=work) == torch.tensor(scale, dtype=work):
            return int(near) if near == int(near) else near
    raise ValueError(
        f"exact_scale=True: no lora_alpha gives the scale {scale!r} exactly at rank {rank}"
    )


@torch.no_grad()
def expanded(
    view: AdapterView, prune_zero: bool = False, fold_scale: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A ``(K, N)`` and lora_B ``(M, K)`` in at least float32, on the CPU."""
    work = torch.promote_types(view.A.dtype, torch.float32)
    A, B = view.A.detach().to("cpu", work), view.B.detach().to("cpu", work)
    h = None if view.h is None else view.h.detach().to("cpu", work)
    phi_A, phi_B = reference.expanded_factors(A, B, h, view.terms)
    if prune_zero and h is not None:
        r = A.shape[0]
        kept = torch.cat([torch.arange(r), r + h.nonzero().flatten()])
        phi_A, phi_B = phi_A[kept], phi_B[:, kept]
    return phi_A, phi_B * view.scale if fold_scale else phi_B


def best_of_rank(
    lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of ``lora_B @ lora_A`` by factors of ``rank``, and its relative error.

    Computed in float64 from the two factors; the product itself is never formed.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.double().t())
    U, S, V = torch.linalg.svd(R_B @ R_A.t())
    keep = min(rank, len(S))
    whole = float(S.square().sum())
    error = math.sqrt(float(S[keep:].square().sum()) / whole) if whole else 0.0
    root = S[:keep].sqrt()
    new_B = Q_B @ (U[:, :keep] * root)
    new_A = (V[:keep] * root.unsqueeze(1)) @ Q_A.t()
    return new_A.to(lora_A.dtype), new_B.to(lora_B.dtype), error


def _pad(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _common_dtype(views: Mapping[str, AdapterView]) -> torch.dtype:
    """The widest of the adapters' dtypes."""
    dtypes = iter(view.A.dtype for view in views.values())
    widest = next(dtypes)
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _name(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _plain_names(model: nn.Module) -> Iterator[str]:
    """Names of the modules without what PEFT puts around and into them."""
    for name, module in model.named_modules():
        if not hasattr(module, "get_base_layer") and re.search(r"\.(base_layer|pera_\w+)", name):
            continue
        yield name.removeprefix("base_model.model.")


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Last segments of the names, which engines know, if they stand for these modules and no
    others; else whole names.
    """
    short = sorted({name.rpartition(".")[2] for name in names})
    matched = {n for n in _plain_names(model) if n.rpartition(".")[2] in short}
    return short if matched == set(names) else names
