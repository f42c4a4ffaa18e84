"""Export to plain LoRA: a rank-r PERA is a LoRA of rank K, exactly (Eq. 4, 9).

What is written is a PEFT checkpoint that needs nothing of this package: one rank and one scale for
all modules, so that serving engines, which ignore patterns, read it right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import reference
from ..checks import FLOATING, check_adapter, some
from ..module import PeraLinear, is_adapted, product_norm
from ..operands import Factors
from ..terms import Terms, check_rank
from . import files
from .beside import Beside, beside_in, tree
from .checkpoint import CONFIG_FILE, TENSORS_FILE, unwrapped
from .inject import named_places
from .ranks import Together, together

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
    relative error ‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F of what was written, rounding included, where ΔW
    is that of the adapter's parameters in float64. ``vllm_max_lora_rank`` is None where vLLM has no
    such rank. ``modules_to_save`` and ``biases`` were trained beside the adapters and are written
    as they are.
    """

    folder: Path
    rank: int
    alpha: float
    ranks: dict[str, int]
    errors: dict[str, float]
    dtype: torch.dtype
    vllm_max_lora_rank: int | None
    modules_to_save: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.modules_to_save or self.biases:
            vllm = (
                "vLLM: refuses a LoRA with whole modules or biases, and other engines leave them "
                "out; merge"
            )
        elif self.vllm_max_lora_rank is not None:
            vllm = f"vLLM: --max-lora-rank {self.vllm_max_lora_rank}"
        else:
            vllm = (
                f"vLLM: no --max-lora-rank is as large as {self.rank} (the largest is "
                f"{VLLM_RANKS[-1]}); merge, drop pairs with h = 0 (prune_zero=True), or "
                f"approximate (rank={VLLM_RANKS[-1]})"
            )
        worst = max(self.errors.values())
        error = "exact" if worst == 0.0 else f"relative error at most {worst:.3g}"
        lines = [
            f"{len(self.ranks)} modules as LoRA of rank {self.rank}, alpha {self.alpha:g}, "
            f"{str(self.dtype).removeprefix('torch.')}, {error}: {self.folder}"
        ]
        for what, names in (("whole", self.modules_to_save), ("the biases of", self.biases)):
            if names:
                more = f", ... ({len(names)})" if len(names) > 8 else ""
                lines.append(f"Trained beside them: {what} {', '.join(names[:8])}{more}")
        return "\n".join([*lines, vllm])


