"""The contenders at small sizes under pytest-benchmark, to compare one commit with another."""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest benchmarks needs pytest-benchmark")

from benchmarks.contenders import CONTENDERS, find
from benchmarks.gate import Gate
from benchmarks.timing import PHASES, input_sets, phase_call
from pera_kernels.verify.numerics import Case, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = Case(terms="full", r=8, T=64, N=256, M=256, scale=1.0)


@pytest.mark.parametrize("name", [contender.name for contender in CONTENDERS])
@pytest.mark.parametrize("phase", PHASES)
def test_layer(benchmark, name, phase):
    contender = find(name)
    if reason := contender.unavailable(CASE, DEVICE):
        pytest.skip(reason)
    if phase == "backward" and not contender.repeats_backward:
        pytest.skip("its backward runs only once after a forward")
    assert Gate(CASE, DEVICE).judge_all([contender])[name].failure is None
    inputs = input_sets(make_inputs(CASE, DEVICE), DEVICE)[0]
    call = phase_call(contender.build(CASE, inputs), inputs, phase)

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = phase
    benchmark(finished)
