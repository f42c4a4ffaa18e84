"""Compile what the benchmarks will launch, in parallel and ahead of them, into Triton's cache.

The ops run on tensors without storage, as in ``benchmarks``' default GPU preset, its decoder layer
and its kernels; every distinct launch is then compiled once (see ``offline``). No GPU is used; the
one that is here, or ``--arch``, says for what.

    python -m tools.tune.precompile --for layers,kernels --jobs 16
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.options import OneLineParser, list_of, one_of, whole
from benchmarks.presets import PRESETS, plan
from pera_kernels import backends, configs, ops
from pera_kernels.terms import coefficient_count
from pera_kernels.verify.numerics import Case

from .chips import architecture, chip_here, chip_named
from .offline import Chip, Compilers, Recorded, recording
from .problems import Operands, representative

__all__ = ["launches"]

# In x out features of a Llama-3-8B decoder layer's adapted projections: q, k and v, up, down.
DECODER = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
DECODER_GROUP = (4096, (4096, 1024, 1024))
DECODER_TOKENS = 4 * 2048


def _meta(*shape: int, of: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=of, device="meta")


def _adapter(case: Case, M: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dtype = case.factor_dtype
    count = coefficient_count(case.r, case.terms)
    h = None if case.terms == "linear" else _meta(count, of=dtype)
    return _meta(case.r, case.N, of=dtype), _meta(M, case.r, of=dtype), h


def _seed(case: Case) -> torch.Tensor | None:
    return _meta(1, of=torch.int64) if case.dropout_p > 0.0 else None


def _layer(case: Case, composed: bool) -> None:
    """Forward and backward of a layer, as the autograd boundary calls them."""
    A, B, h = _adapter(case, case.M)
    x, dy = _meta(case.T, case.N, of=case.dtype), _meta(case.T, case.M, of=case.dtype)
    weight = _meta(case.M, case.N, of=case.dtype)
    rest = (A, B, h, _seed(case), case.scale, case.terms, case.dropout_p, composed)
    _, u = ops.linear_forward._init_fn(x, weight, None, None, *rest)
    needs = [True, True, True, h is not None]
    ops.linear_backward._init_fn(dy, x, None if composed else u, weight, *rest, needs)


def _group(case: Case, out_features: Sequence[int]) -> None:
    """The same of projections that share their input."""
    adapters = [_adapter(case, M) for M in out_features]
    As, Bs, hs = (list(own) for own in zip(*adapters, strict=True))
    x = _meta(case.T, case.N, of=case.dtype)
    weights = [_meta(M, case.N, of=case.dtype) for M in out_features]
    rest = (_seed(case), case.scale, case.terms, case.dropout_p)
    none = [None] * len(weights)
    *_, u = ops.group_forward._init_fn(x, weights, none, As, Bs, hs, *rest)
    dys = [_meta(case.T, M, of=case.dtype) for M in out_features]
    needs = [True] * (1 + 3 * len(weights))
    ops.group_backward._init_fn(dys, x, u, weights, As, Bs, hs, *rest, needs)


def _layers() -> None:
    for planned in plan(PRESETS["gpu"].grids["cuda"], {}):
        _layer(planned.case, composed=False)
        if planned.case.dtype == torch.float32 and planned.case.dropout_p == 0.0:
            _layer(planned.case, composed=True)
        # Merging forms ΔW in float32.
        A, B, h = _adapter(replace(planned.case, adapter_dtype=torch.float32), planned.case.M)
        ops.delta_forward._init_fn(A, B, h, planned.case.scale, planned.case.terms)


def _decoder() -> None:
    for adapter_dtype in (torch.bfloat16, torch.float32):
        case = Case(
            r=16, T=DECODER_TOKENS, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, scale=1.0
        )
        for N, M in DECODER:
            _layer(replace(case, N=N, M=M), composed=False)
        _group(replace(case, N=DECODER_GROUP[0]), DECODER_GROUP[1])


def _kernels() -> None:
    for kernel in configs.KERNELS:
        for problem in representative(kernel, "half"):
            Operands(problem, "meta").launch()


PURPOSES = {"layers": _layers, "decoder": _decoder, "kernels": _kernels}


def launches(purposes: Sequence[str], chip: Chip) -> list[Recorded]:
    """Every launch of these purposes, in order, repeated ones too."""
    found: list[Recorded] = []
    with recording(chip, found):
        for purpose in purposes:
            PURPOSES[purpose]()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m tools.tune.precompile",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = tuple(PURPOSES)
    add = parser.add_argument
    add("--for", dest="purposes", type=list_of(one_of(names)), default=names, metavar="NAME,...")
    add("--arch", type=architecture, default="auto", help="for a GPU that is not here")
    add("--jobs", type=whole(1), default=os.cpu_count() or 1, help="in so many processes")
    add("--budget", type=whole(1), metavar="SECONDS", help="stop then, with what there is")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if backends.interpreting():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    try:
        chip = chip_here() if given.arch == "auto" else chip_named(given.arch)
    except ValueError as error:
        parser.error(f"argument --arch: {error}")
    began = time.monotonic()
    end = began + (given.budget or 1e9)
    found = launches(given.purposes, chip)
    wanted = list(dict.fromkeys(own.launch for own in found))
    done, refused = 0, 0
    with Compilers(chip, min(given.jobs, len(wanted))) as compilers:
        for launch, compiled in compilers.compile(wanted):
            done += 1
            if compiled.problem:
                refused += 1
                print(f"{launch.kernel}: {compiled.problem}", file=sys.stderr)
            if time.monotonic() > end:
                break
    print(
        f"{done} of {len(wanted)} distinct launches of {len(found)} compiled for {chip.arch} "
        f"in {time.monotonic() - began:.0f} s, {refused} with a problem"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