def vllm_max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM for an adapter of this rank; None if none is."""
    return next((bucket for bucket in VLLM_RANKS if bucket >= rank), None)


def adapters_of(model: nn.Module, adapter: str | None, group: Together) -> dict[str, AdapterView]:
    """Every PERA adapter in ``model`` by its module's name: of :class:`PeraLinear`, and of PEFT.

    Args:
        adapter: the name of a PEFT adapter; None means the active one.
        group: the processes that hold parts of the model.

    Raises:
        ValueError: two adapters in one place, or a layer of another method of PEFT.
    """
    found: dict[str, AdapterView] = {}
    seen: set[nn.Module] = set()
    for name, module in tree(model):
        # Of a module that stands under two names the first counts.
        if module in seen:
            continue
        seen.add(module)
        # PEFT's layers say it themselves, so that this module need not know PEFT.
        if isinstance(module, PeraLinear):
            m = module
            view = AdapterView(*m.whole_factors(), m.scale, m.terms, m.merged)
        elif is_adapted(module):
            view = module.pera_view(adapter)  # type: ignore[operator]
        elif hasattr(type(module), "get_base_layer"):
            raise ValueError(
                f"{name} holds an adapter of another method, a {type(module).__name__}, which "
                "would be missing in the export: merge it into the base first"
            )
        else:
            continue
        if view is None:
            continue
        if name in found:
            raise ValueError(f"{name} holds two adapters, one around the other")
        own = group.on_cpu(Factors(view.A, view.B, view.h))
        found[name] = replace(view, **own._asdict())
    return found


def _adapters_in(model: nn.Module, adapter: object, group: Together) -> dict[str, AdapterView]:
    """:func:`adapters_of`; there is one, and PEFT can put a LoRA in its place."""
    if adapter is not None and not isinstance(adapter, str):
        raise TypeError(f"adapter must be the name of a PEFT adapter or None; got {adapter!r}")
    views = adapters_of(model, adapter, group)
    layers = [m for _, m in tree(model) if is_adapted(m)]
    of_peft = [m for m in layers if not isinstance(m, PeraLinear)]
    names = dict.fromkeys(name for m in of_peft for name in m.pera_A)  # type: ignore[union-attr]
    if adapter is not None and adapter not in names:
        has = f"has {', '.join(map(repr, names))}" if names else "has no adapters with names"
        raise ValueError(f"adapter must be one of a PEFT model's; got {adapter!r}, the model {has}")
    if not views and names:
        raise ValueError(
            f"no PERA adapter is active; name one by adapter: {', '.join(map(repr, names))}"
        )
    if not views:
        raise ValueError(f"model has no PERA adapter to export; got {type(model).__name__}")
    if "" in views:
        raise ValueError(
            f"model is itself the adapted layer, a {type(model).__name__}, and PEFT replaces "
            "layers inside a model; export the model around it"
        )
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}
    for name, parent, layer in named_places(model, layers):
        places.setdefault(layer, {})[parent, name.rpartition(".")[2]] = name
    for own in places.values():
        if len(own) > 1:
            raise ValueError(
                f"{', '.join(own.values())} are one layer, and PEFT would put a LoRA in the first "
                "of these places only; merge"
            )
    return views


def _check_arguments(
    dtype: object, pad_to: object, rank: object, base_model: object, **switches: object
) -> None:
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(
            "dtype must be torch.float64, torch.float32, torch.bfloat16, torch.float16 or None; "
            f"got {dtype!r}"
        )
    for name, value in (("pad_to", pad_to), ("rank", rank)):
        if value is not None:
            check_rank(value, name)  # type: ignore[arg-type]
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model must be a string or None; got {base_model!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def _checked_folder(folder: object) -> Path:
    """The folder, which can be made and holds nothing that would be lost."""
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise TypeError(f"folder must be the path of a folder; got {folder!r}")
    path = Path(folder)
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"folder must be a folder, to be made or there; {there} is a file")
    config = path / CONFIG_FILE
    if config.exists() and (kind := files.read_json(config).get("peft_type")) != "LORA":
        raise ValueError(
            f"folder holds an adapter that is no LoRA ({config}: peft_type {kind!r}), which would "
            "be overwritten; choose another folder"
        )
    return path


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    pad_to: int | None = None,
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

    What is trained beside the adapters is written as it is, as PEFT writes it: PEFT's
    ``modules_to_save`` and trained biases, and of every other parameter that requires a gradient
    (a head, say) the module that it belongs to.

    Of a sharded model every process gathers it layer by layer, and the first one writes: a call for
    all that hold a part.

    Args:
        model: with :class:`PeraLinear` layers, or a PEFT model with a PERA adapter. Adapters are
            written whether they are disabled or not, with the scale that they have now.
        folder: is made if it is missing; a LoRA in it is replaced.
        pad_to: K′ is a multiple of it; None means 16, and 1 with ``rank``.
        dtype: of the written factors; None means that of the adapters.
        exact_scale: leave s out of ``lora_B`` and write it as ``lora_alpha = s K``; it must be the
            same everywhere. Nothing is padded beyond the largest module's K, whatever ``pad_to``
            is. In float32 PEFT then computes what ``pera_kernels.reference`` does, bit for bit.
        prune_zero: leave out pairs whose coefficient is zero.
        rank: approximate each ΔW by its best of at most this rank (truncated SVD).
        base_model: name or path of the base model for the configuration.
        adapter: which adapter of a PEFT model; by default the active one.
        quiet: do not print the result.

    Returns:
        What was written, with the error of every module; printed as well, with the
        ``--max-lora-rank`` that vLLM needs.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model without adapters, with merged
            ones or with some that are not finite, scales that differ with ``exact_scale``, factors
            that overflow ``dtype``, something trained that no LoRA checkpoint can hold, or a folder
            that holds another kind of adapter. Nothing is written.
        TimeoutError: another process that holds a part did not call it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    _check_arguments(dtype, pad_to, rank, base_model, quiet=quiet)
    model = unwrapped(model)
    with together(model, "export_lora") as group:
        views = _adapters_in(model, adapter, group)
        merged = [name for name, view in views.items() if view.merged]
        if merged:
            raise ValueError(
                "export takes an unmerged model, or the update would count twice; merged: "
                f"{some(merged)}; unmerge first"
            )
        beside = beside_in(model, views, adapter)
        done = group.on_first(
            lambda: export_views(
                views,
                folder,
                _target_modules(model, list(views)),
                base_model or _name(model),
                pad_to,
                dtype,
                exact_scale=exact_scale,
                prune_zero=prune_zero,
                rank=rank,
                beside=beside,
            )
        )
    if not quiet and group.is_first:
        print(done)
    return done


def _check_values(views: Mapping[str, AdapterView], beside: Beside) -> None:
    """Whole tensors of finite values."""
    tensors: dict[str, dict[str, torch.Tensor]]
    tensors = {"": beside.tensors(views)}
    for name, view in views.items():
        try:
            check_adapter(view.A, view.B, view.h, view.terms)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: the adapter is not whole: {error}") from error
        if not math.isfinite(view.scale):
            raise ValueError(f"{name}: the scale is not finite; got {view.scale!r}")
        parts = {"A": view.A, "B": view.B} | ({} if view.h is None else {"h": view.h})
        tensors[f"{name}: pera_"] = parts
    for where, own in tensors.items():
        for name, tensor in own.items():
            if tensor.is_meta:
                raise ValueError(f"{where}{name} is on the meta device and has no values")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{where}{name} is not finite (infinite or NaN)")


def export_views(
    views: Mapping[str, AdapterView],
    folder: str | os.PathLike[str],
    target_modules: list[str],
    base_model: str | None,
    pad_to: int | None,
    dtype: torch.dtype | None,
    *,
    exact_scale: bool,
    prune_zero: bool,
    rank: int | None,
    beside: Beside | None = None,
) -> LoraExport:
    """:func:`export_lora` of adapters that need not be in a model."""
    _check_arguments(
        dtype, pad_to, rank, base_model, exact_scale=exact_scale, prune_zero=prune_zero
    )
    path = _checked_folder(folder)
    beside = beside or Beside()
    _check_values(views, beside)
    scale = _one_scale(views) if exact_scale else None
    dtype = dtype or _common_dtype(views)
    factors, errors = {}, {}
    for name, view in views.items():
        lora_A, lora_B, errors[name] = _written(view, dtype, prune_zero, scale is None, rank)
        for what, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name}: {what} overflows {dtype}; export in another dtype")
        factors[name] = lora_A, lora_B
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()}
    # Padding a product with zeros changes the order in which a library sums it.
    pad_to = (16 if rank is None else 1) if pad_to is None else pad_to
    padded = -(-max(ranks.values()) // pad_to) * pad_to if scale is None else max(ranks.values())
    alpha: float = padded if scale is None else _alpha(scale, padded, dtype)
    tensors = {f"base_model.model.{name}": t for name, t in beside.tensors(views).items()}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _pad(lora_A, padded, 0)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _pad(lora_B, padded, 1)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": padded,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "bias": beside.bias(views),
        "fan_in_fan_out": any(view.fan_in_fan_out for view in views.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": list(beside.wanted) or None,
        "use_dora": False,
        "use_rslora": False,
    }
    path.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(path / TENSORS_FILE, tensors, {})
    files.write_json(path / CONFIG_FILE, config)
    return LoraExport(
        path,
        padded,
        alpha,
        ranks,
        errors,
        dtype,
        vllm_max_lora_rank(padded),
        tuple(beside.modules),
        tuple(beside.biases),
    )


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
    view: AdapterView,
    prune_zero: bool = False,
    fold_scale: bool = True,
    work: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A ``(K, N)`` and lora_B ``(M, K)`` on the CPU, in ``work`` or what is wider of the
    adapter's dtype.
    """
    work = torch.promote_types(view.A.dtype, work)
    A, B = view.A.detach().to("cpu", work), view.B.detach().to("cpu", work)
    h = None if view.h is None else view.h.detach().to("cpu", work)
    phi_A, phi_B = reference.expanded_factors(A, B, h, view.terms)
    if prune_zero and h is not None:
        r = A.shape[0]
        kept = torch.cat([torch.arange(r), r + h.nonzero().flatten()])
        phi_A, phi_B = phi_A[kept], phi_B[:, kept]
    return phi_A, phi_B * view.scale if fold_scale else phi_B


