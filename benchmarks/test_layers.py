"""The contenders at small sizes under pytest-benchmark, to compare one commit with another."""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest benchmarks needs pytest-benchmark")

from benchmarks.gate import judge_all
from benchmarks.layers import CONTENDERS, PHASES, phase_call
from pera_kernels.testing import Case, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = Case(terms="full", r=8, T=64, N=256, M=256, scale=1.0)


@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=CONTENDERS)
@pytest.mark.parametrize("phase", PHASES)
def test_layer(benchmark, contender, phase):
    if reason := contender.unavailable(CASE, DEVICE):
        pytest.skip(reason)
    if phase == "backward" and not contender.repeats_backward:
        pytest.skip("its backward runs only once after a forward")
    inputs = make_inputs(CASE, DEVICE)
    assert judge_all([contender], CASE, inputs, DEVICE)[contender.name].failure is None
    inputs.x.requires_grad_()
    call = phase_call(contender.build(CASE, inputs), inputs.x, inputs.dy, phase)

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = phase
    benchmark(finished)
