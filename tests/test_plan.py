"""A repeated call of the Triton backend goes by a plan: the same bits as the ordinary path.

In the interpreter a stand-in for compiled kernels takes what a plan hands over, numbers for
pointers; on a GPU it is the real thing.
"""

import ctypes
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pera_kernels as pk
from pera_kernels.backends import unavailable
from pera_kernels.kernels import interpreting
from pera_kernels.operands import Base, Factors, Options, Saved
from pera_kernels.terms import coefficient_count

if (reason := unavailable("triton", torch.device("cuda"))) is not None:
    pytest.skip(reason, allow_module_level=True)

from pera_kernels.kernels import ops, plan, tiles


class Interpreted:
    """An interpreted kernel that is started as a compiled one is."""

    def __init__(self, launch):
        self.kernel, self.dtypes = (
            launch.kernel,
            [
                _map(
                    lambda v: v.dtype if isinstance(v, torch.Tensor) else None,
                    launch.arguments[name],
                )
                for name in launch.kernel.arg_names
            ],
        )

    def __getitem__(self, grid):
        def started(*arguments, stream):
            self.kernel[grid](*map(_pointed, arguments, self.dtypes))

        return started


def _map(function, value):
    if isinstance(value, tuple):
        return tuple(_map(function, own) for own in value)
    return function(value)


def _pointed(value, dtype):
    """A tensor of one element at this address, where there is a dtype."""
    if isinstance(dtype, tuple):
        return tuple(map(_pointed, value, dtype))
    if dtype is None:
        return value
    memory = (ctypes.c_byte * dtype.itemsize).from_address(value)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """The remembered plans, none at first."""
    remembered = {}
    monkeypatch.setattr(plan, "_plans", remembered)
    if interpreting():
        started = plan.start

        def start(launch):
            kernel = Interpreted(launch)
            started(launch)
            return kernel

        monkeypatch.setattr(plan, "start", start)
        monkeypatch.setattr(plan, "plannable", lambda device: True)
        active = SimpleNamespace(get_current_stream=lambda device: 0)
        monkeypatch.setattr(plan, "driver", SimpleNamespace(active=active))
    return remembered


def made(plans):
    return [own for own in plans.values() if own is not None]


