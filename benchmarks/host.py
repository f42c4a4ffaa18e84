"""Host time of a call: how long Python is busy with a PeraLinear, beside its GEMMs and its kernels.

    python -m benchmarks.host

On a GPU: the time to enqueue a call. Without one, the launchers run on tiny CPU tensors and their
kernels are replaced by nothing, so that what is left is the same Python but for Triton's own
launcher and the CUDA runtime. The parts are differences of nested calls in the same round:

    checks           the module, argument checks, choice of a backend
    autograd         torch.autograd.Function (in the backward: the engine too)
    custom op        dispatch of the torch.library op
    Triton           launching the kernels (GPU only)
    launch path      shapes, tiles, workspaces, arguments of the launches
    base product     F.linear, or dy W0

A frozen nn.Linear and a plain LoRA layer (two more F.linear and an addition) run in the same
rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from pera_kernels import PeraLinear, autograd, backends, functional
from pera_kernels.terms import TERMS

from . import options, results
from .options import OneLineParser, one_of, whole
from .results import Row

__all__ = ["PARTS", "measure", "parts"]

CALLS = 20
PARTS = ("checks", "autograd", "custom op", "Triton", "launch path", "base product")
# What is timed, the outermost first; "silent" is "direct" with kernels that do nothing.
NESTED = ("module", "function", "op", "direct", "silent", "base")
PEERS = ("nn.Linear", "LoRA")
Call = Callable[[], object]


class _Lora(nn.Module):
    """A plain LoRA layer: y = x W0ᵀ + bias + x Aᵀ Bᵀ."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)


class _Silent:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda **arguments: None


@contextmanager
def _silent_kernels() -> Iterator[None]:
    from pera_kernels import launch

    with ExitStack() as stack:
        for name in [name for name in vars(launch) if name.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(launch, name, _Silent()))
        yield


def _arguments_of(
    owner: Any, name: str, original: Any, attribute: str, call: Call
) -> tuple[Any, ...]:
    """The arguments with which ``call`` calls ``original.attribute``, once; ``owner.name`` is where
    it is looked up.
    """
    seen: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return getattr(original, attribute)(*arguments)

    members = {k: getattr(original, k) for k in dir(original) if not k.startswith("__")}
    stand_in = SimpleNamespace(**{**members, attribute: spy})
    replaced = stand_in if name != "implementation" else lambda backend: stand_in
    with mock.patch.object(owner, name, replaced):
        call()
    return seen[-1]


def _calls(
    T: int, features: int, r: int, terms: str, device: torch.device
) -> dict[tuple[str, str], Call]:
    """Everything that is timed, by (name, phase)."""
    from pera_kernels import ops

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    base = nn.Linear(features, features, **make).requires_grad_(False)
    ours = PeraLinear.from_linear(base, r, terms=terms, backend="triton")  # type: ignore[arg-type]
    nn.init.normal_(ours.pera_B)
    if ours.pera_h is not None:
        nn.init.normal_(ours.pera_h)
    lora = _Lora(base, ours.pera_A, ours.pera_B)
    x = torch.randn(T, features, **make, requires_grad=True)
    dy = torch.randn(T, features, **make)
    weight, bias = base.weight, base.bias
    adapter = [p for p in ours.parameters() if p.requires_grad]

    def backward(module: Call, leaves: Sequence[torch.Tensor]) -> Call:
        y = module()
        assert isinstance(y, torch.Tensor)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def forward() -> torch.Tensor:
        return ours(x)

    both = backward(forward, [x, *adapter])
    function = _arguments_of(
        functional, "PeraLinearFunction", autograd.PeraLinearFunction, "apply", forward
    )
    op = _arguments_of(autograd, "implementation", ops, "linear_forward", forward)
    op_back = _arguments_of(autograd, "implementation", ops, "linear_backward", both)
    apply = autograd.PeraLinearFunction.apply

    def bare(call: Call) -> Call:
        # As inside of a Function.
        return torch.no_grad()(call)

    return {
        ("module", "forward"): forward,
        ("function", "forward"): lambda: apply(*function),
        ("op", "forward"): bare(lambda: ops.linear_forward(*op)),
        ("direct", "forward"): bare(lambda: ops.linear_forward._init_fn(*op)),
        ("base", "forward"): bare(lambda: F.linear(x, weight, bias)),
        ("nn.Linear", "forward"): lambda: base(x),
        ("LoRA", "forward"): lambda: lora(x),
        ("module", "backward"): both,
        ("op", "backward"): bare(lambda: ops.linear_backward(*op_back)),
        ("direct", "backward"): bare(lambda: ops.linear_backward._init_fn(*op_back)),
        ("base", "backward"): bare(lambda: dy @ weight),
        ("nn.Linear", "backward"): backward(lambda: base(x), [x]),
        ("LoRA", "backward"): backward(lambda: lora(x), [x, lora.A, lora.B]),
    }


