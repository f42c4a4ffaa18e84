"""Pictures of ``inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from ..adapters import spectrum

__all__ = ["adapter", "check", "update"]

PARTS = {"linear": "#8d99a6", "square": "#d1495b", "cross": "#1f77b4"}
# More names than these would not be readable.
NAMES = 40
# Smaller singular values, as a share of the largest, are not drawn.
SMALLEST = 1e-9


def check(path: Path) -> None:
    """That matplotlib is installed and can write such a file there.

    Raises:
        ImportError, FileNotFoundError, ValueError: it is not, or cannot.
    """
    known = _figure(1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"--plot {path}: the name must end in one of .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot {path}: there is no folder {path.parent}")


def _figure(columns: int) -> Any:
    """A figure that is no global state of pyplot's."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'a plot needs the matplotlib package: pip install "pera_kernels[cli]"'
        ) from error
    return Figure(figsize=(5.5 * columns, 5), dpi=120, layout="constrained")


def adapter(found: Mapping[str, Any], path: Path) -> None:
    """Singular values, shares of the parts, and which pairs h uses, of the dictionary of
    ``inspect``.
    """
    modules = {n: own for n, own in found["modules"].items() if own["finite"] and own["delta_norm"]}
    if not modules:
        raise ValueError(f"{found['path']} has nothing to draw: every ΔW is zero or not finite")
    figure = _figure(3)
    spectra, shares, pairs = figure.subplots(1, 3)
    figure.suptitle(f"{found['path']}, {len(modules)} modules", parse_math=False)
    _spectra(spectra, modules.values())
    _shares(shares, modules)
    drawn = _pairs(pairs, modules.values())
    figure.colorbar(drawn, ax=pairs, shrink=0.8, label="mean over modules")
    figure.savefig(path)


def _spectra(axes: Any, modules: Iterable[Mapping[str, Any]]) -> None:
    modules = list(modules)
    for key, color, label in (
        ("singular_values", "#1f77b4", "ΔW"),
        ("singular_values_linear", "#d1495b", "BA alone"),
    ):
        # Of both the largest of ΔW is 1.
        own = [numpy.array(one[key]) / one["singular_values"][0] for one in modules]
        _lines(axes, own, color, label)
    for key, style, label in (("r", "--", "r"), ("expanded_rank", ":", "K")):
        for at in sorted({one[key] for one in modules}):
            axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"{label} = {at}")
    _describe(axes)


def _lines(axes: Any, spectra: list[numpy.ndarray], color: str, label: str) -> None:
    """Every spectrum lightly, and at each k the median of those that reach it."""
    wide = numpy.full((len(spectra), max(map(len, spectra))), numpy.nan)
    for row, own in zip(wide, spectra, strict=True):
        row[: len(own)] = numpy.where(own > SMALLEST, own, numpy.nan)
    # What none reaches is left out.
    wide = wide[:, ~numpy.isnan(wide).all(0)]
    k = numpy.arange(1, wide.shape[1] + 1)
    axes.plot(k, wide.T, color=color, alpha=0.15 if len(wide) > 1 else 0.0, linewidth=1)
    axes.plot(k, numpy.nanmedian(wide, 0), color=color, linewidth=2.5, label=label)


def _describe(axes: Any) -> None:
    axes.set(xscale="log", yscale="log", xlabel="k", ylabel="σ_k / σ_1 of ΔW")
    axes.set_title("Singular values: every one, and their median")
    axes.grid(alpha=0.3)
    axes.legend()


def _shares(axes: Any, modules: Mapping[str, Mapping[str, Any]]) -> None:
    norms = numpy.array(
        [[one[f"{part}_norm"] or 0.0 for part in PARTS] for one in modules.values()]
    )
    shares = norms / norms.sum(1, keepdims=True)
    at, left = numpy.arange(len(modules)), numpy.zeros(len(modules))
    for own, (part, color) in zip(shares.T, PARTS.items(), strict=True):
        axes.barh(at, own, left=left, height=1.0, color=color, label=part)
        left += own
    axes.set_title("Norms of the three parts of ΔW, as shares of their sum")
    axes.set(xlim=(0, 1), ylim=(len(modules) - 0.5, -0.5), ylabel="module")
    # Inside the bars, where long names take no room from the axes.
    for number, name in enumerate(modules if len(modules) <= NAMES else ()):
        axes.text(0.01, number, name, va="center", fontsize=7, parse_math=False)
    axes.legend(loc="lower right")


def _pairs(axes: Any, modules: Iterable[Mapping[str, Any]]) -> Any:
    modules = [one for one in modules if one["linear_norm"]]
    size = max((one["r"] for one in modules), default=1)
    matrices = numpy.full((len(modules), size, size), numpy.nan)
    for matrix, one in zip(matrices, modules, strict=True):
        r, norms = one["r"], torch.tensor(one["term_norms"], dtype=torch.float64)
        own = spectrum.interaction(norms, r, one["terms"]) / one["linear_norm"]
        matrix[:r, :r] = own.numpy()
    axes.set_title("Pairs: ‖h_ij (b_i∘b_j)(a_i∘a_j)ᵀ‖ / ‖BA‖")
    axes.set(xlabel="i, from the strongest direction", ylabel="j")
    axes.grid(False)
    mean = numpy.nanmean(matrices, 0) if modules else numpy.zeros((1, 1))
    return axes.imshow(mean, cmap="viridis", vmin=0.0)


def update(sigmas: Mapping[str, torch.Tensor], path: Path) -> None:
    """Singular values of every update, and the share of ‖ΔW‖² in the first of them."""
    spectra = [own.double().numpy() for own in sigmas.values()]
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"ΔW of {len(spectra)} weights")
    _lines(left, [own / own[0] for own in spectra], "#1f77b4", "ΔW")
    k = numpy.arange(1, max(map(len, spectra)) + 1)
    for power, style in ((0.5, "--"), (1.0, ":")):
        left.plot(k, k**-power, color="black", linestyle=style, linewidth=1, label=f"k^−{power:g}")
    _describe(left)
    left.set(ylim=(1e-4, 1.5))
    _lines(right, [(own**2).cumsum() / (own**2).sum() for own in spectra], "#1f77b4", "ΔW")
    right.set(xscale="log", ylim=(0, 1), xlabel="k", ylabel="share of ‖ΔW‖²")
    right.set_title("What the first k directions carry")
    right.grid(alpha=0.3)
    figure.savefig(path)
