"""The memory of a call, counted on allocations whose sizes are known."""

import os

import pytest
import torch

from benchmarks.memory import memory

MIB = 2**20


def block(mib, device):
    return torch.empty(mib * MIB, dtype=torch.uint8, device=device)


def test_peak_and_held_of_a_known_pattern(device):
    def call():
        first, second = block(1, device), block(2, device)
        del first
        third = block(4, device)
        del second
        return third

    found = memory(call, device)
    assert (found.held, found.peak) == (4 * MIB, 6 * MIB)


def test_what_was_there_before_does_not_count(device):
    before = block(8, device)

    def call():
        return before[: MIB // 2].clone()

    assert memory(call, device).peak == MIB // 2
    assert memory(lambda: None, device).peak == 0
    assert before.numel() == 8 * MIB


def test_a_backward_is_counted_with_its_gradients(device):
    x = torch.randn(256, 1024, device=device, requires_grad=True)
    # x.exp() keeps its result; the backward's product is as large again.
    found = memory(lambda: torch.autograd.grad(x.exp(), x, torch.ones_like(x)), device)
    assert found.held == x.nbytes
    # The ones, the result of exp and its gradient live together.
    assert found.peak == 3 * x.nbytes


def test_an_exception_passes_and_leaves_the_profiler_stopped(device):
    def call():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        memory(call, device)
    assert memory(lambda: block(1, device), device).peak == MIB


def test_standard_error_is_left_as_it_was(device, capfd):
    memory(lambda: block(1, device), device)
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"
