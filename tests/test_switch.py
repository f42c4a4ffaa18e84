"""Who a disabled layer is disabled for, and what a checkpoint computes again."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.adapted import dx, layer


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward", "both", "inside", "nested", "twice"])
def test_a_checkpoint_computes_again_what_its_forward_computed(where, reentrant):
    """Disabled around the forward, the backward or both, or within what is computed again."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)

    def partly(x):
        with own.disabled():
            first = own(x)
        return first + own(x)

    run = {"inside": partly, "nested": lambda x: checkpoint(own, x, use_reentrant=reentrant)}
    run = {**run, "twice": partly}.get(where, own)
    around = own.disabled if where in ("forward", "both", "nested", "twice") else nullcontext
    with around():
        plain = dx(x, lambda: run(x).square().sum().backward())

    def checkpointed():
        with around():
            y = checkpoint(run, x, use_reentrant=reentrant)
            if where == "both":
                return y.square().sum().backward()
        with own.disabled() if where == "backward" else nullcontext():
            y.square().sum().backward()

    try:
        got = dx(x, checkpointed)
    except torch.utils.checkpoint.CheckpointError:
        assert not reentrant
    else:
        torch.testing.assert_close(got, plain)


def test_disabled_is_of_a_thread_and_not_of_a_copy():
    own, x, got = layer(), torch.randn(3, 8), {}
    enabled = own(x)

    def in_a_thread(name, module):
        def call():
            got[name] = module(x)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with own.disabled():
        got["here"] = own(x)
        in_a_thread("thread", own)
        got["copy"] = copy.deepcopy(own)(x)
        got["pickle"] = pickle.loads(pickle.dumps(own))(x)
        # What nn.DataParallel calls in its threads.
        replica = own._replicate_for_data_parallel()
        replica._parameters.update(own._parameters)
        in_a_thread("replica", replica)
    base = nn.functional.linear(x, own.weight, own.bias)
    for name in ("here", "replica"):
        assert torch.equal(got[name], base), name
    for name in ("thread", "copy", "pickle"):
        assert torch.equal(got[name], enabled), name
    assert torch.equal(own(x), enabled)


def test_a_reference_pass_within_disabled_leaves_training_as_it_is():
    """As in preference tuning: a pass without the adapter, then a step with it."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    plain = dx(x, lambda: own(x).square().sum().backward())
    for _ in range(2):
        with own.disabled(), torch.no_grad():
            checkpoint(own, x, use_reentrant=True)
        again = dx(x, lambda: checkpoint(own, x, use_reentrant=True).square().sum().backward())
        torch.testing.assert_close(again, plain)


def test_disabled_does_not_reach_other_threads():
    """Not in what they compute in a backward, nor after a thread that never left."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    plain, got = dx(x, lambda: own(x).square().sum().backward()), []
    entered, release = threading.Event(), threading.Event()

    def inside():
        with own.disabled():
            entered.set()
            release.wait(10)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(10)
    for reentrant in (True, False):
        again = checkpoint(own, x, use_reentrant=reentrant)
        torch.testing.assert_close(dx(x, lambda y=again: y.square().sum().backward()), plain)
    release.set()
    thread.join()
    left_open = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: left_open.append(own.disabled().__enter__()))
        thread.start()
        thread.join()
        thread = threading.Thread(target=lambda: got.append(own(x)))
        thread.start()
        thread.join()
    assert all(torch.equal(y, own(x)) for y in got) and len(got) == 3


class Again(torch.autograd.Function):
    """As a checkpoint of another library: the names of its arguments are its own."""

    @staticmethod
    def forward(context, module, x):
        context.module, context.x = module, x.detach()
        return module(x.detach())

    @staticmethod
    def backward(context, dy):
        x = context.x.requires_grad_()
        with torch.enable_grad():
            y = context.module(x)
        return None, torch.autograd.grad(y, x, dy)[0]


def test_a_function_that_calls_a_layer_again_finds_its_forward():
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    with own.disabled():
        plain = dx(x, lambda: own(x).square().sum().backward())
        y = Again.apply(own, x)
    torch.testing.assert_close(dx(x, lambda: y.square().sum().backward()), plain)
