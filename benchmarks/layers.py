"""One case of a layer from the gate to its rows: judge, build, count memory, time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pera_kernels.testing import Case, Inputs, make_inputs

from . import roofline, timing
from .contenders import FROZEN, OURS, Contender, Layer
from .gate import judge_all
from .memory import memory
from .peers import PEERS
from .rows import Row, of_case

__all__ = ["CONTENDERS", "DEFAULT", "PHASES", "phase_call", "run_case", "select"]

PHASES = ("forward", "backward", "both", "eval")
CONTENDERS = {own.name: own for own in (*OURS, *PEERS)}
# "auto" is one of the backends, the plain reference is recompiled for every case (10 to 15 s), and
# composing rounds W0 + ΔW in half precision: those are timed if --only names them.
DEFAULT = tuple(
    "frozen merged reference peft-lora-amp peft-lora released-amp released auto".split()
)
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


def phase_call(layer: Layer, inputs: Inputs, phase: str) -> timing.Call:
    """A call of one phase; a "backward" runs again and again over one forward.

    The layer is left in evaluation mode for "eval", which computes y alone, and in training mode
    for the others.
    """
    module, x, dy = layer.module, inputs.x, inputs.dy
    module.train(phase != "eval")
    leaves = [x, *layer.trains.values()]
    if phase == "forward":
        return lambda: module(x)
    if phase == "eval":
        return torch.no_grad()(lambda: module(x))
    if phase == "both":
        return lambda: torch.autograd.grad(module(x), leaves, dy)
    y = module(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs in as many places as it takes to miss the cache, x as a leaf."""
    # A forward reads at least these two.
    count = timing.set_count(inputs.x.nbytes + inputs.weight.nbytes, device)
    return [
        replace(
            inputs,
            x=inputs.x.detach().clone().requires_grad_(),
            weight=inputs.weight.clone(),
            dy=inputs.dy.clone(),
        )
        for _ in range(count)
    ]


def _saved_mib(layer: Layer, inputs: Inputs, device: torch.device) -> float:
    """What the forward keeps for the backward besides inputs, parameters and y."""
    forward = phase_call(layer, inputs, "forward")
    # What is made once and kept, such as an index table, is made in the first call.
    y = forward()
    assert isinstance(y, torch.Tensor)
    size = y.nbytes
    del y
    # CUDA's allocator rounds sizes up: y may count for a little more than it is.
    return max(0, memory(forward, device).held - size) / MIB


def _peak_mib(layer: Layer, inputs: Inputs, phase: str, device: torch.device) -> float:
    """The most memory one call holds above inputs and parameters; in a backward that includes the
    output and what the forward kept.
    """
    phase_call(layer, inputs, phase)()
    held = 0
    if phase == "backward":
        held = memory(phase_call(layer, inputs, "forward"), device).held
    return (held + memory(phase_call(layer, inputs, phase), device).peak) / MIB


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
    # Compiled code of other cases would count against the limit on recompilation.
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    judged = judge_all(chosen, case, inputs, device)

    def row(own: Contender, phase: str, **measured: Any) -> Row:
        key = {"contender": own.name, "plan": own.plan, **of_case(case), "phase": phase}
        error = {"error_ratio": judged[own.name].error_ratio}
        return {**key, **error, **environment, **measured}

    for contender in chosen:
        if failure := judged[contender.name].failure:
            yield row(contender, "gate", status="failed", note=failure)
    sound = {own.name: own for own in chosen if not judged[own.name].failure}
    sets = _input_sets(inputs, device)
    layers = {name: [own.build(case, given) for given in sets] for name, own in sound.items()}
    saved = {name: _saved_mib(own[0], sets[0], device) for name, own in layers.items()}
    for phase in phases:
        able = {
            name: own
            for name, own in layers.items()
            if phase != "backward" or sound[name].repeats_backward
        }
        peak = {name: _peak_mib(own[0], sets[0], phase, device) for name, own in able.items()}
        calls = {
            name: [phase_call(*pair, phase) for pair in zip(own, sets, strict=True)]
            for name, own in able.items()
        }
        eager = [name for name in able if not sound[name].capturable]
        timings = timing.time_calls(calls, rounds, device, eager)
        for name, found in timings.items():
            contender, (low, high) = sound[name], found.spread
            own = roofline.work(contender.plan, contender.judged_as(case) or case, phase)
            yield row(
                contender,
                phase,
                median_ms=found.median,
                p20_ms=low,
                p80_ms=high,
                ratio_to_frozen=found.ratio_to(timings[FROZEN]),
                peak_mib=peak[name],
                saved_mib=saved[name],
                host_us=timing.host_us(calls[name][0], device),
                graph=found.graph,
                rounds=len(found.samples),
                note=found.note,
                **roofline.speed(own, found.median, ceilings, case.dtype),
            )