# lora_A (K, N) and lora_B (M, K).
Pair = tuple[torch.Tensor, torch.Tensor]


def _written(
    view: AdapterView, dtype: torch.dtype, prune_zero: bool, fold_scale: bool, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """lora_A and lora_B as they are written, and the relative error of their product."""
    # A scale that is left out is left out of both, and the ratio stays the same.
    exact_A, exact_B = expanded(view, prune_zero, fold_scale, torch.float64)
    left_out: list[Pair] = []
    if rank is None or rank >= exact_A.shape[0]:
        work = torch.promote_types(dtype, torch.float32)
        lora_A, lora_B = (t.to(dtype) for t in expanded(view, prune_zero, fold_scale, work))
    else:
        (exact_A, exact_B), rest = _split(exact_A, exact_B, rank)
        lora_A, lora_B, left_out = exact_A.to(dtype), exact_B.to(dtype), [rest]
    # With Â = A + δA and B̂ = B + δB the error is B̂ δA + δB A: nothing cancels.
    A, B = lora_A.double(), lora_B.double()
    error = _norm([(A - exact_A, B), (exact_A, B - exact_B), *left_out])
    if error == 0.0:
        return lora_A, lora_B, 0.0
    norm = _norm([(exact_A, exact_B), *left_out])
    return lora_A, lora_B, error / norm if norm > 0.0 else math.inf


def _norm(pairs: Sequence[Pair]) -> float:
    """‖Σ B A‖_F over pairs (A, B)."""
    return product_norm(torch.cat([B for _, B in pairs], 1), torch.cat([A for A, _ in pairs]))


def _split(lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int) -> tuple[Pair, Pair]:
    """The best approximation of ``lora_B @ lora_A`` by factors of at most ``rank``, and what it
    leaves out; in float64, from the two factors: the product itself is never formed.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.double().t())
    U, S, V = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    root = S.sqrt()
    A, B = (V * root.unsqueeze(1)) @ Q_A.t(), Q_B @ (U * root)
    return (A[:rank], B[:, :rank]), (A[rank:], B[:, rank:])


def best_of_rank(
    lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of ``lora_B @ lora_A`` by factors of ``rank``, and its relative error
    before rounding.
    """
    kept, rest = _split(lora_A, lora_B, rank)
    norm = _norm([kept, rest])
    error = _norm([rest]) / norm if norm else 0.0
    return kept[0].to(lora_A.dtype), kept[1].to(lora_B.dtype), error


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


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Last segments of the names, which engines know, if they stand for these modules and no
    others; else whole names.
    """
    short = sorted({name.rpartition(".")[2] for name in names})
    matched = {n for n, _ in tree(model) if n.rpartition(".")[2] in short}
    return short if matched == set(names) else names
