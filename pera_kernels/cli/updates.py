"""``inspect --update``: the spectra of the difference between two checkpoints."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from ..adapters import spectrum
from ..adapters.merge import Progress
from ..checks import FLOATING, some
from .checkpoints import Stored, stored
from .tables import median, table
from .worth import worth

__all__ = ["show", "update"]

TOP = (4, 8, 16, 32)
# Ranks at which it is told what products are worth; beyond min(M, N) / 8 nothing was measured.
RANKS = (8, 16, 32)
# From this share of ‖ΔW‖ on, what rounding to the stored dtype makes is worth a word.
NOISE = 0.1


def update(
    base: Path, tuned: Path, modules: re.Pattern[str] | None = None, progress: Progress = iter
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """ΔW = TUNED − BASE of every 2-D weight that changed, as a dictionary, and its singular values.

    One weight at a time is in memory. ΔW and its singular values are computed in float32, or in
    float64 where a weight is float64.

    Args:
        modules: only weights in whose name this is found.
        progress: wraps what is iterated over, as ``tqdm`` does.

    Raises:
        FileNotFoundError, ValueError: see :func:`stored`; or no 2-D weight is in both, none
            changed, or one is not of a floating dtype, or not finite.
    """
    before, after = stored(base), stored(tuned)
    shared = _shared(before, after, base, tuned, modules)
    names = [name for name in shared if before[name].shape == after[name].shape]
    weights, sigmas = {}, {}
    for name in progress(names):
        W0, W = before[name].read(), after[name].read()
        dense = all(w.layout is torch.strided and not w.is_meta for w in (W0, W))
        if dense and W0.dtype == W.dtype and torch.equal(W0, W):
            continue
        for where, weight in ((base, W0), (tuned, W)):
            _check(name, where, weight)
        work = torch.promote_types(torch.promote_types(W0.dtype, W.dtype), torch.float32)
        delta = W.to(work) - W0.to(work)
        if not delta.any():
            continue
        if not torch.isfinite(delta).all():
            raise ValueError(f"{name}: the difference is too large for {work}")
        sigma = torch.linalg.svdvals(delta)
        weights[name] = _measured(W0, W, sigma)
        sigmas[name] = sigma
    if not weights:
        reshaped = f", and {len(shared) - len(names)} have other shapes" if shared != names else ""
        raise ValueError(
            f"none of {len(names)} 2-D weights differs between {base} and {tuned}{reshaped}"
        )
    return {
        "base": str(base),
        "tuned": str(tuned),
        "weights": weights,
        "median": _medians(list(weights.values())),
        "unchanged": len(names) - len(weights),
        "other_shapes": {
            name: [list(own[name].shape) for own in (before, after)]
            for name in shared
            if name not in names
        },
        "only_in_base": [name for name in before if name not in after],
        "only_in_tuned": [name for name in after if name not in before],
    }, sigmas


def _shared(
    before: dict[str, Stored],
    after: dict[str, Stored],
    base: Path,
    tuned: Path,
    modules: re.Pattern[str] | None,
) -> list[str]:
    """The names of 2-D weights that both have."""
    both = [name for name in before if name in after]
    if not both:
        raise ValueError(
            f"{base} and {tuned} have no tensor of the same name: {next(iter(before), 'none')} "
            f"there, {next(iter(after), 'none')} here"
        )
    chosen = [name for name in both if modules is None or modules.search(name)]
    matrices = [n for n in chosen if 2 in (len(before[n].shape), len(after[n].shape))]
    if not matrices:
        wanted = f" whose name has {modules.pattern!r}" if modules else ""
        raise ValueError(f"{base} and {tuned} share no 2-D weight{wanted}; they share {some(both)}")
    return matrices


def _check(name: str, where: Path, weight: torch.Tensor) -> None:
    dense = weight.layout is torch.strided and not weight.is_meta
    if weight.dtype not in FLOATING or not dense:
        found = weight.dtype if dense else "no values" if weight.is_meta else weight.layout
        kind = str(found).removeprefix("torch.")
        raise ValueError(
            f"{name} in {where} must be a dense weight in float64, float32, bfloat16 or float16; "
            f"got {kind}: dequantize it, or choose others by --modules"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} in {where} is not finite (infinite or NaN)")


def _measured(W0: torch.Tensor, W: torch.Tensor, sigma: torch.Tensor) -> dict[str, Any]:
    norm, base = float(sigma.double().norm()), _norm(W0)
    return {
        "shape": list(W.shape),
        "dtypes": [str(t.dtype).removeprefix("torch.") for t in (W0, W)],
        "svd_dtype": str(sigma.dtype).removeprefix("torch."),
        "delta_norm": norm,
        "relative_norm": norm / base if base else math.inf,
        **{f"energy_top_{k}": spectrum.top_energy(sigma, k) for k in TOP},
        "log_slope": spectrum.log_slope(sigma),
        "effective_rank": spectrum.effective_rank(sigma),
        **{
            f"worth_at_{r}": worth(sigma, r, "full", (W.shape[0], W.shape[1]))
            if 8 * r <= len(sigma)
            else None
            for r in RANKS
        },
        "rounding": _rounding(W) / norm,
    }


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _rounding(weight: torch.Tensor) -> float:
    """‖·‖_F of rounding a weight to its dtype, if errors are uniform within an ulp: they have the
    variance ulp² / 12 then. Where updates are smaller than an ulp they are not, and mostly lost.
    """
    kind = torch.finfo(weight.dtype)
    exponent = torch.frexp(weight.to(torch.promote_types(weight.dtype, torch.float32))).exponent - 1
    ulp = kind.eps * torch.exp2(exponent.clamp(min=round(math.log2(kind.tiny))).float())
    return _norm(ulp.masked_fill(weight == 0.0, 0.0)) / math.sqrt(12)


HEADS = {
    "relative_norm": "‖ΔW‖/‖W‖",
    **{f"energy_top_{k}": f"top {k}" for k in TOP},
    "log_slope": "slope",
    "effective_rank": "effective\nrank",
    **{f"worth_at_{r}": f"worth\nr={r}" for r in RANKS},
    "rounding": "rounding",
}


def _medians(weights: list[dict[str, Any]]) -> dict[str, float | None]:
    return {key: median(own[key] for own in weights) for key in HEADS}


def show(found: dict[str, Any]) -> None:
    """Print the dictionary of :func:`update` for people."""
    weights, medians = found["weights"], found["median"]
    heads = dict(HEADS)
    # Where weights are float32 rounding does not matter.
    if all(own["rounding"] < NOISE for own in weights.values()):
        del heads["rounding"]
    heads = {key: head for key, head in heads.items() if medians[key] is not None}
    rows = [
        [
            name.removesuffix(".weight"),
            "x".join(map(str, own["shape"])),
            *(own[key] for key in heads),
        ]
        for name, own in weights.items()
    ]
    rows.append(["median", None, *(medians[key] for key in heads)])
    table(f"{found['tuned']} − {found['base']}", ["weight", "shape", *heads.values()], rows)
    dtypes = sorted({own["svd_dtype"] for own in weights.values()})
    print(
        f"{len(weights)} 2-D weights changed, {found['unchanged']} did not. Singular values in "
        f"{' and '.join(dtypes)}; top k: their share of ‖ΔW‖²."
    )
    if any(medians[f"worth_at_{r}"] is not None for r in RANKS):
        print(
            "Worth: how many more ranks a LoRA needs to come as close to ΔW as full PERA of rank "
            "r, by the formula of docs/capacity.md, which may be off by a factor of 1.5 and more."
        )
    if other := found["other_shapes"]:
        told = (f"{name} {old} and {new}" for name, (old, new) in other.items())
        print(f"Left out, for their shapes differ: {some(told)}")
    for where in ("base", "tuned"):
        if lone := found[f"only_in_{where}"]:
            print(f"Only in {found[where]}: {some(lone)}")
    if medians["rounding"] >= NOISE:
        stored_as = ", ".join(sorted({own["dtypes"][1] for own in weights.values()}))
        print(
            f"What {stored_as} rounds off is of the order of {medians['rounding']:.0%} of ‖ΔW‖: "
            "such spectra are flatter than that of the update. Save tuned weights in float32."
        )