def ordinary(call):
    """What a call gives without a plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "plannable", lambda device: False)
        return call()


def same(call, plans, count):
    """The first, the second and a later call of what ``call`` makes, with new values each time."""
    for seed in range(3):
        torch.manual_seed(seed)
        expected = ordinary(call)
        torch.manual_seed(seed)
        got = call()
        assert len(made(plans)) == (count if seed else 0)
        for mine, own in zip(got, expected, strict=True):
            assert torch.equal(mine, own) and mine.stride() == own.stride()
            assert mine.dtype == own.dtype


def problem(device, dtype, own, terms, T=5, N=32, M=18, r=3):
    draw = lambda *shape, of=dtype: torch.randn(*shape, device=device).to(of)  # noqa: E731
    h = None if terms == "linear" else draw(coefficient_count(r, terms), of=own)
    adapter = Factors(draw(r, N, of=own), draw(M, r, of=own), h)
    return draw(T, N), draw(T, M), draw(M, N), draw(M), adapter


def step(device, dtype=torch.float32, own=torch.float32, terms="full", needs=None, **more):
    """Forward and backward on fresh tensors, flat."""
    plan, keep = more.pop("plan", "factored"), more.pop("keep", "u")
    options = Options(terms, 0.7, backend="triton", plan=plan, keep=keep)
    x, dy, weight, bias, adapter = problem(device, dtype, own, terms, **more)
    needs = needs or [True, True, True, adapter.h is not None]
    (y,), (u,) = ops.forward(x, [Base(weight, bias)], [adapter], None, options)
    kept = None if plan == "composed" or keep == "x" else u
    saved = Saved(x, kept, weight, adapter, None)
    return [y, u, *ops.backward(dy, saved, options, needs)]


@pytest.mark.parametrize(
    "terms, dtype, own",
    [
        ("full", torch.float32, torch.float32),
        ("full", torch.bfloat16, torch.float32),
        ("square", torch.bfloat16, torch.bfloat16),
        ("cross", torch.float16, torch.float16),
        ("linear", torch.bfloat16, torch.float32),
    ],
)
def test_a_layer(dtype, own, terms, device, plans):
    same(lambda: step(device, dtype, own, terms), plans, 2)


@pytest.mark.parametrize(
    "needs",
    [needs for needs in itertools.product([False, True], repeat=4) if sum(needs) in (1, 3)],
)
def test_whatever_needs_a_gradient(needs, device, plans):
    def call():
        results = step(device, needs=list(needs))
        return results[:2] + [own for own, need in zip(results[2:], needs, strict=True) if need]

    same(call, plans, 2)


def test_composed(device, plans):
    same(lambda: step(device, plan="composed"), plans, 2)


@pytest.mark.parametrize("keep", ["u", "x"])
def test_expansions_in_memory(keep, device, plans, monkeypatch):
    monkeypatch.setattr(tiles, "phi_in_memory", lambda x, lanes: True)
    same(lambda: step(device, torch.bfloat16, keep=keep), plans, 2)


@pytest.mark.parametrize("keep", ["u", "x"])
def test_many_splits(keep, device, plans, monkeypatch):
    monkeypatch.setattr(tiles, "processor_count", lambda device: 64)
    same(lambda: step(device, T=40, N=90, M=70, keep=keep), plans, 2)


def test_no_tokens(device, plans):
    same(lambda: step(device, T=0), plans, 2)


def test_layers_that_share_x(device, plans):
    def call():
        x, _, weight, bias, adapter = problem(device, torch.bfloat16, torch.float32, "full")
        _, _, narrow, _, other = problem(device, torch.bfloat16, torch.float32, "full", M=16)
        bases = [Base(weight, bias), Base(narrow)]
        ys, us = ops.forward(x, bases, [adapter, other], None, Options("full", 0.5))
        return ys + us

    same(call, plans, 1)


@pytest.mark.parametrize("rest", [{}, {"dropout_p": 0.3}])
def test_the_output_of_a_base(rest, device, plans):
    """It may have any strides. A backward without a weight gives the adapter's part."""
    options = Options("full", 0.5, backend="triton", **rest)

    def call():
        x, dy, _, _, adapter = problem(device, torch.float32, torch.float32, "full")
        out = torch.randn(18, 5, device=device).t()
        seed = torch.randint(0, 2**62, (1,), device=device) if rest else None
        (y,), (u,) = ops.forward(x, [Base(None, None, out)], [adapter], seed, options)
        saved = Saved(x, u, None, adapter, seed)
        return [y, u, *ops.backward(dy, saved, options, [True] * 4)]

    same(call, plans, 2)


def test_delta_weight(device, plans):
    options = Options("cross", 0.5, backend="triton")

    def call():
        *_, adapter = problem(device, torch.float32, torch.float32, "cross")
        G = torch.randn(18, 32, device=device)
        delta = ops.delta_forward(adapter, options)
        return [delta, *ops.delta_backward(G, adapter, options, [True] * 3)]

    same(call, plans, 2)


def test_operands_that_share_memory_when_they_are_recorded(device, plans):
    """x is dy, and the factors are parts of one tensor, in the calls that make a plan: later calls
    with tensors apart must not be taken for the same.
    """
    options, apart = Options("square", 0.5, backend="triton"), False

    def call():
        x, dy, weight, _, adapter = problem(
            device, torch.float32, torch.float32, "square", N=32, M=32, r=4
        )
        if not apart:
            dy, flat = x, torch.randn(260, device=device)
            A, B = flat[:128].view(4, 32), flat[128:256].view(32, 4)
            adapter = Factors(A, B, flat[256:])
        (y,), (u,) = ops.forward(x, [Base(weight)], [adapter], None, options)
        saved = Saved(x, u, weight, adapter, None)
        return [y, u, *ops.backward(dy, saved, options, [True] * 4)]

    same(call, plans, 2)
    apart = True
    expected, got = [], []
    for results, run in ((expected, ordinary), (got, lambda call: call())):
        torch.manual_seed(9)
        results += run(call)
    assert len(made(plans)) == 2 and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_copied_to_be_contiguous(inference, device, plans):
    """The coefficients, the bias, and the factors of layers on one x whose strides differ."""

    def call():
        x, _, weight, bias, (A, B, h) = problem(device, torch.float32, torch.float32, "full")
        bias, h = (torch.stack([t, t], 1)[:, 0] for t in (bias, h))
        strided = Factors(A.t().contiguous().t(), B, h)
        ys, us = ops.forward(
            x, [Base(weight, bias)] * 2, [Factors(A, B, h), strided], None, Options("full", 0.5)
        )
        return ys + us

    with torch.inference_mode(inference):
        same(call, plans, 1)


