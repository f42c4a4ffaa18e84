"""The work of a layer against counts made another way."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pera_kernels as pk
from benchmarks import work
from benchmarks.contenders import CONTENDERS
from pera_kernels.verify.numerics import Case, make_inputs

CASE = Case(terms="full", r=4, T=10, N=24, M=16, scale=1.0)
K, L = 14, 10


def products(case, phase):
    """Matrix products of the reference in floating-point operations, as PyTorch counts them."""
    inputs = make_inputs(case)
    A, B, h = (t if t is None else t.requires_grad_() for t in (inputs.A, inputs.B, inputs.h))
    x = inputs.x.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = pk.pera_linear(x, inputs.weight, A, B, h, terms=case.terms, backend="reference")
    if phase == "forward":
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, [t for t in (x, A, B, h) if t is not None], inputs.dy)
    return backward.get_total_flops()


@pytest.mark.parametrize("terms", ["full", "square", "cross", "linear"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_matrix_products_are_those_that_pytorch_counts(terms, phase):
    case = replace(CASE, terms=terms)
    pairs = {"full": 10, "square": 4, "cross": 6, "linear": 0}[terms]
    elementwise = {
        "forward": pairs * (24 + 16 + 10),
        "backward": pairs * (4 * 24 + 4 * 16 + 3 * 10),
    }
    assert work.of("factored", case, phase).flops == products(case, phase) + elementwise[phase]


def test_formulas_by_plan():
    dense = 2 * 10 * 24 * 16
    assert work.of("dense", CASE, "forward").flops == dense
    assert work.of("dense", CASE, "both").flops == 2 * dense
    composed = dense + 2 * K * 24 * 16 + L * (24 + 2 * 16) + 24 * 16
    assert work.of("composed", CASE, "forward").flops == composed
    assert work.of("composed", CASE, "eval") == work.of("composed", CASE, "forward")
    assert work.of("auto", CASE, "both") == work.of("factored", CASE, "both")
    for plan in ("dense", "factored", "composed"):
        parts = work.of(plan, CASE, "forward") + work.of(plan, CASE, "backward")
        assert work.of(plan, CASE, "both") == parts


def test_bytes_are_those_of_operands_and_results():
    case = replace(CASE, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    inputs = make_inputs(case)
    adapter = inputs.A.nbytes + inputs.B.nbytes + inputs.h.nbytes
    x, dy, weight = inputs.x.nbytes, inputs.dy.nbytes, inputs.weight.nbytes
    forward = x + weight + inputs.bias.nbytes + dy
    assert work.of("dense", case, "forward").bytes == forward
    assert work.of("factored", case, "forward").bytes == forward + adapter
    assert work.of("dense", case, "backward").bytes == dy + weight + x
    assert work.of("factored", case, "backward").bytes == dy + weight + 2 * x + 2 * adapter


def test_the_roofline_takes_the_slower_of_its_two_sides():
    one = work.Work(flops=2 * 10**12, bytes=10**9)
    assert one.roofline_seconds(tflops=1.0, gbps=1.0) == 2.0
    assert one.roofline_seconds(tflops=4.0, gbps=1.0) == 1.0


def test_every_contender_has_a_plan_whose_work_is_known():
    assert {own.plan for own in CONTENDERS} == {"dense", "factored", "composed", "auto"}
    lora = next(own for own in CONTENDERS if own.name == "peft-lora")
    assert lora.judged_as(CASE).terms == "linear"
