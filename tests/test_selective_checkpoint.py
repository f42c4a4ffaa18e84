"""Selective activation checkpoints: a policy sees our ops, and what it saves is not made again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pera_kernels as pk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
OURS = "pera_kernels::forward"


def model_of(backend, dtype=torch.float32, **options):
    layers = nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 32)
    model = nn.Sequential(*layers).to(DEVICE, dtype)
    pk.inject(model, ["0", "2"], 4, backend=backend, **options)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def selective(model, saved, seen=None):
    """The model under a policy that saves these operators."""

    def policy(context, operator, *args, **kwargs):
        if seen is not None:
            seen.add(operator.name())
        keeps = operator.name() in saved
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def results(model, run, tokens=30):
    """y and all gradients, with the same input and masks at every call."""
    torch.manual_seed(3)
    dtype = model[0].weight.dtype
    x = torch.randn(tokens, 32, dtype=dtype, device=DEVICE, requires_grad=True)
    y = run(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *pk.adapter_parameters(model)])]


@pytest.mark.parametrize("saved", [PRODUCTS, (OURS,), ()], ids=["products", "ours", "nothing"])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": "x"},
        {"dropout": 0.3},
        *(
            pytest.param(own, marks=pytest.mark.slow)
            for own in ({}, {"plan": "composed"}, {"dtype": torch.bfloat16})
        ),
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_results_are_those_without_it(options, saved, backend):
    model, seen = model_of(backend, **options), set()
    # The torch backend adds its update otherwise where there are few rows.
    for tokens in (5, 30) if backend == "torch" else (5,):
        expected = results(model, model, tokens)
        got = results(model, selective(model, saved, seen), tokens)
        assert all(map(torch.equal, got, expected))
    # The whole layer is one operator of the kernels'.
    assert (OURS in seen) == (backend == "triton")
    assert ("aten::addmm" in seen) == (backend == "torch")


class Products(TorchDispatchMode):
    """Counts the products that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in (*PRODUCTS, "aten::addmm_")
        return func(*args, **(kwargs or {}))


def test_products_that_are_saved_are_not_made_again():
    model = model_of("torch")

    def count(run):
        with Products() as products:
            results(model, run)
        return products.count

    # Of each of two layers the base's product, u and the update, which is added in place.
    once = count(model)
    assert count(selective(model, ())) == once + 6
    assert count(selective(model, PRODUCTS)) == once + 2


@pytest.mark.parametrize("saved, calls", [((OURS,), 2), ((), 4)])
def test_a_saved_forward_of_the_kernels_is_not_launched_again(
    saved, calls, triton_backend, monkeypatch
):
    from pera_kernels.kernels import ops, steps

    launched, run = [], ops.run
    monkeypatch.setattr(ops, "run", lambda op, *rest: launched.append(op) or run(op, *rest))
    model = model_of(triton_backend)
    results(model, selective(model, saved))
    assert launched.count(steps.forward) == calls and launched.count(steps.backward) == 2
