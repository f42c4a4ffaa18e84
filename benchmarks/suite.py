"""One case from the gate to its rows: judge, build, count, time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pera_kernels.verify.numerics import Case, Inputs, make_inputs

from . import overhead, timing, work
from .ceilings import Ceilings
from .gate import Gate
from .layers import FROZEN, Contender, Layer
from .results import Host, Row, case_key, make_row

__all__ = ["is_done", "run_case"]


def run_case(
    case: Case,
    chosen: Sequence[Contender],
    device: torch.device,
    phases: Sequence[str],
    rounds: int,
    host: Host,
    ceilings: Ceilings,
) -> list[Row]:
    """Rows of one case: one for each contender that failed the gate, then those that were timed."""
    # Compiled code of other cases would count against the limit on recompilation.
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    judged = Gate(case, device, inputs).judge_all(chosen)
    rows = [
        make_row(
            contender,
            case,
            host,
            "gate",
            status="failed",
            note=judged[contender.name].failure,
            error_ratio=judged[contender.name].error_ratio,
        )
        for contender in chosen
        if judged[contender.name].failure
    ]
    sound = {c.name: c for c in chosen if not judged[c.name].failure}
    sets = timing.input_sets(inputs, device)
    layers = {name: [own.build(case, given) for given in sets] for name, own in sound.items()}
    saved = {name: timing.saved_mib(own[0], sets[0], device) for name, own in layers.items()}
    for phase in phases:
        able = {
            name: own
            for name, own in layers.items()
            if phase != "backward" or sound[name].repeats_backward
        }
        counted = {name: _counted(own[0], sets[0], phase, device) for name, own in able.items()}
        launched = _launches(able, sets[0], phase, device)
        capturable = frozenset(name for name in able if sound[name].capturable)
        timings = timing.time_phase(
            able, sets, phase, rounds=rounds, device=device, capturable=capturable
        )
        frozen = {found.graph: found for found in timings if found.name == FROZEN}
        for found in sorted(timings, key=lambda found: list(sound).index(found.name)):
            contender, like = sound[found.name], frozen.get(found.graph)
            rows.append(
                make_row(
                    contender,
                    case,
                    host,
                    phase,
                    **_times(found, like),
                    **counted[found.name],
                    launches=launched[found.name],
                    saved_mib=saved[found.name],
                    error_ratio=judged[found.name].error_ratio,
                    **_speed(contender, case, phase, found.median, ceilings),
                )
            )
    return rows


def _counted(layer: Layer, inputs: Inputs, phase: str, device: torch.device) -> dict[str, Any]:
    return {
        "peak_mib": timing.peak_mib(layer, inputs, phase, device),
        "host_us": overhead.host_us(timing.phase_call(layer, inputs, phase), device),
    }


def _launches(
    layers: dict[str, list[Layer]], inputs: Inputs, phase: str, device: torch.device
) -> dict[str, int | None]:
    calls = {name: timing.phase_call(own[0], inputs, phase) for name, own in layers.items()}
    return overhead.launches(calls, device)


def _times(found: timing.Timing, frozen: timing.Timing | None) -> dict[str, Any]:
    low, high = found.spread
    return {
        "median_ms": found.median,
        "p20_ms": low,
        "p80_ms": high,
        "ratio_to_frozen": None if frozen is None else found.ratio_to(frozen),
        "graph": found.graph,
        "rounds": len(found.samples),
        "note": found.note,
    }


def _speed(
    contender: Contender, case: Case, phase: str, median_ms: float, ceilings: Ceilings
) -> dict[str, float]:
    """What the contender's own formula has to do, over the time it took, beside the ceilings."""
    own = work.of(contender.plan, contender.judged_as(case) or case, phase)
    seconds = median_ms / 1e3
    tflops, gbps = ceilings.tflops(case.dtype), ceilings.gbps()
    return {
        "tflops": own.flops / seconds / 1e12,
        "gbps": own.bytes / seconds / 1e9,
        "roofline_share": own.roofline_seconds(tflops, gbps) / seconds,
        "ceiling_tflops": tflops,
        "ceiling_gbps": gbps,
    }


def is_done(
    case: Case,
    chosen: Sequence[Contender],
    phases: Iterable[str],
    host: Host,
    rows: Sequence[dict[str, Any]],
) -> bool:
    """Whether these rows of an earlier run of the same commit and device hold all of a case."""
    wanted = {**case_key(case), "device": host.device, "commit": host.commit}
    found = {
        (row["contender"], row["phase"])
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    }
    return all(
        (contender.name, phase) in found or (contender.name, "gate") in found
        for contender in chosen
        for phase in phases
        if phase != "backward" or contender.repeats_backward
    )