def test_strides_are_part_of_the_key(device, plans):
    x, _, weight, bias, adapter = problem(device, torch.float32, torch.float32, "full")
    strided = x.t().contiguous().t()
    call = lambda x: ops.forward(x, [Base(weight, bias)], [adapter], None, Options("full", 0.7))  # noqa: E731
    for _ in range(3):
        call(x)
    (y,), _ = call(strided)
    (expected,), _ = ordinary(lambda: call(strided))
    assert torch.equal(y, expected) and len(made(plans)) == 1


def test_a_misaligned_pointer_takes_the_ordinary_path(device, plans):
    x, _, weight, bias, adapter = problem(device, torch.float32, torch.float32, "full")
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert shifted.data_ptr() % plan.ALIGNMENT and shifted.stride() == x.stride()
    call = lambda x: ops.forward(x, [Base(weight, bias)], [adapter], None, Options("full", 0.7))  # noqa: E731
    plans.clear()
    (y,), _ = call(shifted)
    assert not plans and torch.equal(y, call(x)[0][0])


def test_settings_are_part_of_the_key(plans, monkeypatch):
    from triton import knobs

    before = plan._settings()
    torch.backends.cuda.matmul.allow_tf32 = not before[0]
    try:
        assert plan._settings() != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
    for where, name in ((knobs.runtime, "debug"), (knobs.compilation, "instrumentation_mode")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, "other", raising=False)
            assert plan._settings() != before
    assert plan._settings() == before


def test_as_many_plans_as_are_allowed(device, plans, monkeypatch):
    monkeypatch.setattr(plan, "LIMIT", 3)
    for T in (1, 2, 3, 4, 5):
        for _ in range(3):
            step(device, T=T)
        assert len(plans) <= 3


def test_what_is_recorded_is_kept_nowhere_else(device, plans):
    for T in (6, 6):
        step(device, T=T)
    kept = len(FakeTensorMode.cache)
    for T in (7, 7):
        step(device, T=T)
    assert len(FakeTensorMode.cache) == kept


def test_outputs_are_fresh_and_no_views(device, plans):
    layer = pk.PeraLinear(32, 18, r=3, device=device, backend="triton")
    x = torch.randn(5, 32, device=device)
    with torch.no_grad():
        ys = [layer(x) for _ in range(4)]
    assert len({y.data_ptr() for y in ys}) == 4 and not any(y._is_view() for y in ys)


def test_a_failed_launch_is_raised_and_leaves_no_plan(device, plans, monkeypatch):
    step(device)

    def fails(launch):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(plan, "start", fails)
    with pytest.raises(RuntimeError, match="out of resources"):
        step(device)
    assert not made(plans)


def test_options_are_part_of_the_key(device, plans):
    x, _, weight, bias, adapter = problem(device, torch.float32, torch.float32, "full")
    options = Options("full", 0.7, backend="triton")
    for own in (options, options._replace(scale=0.9), options._replace(scale=1.1)):
        for _ in range(3):
            (y,), _ = ops.forward(x, [Base(weight, bias)], [adapter], None, own)
        (expected,), _ = ordinary(
            lambda own=own: ops.forward(x, [Base(weight, bias)], [adapter], None, own)
        )
        assert torch.equal(y, expected)
    assert len(made(plans)) == 3
