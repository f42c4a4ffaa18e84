"""`python -m tools.interactions FOLDER`: the paper's interaction matrix (Eq. 12) of a fine-tune.

S_ij = E |∂²f(z) / ∂z_i ∂z_j|, where z is a hidden state of the model and f its output: here z is
what enters the second block at the last position of a window, and f the log-probability of the byte
that follows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pera_kernels as pk
from pera_kernels.cli.arguments import Parser
from tools import documents
from tools.finetune import data
from tools.finetune.__main__ import whole_number
from tools.finetune.model import ByteTransformer

__all__ = ["log_probability", "strength", "table"]

ADAPTERS = {"base": None, "LoRA": "adapter_lora", "PERA full": "adapter_pera_full"}
# Long enough for attention to matter, short enough for second derivatives on a CPU.
CONTEXT = 32
SHOWN = 32


def strength(functions: list[Callable[[Tensor], Tensor]], states: Tensor) -> Tensor:
    """Mean of |Hessian| (width, width) over functions f_n of the states (n, width)."""
    total = torch.zeros(states.shape[-1], states.shape[-1], dtype=states.dtype)
    # The fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for function, state in zip(functions, states, strict=True):
            total += torch.func.hessian(function)(state).abs()
    return total / len(functions)


def log_probability(
    model: ByteTransformer, window: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f and z of one window (context + 1,): the other positions keep their states."""
    tokens, following = window[:-1], window[-1]
    first, rest = model.blocks[0], model.blocks[1:]
    with torch.no_grad():
        states = first(model.embedding(tokens[None]))

    def function(state: Tensor) -> Tensor:
        changed = torch.cat([states[:, :-1], state[None, None]], dim=1)
        logits = model.head(model.final_norm(rest(changed)))[0, -1]
        return F.log_softmax(logits, dim=-1)[following]

    return function, states[0, -1]


def measured(folder: Path, samples: int) -> dict[str, Tensor]:
    """The matrix of the base and of both adapters, on windows of the held-out text.

    Raises:
        OSError, ValueError: a file is missing or not what it should be, or so many windows are not
            there.
    """
    text = data.as_tokens(data.load_corpora().held_out)
    windows = data.consecutive_windows(text, CONTEXT, samples)
    if len(windows) < samples:
        raise ValueError(f"argument --samples: {samples} windows, and the text has {len(windows)}")
    found = {}
    for name, adapter in ADAPTERS.items():
        model = ByteTransformer()
        try:
            model.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
        except (EOFError, KeyError, RuntimeError, TypeError, UnpicklingError) as error:
            reason = " ".join(str(error).split()) or "it is empty"
            raise ValueError(
                f"{folder / 'base.pt'} is no model of the fine-tune: {reason}"
            ) from error
        if adapter is not None:
            pk.load_adapter(model, folder / adapter)
        model.requires_grad_(False).eval()
        functions, states = zip(
            *(log_probability(model, window) for window in windows), strict=True
        )
        found[name] = strength(list(functions), torch.stack(states))
    return found


def off_diagonal(matrix: Tensor) -> float:
    """The mean of what stands beside the diagonal."""
    width = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (width * (width - 1)))


def table(told: dict[str, Any]) -> str:
    """The means of ``interactions.json`` as a part of a page."""
    lines = [
        [name, f"{own['off_diagonal']:.3e}", f"{own['diagonal']:.3e}"]
        for name, own in told["means"].items()
    ]
    head = ["model", "mean beside the diagonal", "mean on it"]
    return f"{documents.table(head, lines)}\n\nOver {told['samples']} windows of the held-out text."


def draw(found: dict[str, Tensor], path: Path) -> None:
    """The first dimensions of each matrix in one scale of colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.2 * len(found), 4), layout="constrained"
    )
    top = max(float(matrix[:SHOWN, :SHOWN].max()) for matrix in found.values())
    for axis, (name, matrix) in zip(axes, found.items(), strict=True):
        image = axis.imshow(matrix[:SHOWN, :SHOWN], vmin=0, vmax=top)
        axis.set(title=f"{name}: mean off the diagonal {off_diagonal(matrix):.3g}", xlabel="i")
    axes[0].set_ylabel("j")
    figure.colorbar(image, ax=axes, label="E |∂²f / ∂z_i ∂z_j|")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 2 for bad use."""
    parser = Parser(
        prog="python -m tools.interactions",
        description="The interaction matrix (Eq. 12, Figure 5) of what tools.finetune left in\n"
        "FOLDER, before and after LoRA and PERA: interactions.png and interactions.json there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what tools.finetune wrote")
    samples = "windows, some seconds each (default: 16)"
    parser.add_argument("--samples", type=whole_number(1), default=16, help=samples)
    options = parser.parse_args(arguments)
    try:
        found = measured(options.folder, options.samples)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    draw(found, options.folder / "interactions.png")
    means = {
        name: {"off_diagonal": off_diagonal(m), "diagonal": float(m.diagonal().mean())}
        for name, m in found.items()
    }
    (options.folder / "interactions.json").write_text(
        json.dumps({"samples": options.samples, "means": means}, indent=1) + "\n"
    )
    for name, own in means.items():
        print(f"{name:<10} off the diagonal {own['off_diagonal']:.4g}, on it {own['diagonal']:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