def measure(
    T: int, features: int, r: int, terms: str, device: torch.device, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of every call by round. On a CPU the kernels do nothing throughout."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(_silent_kernels())
        calls = _calls(T, features, r, terms, device)
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        if device.type == "cuda":
            samples |= {("silent", phase): [] for phase in ("forward", "backward")}
        for call in calls.values():
            for _ in range(3):
                call()
        order, shuffle = list(samples), random.Random(0).shuffle
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(rounds):
            shuffle(order)
            for name, phase in order:
                if name != "silent":
                    samples[name, phase].append(_sample(calls[name, phase], device))
                    continue
                with _silent_kernels():
                    samples[name, phase].append(_sample(calls["direct", phase], device))
    return samples


def _sample(call: Call, device: torch.device) -> float:
    """Microseconds until the host has issued a call, the device having nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) * 1e6 / CALLS


def parts(samples: Mapping[tuple[str, str], Sequence[float]], phase: str) -> dict[str, list[float]]:
    """The parts of a PeraLinear's call by round; "total" is all of them."""
    own = {name: samples[name, phase] for name in NESTED if (name, phase) in samples}
    own.setdefault("silent", own["direct"])
    # The function's own time cannot be told from the engine's in the backward.
    own.setdefault("function", own["module"])
    found = {"total": list(own["module"])}
    for part, outer, inner in zip(PARTS, NESTED, NESTED[1:], strict=False):
        found[part] = [a - b for a, b in zip(own[outer], own[inner], strict=True)]
    found["base product"] = list(own["base"])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = parser.add_argument, whole(1)
    add("--device", type=options.device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--T", type=positive, default=16, help="tokens (16)")
    add("--features", type=positive, help="in and out (4096 on a GPU, 64 on a CPU)")
    add("--rank", type=positive, default=16, help="of the adapters (16)")
    add("--terms", type=one_of(TERMS), default="full", help=", ".join(TERMS))
    add("--rounds", type=whole(2), default=50, help=f"of {CALLS} calls each (50)")
    add("--out", type=Path, help="append rows here (benchmarks/results/host-<device>.jsonl)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    device: torch.device = given.device
    if device.type == "cpu":
        # Before the kernels are imported: it makes the launchers take CPU tensors.
        os.environ["TRITON_INTERPRET"] = "1"
        # Waking other threads for tiny products is no part of the launch path.
        torch.set_num_threads(1)
    elif backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are never timed; unset it")
    if (reason := backends.unavailable("triton", device)) is not None:
        parser.error(f"the launch path cannot run: {reason}")
    features = given.features or (4096 if device.type == "cuda" else 64)
    default = results.default_file(device)
    path = given.out or default.with_name(f"host-{default.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        parser.error(f"argument --out: cannot write {path}: {error.strerror}")
    samples = measure(given.T, features, given.rank, given.terms, device, given.rounds)
    rows = _rows(samples, given, features, device)
    results.append(path, rows)
    print(_table(rows, device))
    print(f"rows appended to {path}")
    return 0


def _rows(
    samples: Mapping[tuple[str, str], Sequence[float]],
    given: argparse.Namespace,
    features: int,
    device: torch.device,
) -> list[Row]:
    host = results.host(device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    rows = []
    for phase in ("forward", "backward"):
        found = {f"host:{name}": samples[name, phase] for name in PEERS}
        found |= {f"host:PeraLinear {name}": own for name, own in parts(samples, phase).items()}
        for name, own in found.items():
            rows.append(
                Row(
                    contender=name,
                    plan="dense" if name == "host:nn.Linear" else "factored",
                    terms="linear" if name == "host:LoRA" else given.terms,
                    r=given.rank,
                    T=given.T,
                    n=features,
                    m=features,
                    dtype=dtype,
                    dropout=0.0,
                    phase=phase,
                    host_us=round(statistics.median(own), 2),
                    rounds=given.rounds,
                    note="" if device.type == "cuda" else "kernels replaced by nothing",
                    **asdict(host),
                )
            )
    return rows


def _table(rows: Sequence[Row], device: torch.device) -> str:
    """Microseconds by name and phase; a part that does not exist here is left out."""
    by_name: dict[str, dict[str, float]] = {}
    for row in rows:
        assert row.host_us is not None
        by_name.setdefault(row.contender.removeprefix("host:"), {})[row.phase] = row.host_us
    first = rows[0]
    text = [
        f"{first.device}  torch {first.torch}  triton {first.triton}  commit {first.commit}",
        f"T={first.T} n=m={first.n} {first.dtype} r={first.r}, median microseconds of the host",
        f"{'':<28}{'forward':>10}{'backward':>10}",
    ]
    for name, own in by_name.items():
        if name == "PeraLinear Triton" and device.type == "cpu":
            continue
        # In the backward the engine belongs to what the function is timed with.
        backward = "-" if name == "PeraLinear checks" else f"{own['backward']:.1f}"
        text.append(f"{name:<28}{own['forward']:>10.1f}{backward:>10}")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
