"""One case of a layer from the gate to its rows: judge, build, count memory, time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pera_kernels.testing import Case, make_inputs

from . import roofline, timing
from .contenders import FROZEN, OURS, Contender, Layer
from .gate import judge_all
from .memory import memory
from .peers import PEERS
from .rows import Row, of_case

__all__ = [
    "CONTENDERS",
    "DEFAULT",
    "PHASES",
    "measure_phase",
    "phase_call",
    "run_case",
    "select",
]

PHASES = ("forward", "backward", "both", "eval")
CONTENDERS = {own.name: own for own in (*OURS, *PEERS)}
# Timed if --only names them: "auto" is one of the backends, compiling takes long for every case,
# and composing rounds W0 + ΔW in half precision.
ON_REQUEST = ("reference-compiled", "torch", "torch-composed", "triton", "triton-composed")
DEFAULT = tuple(name for name in CONTENDERS if name not in ON_REQUEST)
MIB = 2**20


def select(
    case: Case, device: torch.device, names: Collection[str]
) -> tuple[list[Contender], dict[str, str]]:
    """Who is timed, and why others who were meant are not. The frozen layer always is, first."""
    chosen, reasons = [], {}
    for name, contender in CONTENDERS.items():
        if name not in (FROZEN, *names):
            continue
        if reason := contender.unavailable(case, device):
            reasons[name] = reason
        else:
            chosen.append(contender)
    return chosen, reasons


def phase_call(layer: Layer, x: torch.Tensor, dy: torch.Tensor, phase: str) -> timing.Call:
    """A call of one phase; a "backward" runs again and again over one forward.

    The layer is left in evaluation mode for "eval", which computes y alone, and in training mode
    for the others. A "step" is forward, backward and AdamW on what is trained.
    """
    module, trained = layer.module, list(layer.trains.values())
    module.train(phase != "eval")
    if phase == "forward":
        return lambda: module(x)
    if phase == "eval":
        return torch.no_grad()(lambda: module(x))
    if phase == "both":
        return lambda: torch.autograd.grad(module(x), [x, *trained], dy)
    if phase == "backward":
        y = module(x)
        return lambda: torch.autograd.grad(y, [x, *trained], dy, retain_graph=True)
    # A captured step must not read the number of steps from the host.
    optimizer = torch.optim.AdamW(trained, 1e-4, capturable=x.is_cuda) if trained else None

    def step() -> None:
        module(x).backward(dy)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None

    return step


def memory_keys(
    layer: Layer, x: torch.Tensor, dy: torch.Tensor, phase: str, device: torch.device
) -> Row:
    """What the forward keeps for the backward besides inputs, parameters and y, and the most that a
    call holds above inputs and parameters; in a backward that includes what the forward kept.
    """
    forward = phase_call(layer, x, dy, "forward")
    # What is made once, such as an index table or an optimizer's state, is made in a first call.
    forward()
    kept = memory(forward, device).held
    call = phase_call(layer, x, dy, phase)
    call()
    peak = memory(call, device).peak + (kept if phase == "backward" else 0)
    # CUDA's allocator rounds sizes up: y may count for a little more than it is.
    return {"peak_mib": peak / MIB, "saved_mib": max(0, kept - dy.nbytes) / MIB}


def measure_phase(
    built: Mapping[timing.Name, Sequence[Layer]],
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    phase: str,
    rounds: int,
    eager: Collection[timing.Name] = (),
) -> dict[timing.Name, Row]:
    """The measured keys of a row for each name, the frozen layer's first; everybody has a layer for
    each x and dy.
    """
    device = inputs[0][0].device
    memories = {name: memory_keys(own[0], *inputs[0], phase, device) for name, own in built.items()}
    calls = {
        name: [phase_call(layer, x, dy, phase) for layer, (x, dy) in zip(own, inputs, strict=True)]
        for name, own in built.items()
    }
    timings = timing.time_calls(calls, rounds, device, eager)
    frozen = next(iter(timings.values()))
    found = {}
    for name, own in timings.items():
        host = timing.host_us(calls[name][0], device)
        ratio = {"ratio_to_frozen": own.ratio_to(frozen), "host_us": host}
        if own.eager is not None and frozen.eager is not None:
            ratio["eager_ratio_to_frozen"] = own.eager.ratio_to(frozen.eager)
        found[name] = {**own.keys(), **ratio, **memories[name]}
    return found


def run_case(
    case: Case,
    chosen: Sequence[Contender],
    phases: Sequence[str],
    rounds: int,
    ceilings: roofline.Ceilings,
    environment: Mapping[str, Any],
) -> Iterator[Row]:
    """Rows as they are measured: those that failed the gate, then those that were timed."""
    device = ceilings.device
    if CONTENDERS["reference-compiled"] in chosen:
        # Compiled code of other cases would count against the limit on recompilation.
        torch.compiler.reset()
    inputs = make_inputs(case, device)
    judged = judge_all(chosen, case, inputs, device)

    def row(own: Contender, phase: str, **measured: Any) -> Row:
        key = {"contender": own.name, "plan": own.plan, **of_case(case), "phase": phase}
        error = {"error_ratio": judged[own.name].error_ratio}
        return {**key, **error, **environment, **measured}

    for own in chosen:
        if failure := judged[own.name].failure:
            yield row(own, "gate", status="failed", note=failure)
    sound = {own.name: own for own in chosen if not judged[own.name].failure}
    # As many copies as it takes to miss the cache; a forward reads at least x and the weight.
    count = timing.set_count(inputs.x.nbytes + inputs.weight.nbytes, device)
    sets = [replace(inputs, weight=inputs.weight.clone()) for _ in range(count)]
    pairs = [(inputs.x.clone().requires_grad_(), inputs.dy.clone()) for _ in sets]
    built = {name: [own.build(case, given) for given in sets] for name, own in sound.items()}
    for phase in phases:
        able = {
            name: made
            for name, made in built.items()
            if phase != "backward" or sound[name].repeats_backward
        }
        eager = [name for name in able if not sound[name].capturable]
        for name, keys in measure_phase(able, pairs, phase, rounds, eager).items():
            own = sound[name]
            done = roofline.work(own.plan, own.judged_as(case) or case, phase)
            achieved = roofline.speed(done, keys["median_ms"], ceilings, case.dtype)
            yield row(own, phase, **keys, **achieved)
