"""``inspect ADAPTER``: what its updates are made of. docs/inspect.md has the formulas."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..adapters import spectrum
from ..adapters.checkpoint import AdapterFile
from ..adapters.export import AdapterView, expanded, vllm_max_lora_rank
from ..adapters.merge import Progress
from ..adapters.optimizer import NEGLIGIBLE
from ..terms import pairs
from .tables import median, shown, table

__all__ = ["adapter", "show"]

# How many pairs of a module are named, and how much of their energy is to be carried.
TOP_PAIRS = 3
CARRIED = 0.9


def adapter(read: AdapterFile, progress: Progress = iter) -> dict[str, Any]:
    """What an adapter folder holds, as a dictionary. ``progress`` wraps what is iterated over, as
    ``tqdm`` does.
    """
    modules = {
        name: _module(own, read.options[name]) for name, own in progress(list(read.tensors.items()))
    }
    beside = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parameters": tensor.numel(),
            "finite": bool(torch.isfinite(tensor).all()),
        }
        for name, tensor in read.parameters.items()
        if name not in read.frozen
    }
    lora = max(own["expanded_rank"] for own in modules.values())
    padded = -(-lora // 16) * 16
    r = max(own["r"] for own in modules.values())
    linear, products = (
        math.hypot(*(own[f"{part}_norm"] or 0.0 for own in modules.values()))
        for part in ("linear", "products")
    )
    return {
        "path": str(read.path),
        "base_model": read.base_model,
        "parameters": sum(own["parameters"] for own in modules.values()),
        "lora_rank": padded,
        "vllm_max_lora_rank": vllm_max_lora_rank(padded),
        "quadratic_share": _ratio(products, linear),
        # Of the module that loses most where all of them are exported with this one rank.
        "largest_r": r,
        "largest_error_at_r": max(
            (
                spectrum.error_of_rank(torch.tensor(own["singular_values"], dtype=torch.float64), r)
                for own in modules.values()
                if own["finite"]
            ),
            default=math.nan,
        ),
        "modules": modules,
        "trained_beside": beside,
    }


def _ratio(above: float, below: float) -> float:
    if above == 0.0:
        return 0.0
    return math.inf if below == 0.0 else above / below


def _module(own: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, Any]:
    A, B, h = own["pera_A"], own["pera_B"], own.get("pera_h")
    r, terms = options["r"], options["terms"]
    scale = options["alpha"] / r
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in own.values())
    view = AdapterView(A, B, h, scale, terms, merged=False)
    lora_A, lora_B = expanded(view, work=torch.float64)
    sigma = spectrum.singular_values(lora_A, lora_B)
    parts = spectrum.part_norms(lora_A, lora_B, r, terms)
    norms = spectrum.term_norms(lora_A, lora_B)
    of_pairs, named = norms[r:], pairs(r, terms)
    energy = of_pairs.square() / of_pairs.square().sum()
    used = finite and bool(of_pairs.any())
    top = of_pairs.argsort(descending=True)[:TOP_PAIRS].tolist() if used else []
    return {
        **options,
        "scale": scale,
        "in_features": A.shape[1],
        "out_features": B.shape[0],
        "dtype": str(A.dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in own.values()),
        "expanded_rank": lora_A.shape[0],
        "zero_coefficients": None if h is None else int((h == 0).sum()),
        "finite": finite,
        "delta_norm": float(sigma.norm()),
        **{f"{part}_norm": norm for part, norm in parts.items()},
        "quadratic_share": _ratio(parts["products"] or 0.0, parts["linear"] or 0.0),
        "effective_rank": spectrum.effective_rank(sigma),
        "numerical_rank": (
            spectrum.numerical_rank(sigma, B.shape[0], A.shape[1]) if finite else None
        ),
        "error_of_rank": {str(k * r): spectrum.error_of_rank(sigma, k * r) for k in (1, 2, 4)},
        "pairs_for_90_percent": spectrum.carried_by(of_pairs, CARRIED)
        if named and finite
        else None,
        "top_pairs": [
            {"pair": named[k], "norm": float(of_pairs[k]), "energy": float(energy[k])} for k in top
        ],
        "term_norms": norms.tolist(),
        "singular_values": sigma.tolist(),
        "singular_values_linear": spectrum.singular_values(lora_A[:r], lora_B[:, :r]).tolist(),
    }


OPTIONS = {
    "in_features": "in",
    "out_features": "out",
    "r": "r",
    "terms": "terms",
    "expanded_rank": "K",
    "scale": "scale",
    "dropout": "dropout",
    "dtype": "dtype",
    "zero_coefficients": "zero h",
    "numerical_rank": "rank of ΔW",
}
NORMS = {
    "delta_norm": "‖ΔW‖",
    "linear_norm": "linear",
    "square_norm": "square",
    "cross_norm": "cross",
    "quadratic_share": "quadratic",
}
SPECTRUM = {
    "effective_rank": "effective\nrank",
    "at_r": "lost at\nrank r",
    "at_2r": "2r",
    "at_4r": "4r",
    "pairs_for_90_percent": "pairs\nfor 90 %",
    "strongest": "strongest pairs",
}


def show(found: dict[str, Any]) -> None:
    """Print :func:`adapter` for people."""
    modules = {name: {**own, **_told(own)} for name, own in found["modules"].items()}
    first = next(iter(modules.values()))
    # What all modules have in common is said once.
    common = {
        key: first[key] for key in OPTIONS if len({own[key] for own in modules.values()}) == 1
    }
    options = {key: head for key, head in OPTIONS.items() if key not in common}
    _table(found["path"], modules, options, NORMS)
    _table("What a LoRA of a lower rank would lose, and what h uses", modules, {}, SPECTRUM)
    vllm = found["vllm_max_lora_rank"]
    if common:
        print("All: " + ", ".join(f"{OPTIONS[key]} {shown(own)}" for key, own in common.items()))
    print(
        f"{found['parameters']:,} parameters in {len(modules)} modules"
        + (f", for {found['base_model']}" if found["base_model"] else "")
        + f". As plain LoRA: rank {found['lora_rank']}, "
        + (f"vLLM --max-lora-rank {vllm}." if vllm else "more than any --max-lora-rank of vLLM.")
    )
    beside = found["trained_beside"]
    if beside:
        count = sum(own["parameters"] for own in beside.values())
        print(f"Trained beside them, {count:,} parameters: {', '.join(beside)}")
    broken = [name for name, own in {**modules, **beside}.items() if not own["finite"]]
    if broken:
        print(f"Not finite: {', '.join(broken)}")
    if advice := _advice(found):
        print(advice)


def _told(own: dict[str, Any]) -> dict[str, Any]:
    at_r, at_2r, at_4r = own["error_of_rank"].values()
    strongest = ", ".join(
        f"{one['pair'][0]}·{one['pair'][1]} {one['energy']:.0%}" for one in own["top_pairs"]
    )
    return {"at_r": at_r, "at_2r": at_2r, "at_4r": at_4r, "strongest": strongest or None}


def _table(
    title: str, modules: dict[str, Any], texts: dict[str, str], numbers: dict[str, str]
) -> None:
    """Rows of modules, and of medians of the numbers; no column that would be empty."""
    heads = {
        key: head
        for key, head in {**texts, **numbers}.items()
        if any(own[key] is not None for own in modules.values())
    }
    rows = [[name, *(own[key] for key in heads)] for name, own in modules.items()]
    if len(rows) > 1:
        medians = [
            median(own[key] for own in modules.values()) if key in numbers else None
            for key in heads
        ]
        rows.append(["median", *medians])
    table(title, ["module", *heads.values()], rows)


def _advice(found: dict[str, Any]) -> str:
    """A line where the adapter is no more than a LoRA."""
    modules = found["modules"].values()
    if not any(own["delta_norm"] for own in modules):
        return "ΔW is zero: nothing was trained."
    share, r = found["quadratic_share"], found["largest_r"]
    if all(own["terms"] == "linear" for own in modules) or not share < NEGLIGIBLE:
        return ""
    return (
        f"The products do nothing: they are {share:.2%} of BA. Train h at a rate of its own "
        "(parameter_groups of pera_kernels or of pera_kernels.peft), or take the LoRA: "
        f"export-lora --rank {r} loses at most {found['largest_error_at_r']:.2%} of ΔW."
    )
