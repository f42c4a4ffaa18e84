"""Same inputs, same bits: in every run, process, thread, stream and replay.

What is promised is the same call with the same inputs. That a row has the same bits in another
batch is not: libraries and kernels split their sums by the shape. Its neighbours' values never
matter, though.
"""

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.terms import TERMS
from pera_kernels.testing import Case

BF16, F16 = torch.bfloat16, torch.float16
ROOT = Path(__file__).parents[1]
RUNS = [pytest.param(5, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
THREADS = 8
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = {"r": 6, "T": 67, "N": 70, "M": 50}
CASES = {
    "full": Case(**SHAPE),
    "square, bfloat16": Case(terms="square", dtype=BF16, **SHAPE),
    "cross, float16": Case(terms="cross", dtype=F16, **SHAPE),
    "linear": Case(terms="linear", **SHAPE),
    "float32 adapters": Case(dtype=BF16, adapter_dtype=torch.float32, **SHAPE),
    "few tokens": Case(r=8, T=4, N=70, M=50),
    "dropout": Case(dropout_p=0.25, **SHAPE),
    "composed": Case(plan="composed", **SHAPE),
    "delta_weight": Case(op="delta_weight", **SHAPE),
}
# What a GPU splits into partial sums, which are added in a fixed order.
LARGE = {
    "tokens": Case(r=16, T=8200, N=520, M=264, dtype=BF16),
    "features": Case(r=16, T=16, N=4096, M=1024, dtype=BF16),
    "lanes": Case(r=32, T=700, N=520, M=264),
    "dropout": Case(r=12, T=1100, N=1000, M=520, dtype=F16, dropout_p=0.2),
    "delta_weight": Case(op="delta_weight", r=16, T=1, N=1000, M=520),
}


def assert_same(got, expected, what=""):
    for name, t in expected.items():
        assert torch.equal(got[name], t), f"{what} {name}: other bits"


def assert_runs_agree(case, backend, device, runs):
    inputs = testing.make_inputs(case, device)
    expected = testing.run(case, inputs, backend)
    assert all(t.isfinite().all() for t in expected.values())
    for number in range(1, runs):
        # Other memory is left behind, so that the next call does not get the same.
        kept = torch.full((int(torch.randint(1, 5000, (1,))),), torch.nan)
        assert_same(testing.run(case, inputs, backend), expected, f"run {number}")
        del kept


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_runs_of_the_torch_backend(name, runs):
    assert_runs_agree(CASES[name], "torch", "cpu", runs)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("op", ["pera_linear", "delta_weight"])
def test_runs_of_the_kernels(op, runs, triton_backend, device):
    """A small problem, whose sums over tokens are split in two."""
    case = Case(op=op, r=3, T=70, N=9, M=7, dropout_p=0.25)
    assert_runs_agree(case, triton_backend, device, runs)


@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_hundred_runs_on_a_gpu(name):
    assert_runs_agree(LARGE[name], "triton", "cuda", 100)


def test_no_kernel_adds_atomically():
    """An atomic floating-point sum has no order."""
    sources = list((ROOT / "pera_kernels" / "kernels").glob("*.py"))
    assert len(sources) >= 6
    for source in sources:
        assert "tl.atomic" not in source.read_text(encoding="utf-8"), source.name


@pytest.mark.parametrize("name", ["full", "cross, float16", "dropout", "delta_weight"])
def test_deterministic_algorithms_are_all_there_is(name, backend, device):
    """With use_deterministic_algorithms(True) nothing is refused and no bit changes."""
    case = replace(CASES[name], T=19, N=40, M=24)
    inputs = testing.make_inputs(case, device)
    expected = testing.run(case, inputs, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = testing.run(case, inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(got, expected)


def digest():
    """A digest of all results of all cases; what the next test computes in another process too."""
    found = hashlib.sha256()
    for case in CASES.values():
        for t in testing.run(case, testing.make_inputs(case), "torch").values():
            found.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_another_process_gives_the_same_bits():
    """With another hash seed too: no order of a set or dictionary matters."""
    program = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "from tests.test_determinism import digest; print(digest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize("name", ["full", "square, bfloat16", "cross, float16", "few tokens"])
def test_a_row_does_not_depend_on_its_neighbours(name, backend, device):
    """y and dx of a row have the same bits whatever stands in the other rows."""

    def with_other_rows(t):
        return torch.cat([t[:1], torch.randn_like(t[1:]) * 3])

    case = CASES[name] if backend == "torch" else replace(CASES[name], N=40, M=24)
    inputs = testing.make_inputs(case, device)
    expected = testing.run(case, inputs, backend)
    changed = replace(inputs, x=with_other_rows(inputs.x), dy=with_other_rows(inputs.dy))
    got = testing.run(case, changed, backend)
    for output in ("y", "dx"):
        assert torch.equal(got[output][0], expected[output][0])
        assert not torch.equal(got[output], expected[output])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_batch_dimensions_are_only_rows(dtype, backend, device):
    """(12, N), (3, 4, N) and (2, 1, 6, N) are the same call."""
    case = Case(r=5, T=12, N=40, M=24, dtype=dtype)
    inputs = testing.make_inputs(case, device)
    expected = testing.run(case, inputs, backend)
    for batch in ((3, 4), (2, 1, 6)):
        x, dy = inputs.x.view(*batch, 40), inputs.dy.view(*batch, 24)
        got = testing.run(case, replace(inputs, x=x, dy=dy), backend)
        assert got["y"].shape == (*batch, 24) and got["dx"].shape == x.shape
        got |= {n: got[n].view(expected[n].shape) for n in ("y", "dx")}
        assert_same(got, expected, str(batch))


@pytest.mark.parametrize("cut", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_batch_in_two_parts_agrees_to_rounding(dtype, cut, backend, device):
    """The rows of two calls are those of one, and the gradients their sums: no bits promised."""
    case = Case(r=5, T=48, N=40, M=24, dtype=dtype)
    inputs = testing.make_inputs(case, device)
    whole = testing.run(case, inputs, backend)
    first, second = (
        testing.run(case, replace(inputs, x=inputs.x[at], dy=inputs.dy[at]), backend)
        for at in (slice(0, cut), slice(cut, None))
    )
    tolerance = 64 * torch.finfo(dtype).eps
    for name, t in whole.items():
        rows = name in ("y", "dx")
        joined = torch.cat([first[name], second[name]]) if rows else first[name] + second[name]
        atol = tolerance * float(t.abs().max())
        torch.testing.assert_close(joined, t, rtol=tolerance, atol=atol, msg=name)


def adapted_layer(device, r=6, terms="full", **options):
    """A layer whose adapter does something."""
    made = pk.PeraLinear(70, 50, r=r, terms=terms, device=device, **options)
    with torch.no_grad():
        for p in pk.adapter_parameters(made):
            p.normal_(std=0.3)
    return made


def trained(layer, x):
    """Output and gradients of a layer on x, by number."""
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *pk.adapter_parameters(layer)]
    return dict(enumerate([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]))


def evaluated(layer, x):
    with torch.no_grad():
        return {0: layer(x)}


@pytest.mark.parametrize("kind", ["own layers", "one layer", "one layer in evaluation"])
def test_eight_threads_get_the_bits_of_one(kind, device):
    """Each with its own inputs, at the same time."""
    # The interpreter has one program at a time; compiled kernels and PyTorch have threads.
    options = {"device": device, "backend": "auto" if device.type == "cuda" else "torch"}
    layers = [adapted_layer(r=3 + n, terms=TERMS[n % 4], **options) for n in range(THREADS)]
    if kind != "own layers":
        layers = [layers[4]] * THREADS
    call = evaluated if kind == "one layer in evaluation" else trained
    inputs = [torch.randn(2 + 5 * number, 70, device=device) for number in range(THREADS)]
    expected = [call(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    barrier = threading.Barrier(THREADS)

    def work(number):
        barrier.wait(timeout=60)
        for _ in range(20):
            assert_same(call(layers[number], inputs[number]), expected[number])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_two_streams_at_once_give_the_same_bits(name):
    """Forward and backward, interleaved on two streams, each with its own inputs."""
    problems = [replace(LARGE[name], seed=seed) for seed in (0, 1)]
    inputs = [testing.make_inputs(problem, "cuda") for problem in problems]
    expected = [testing.run(p, own, "triton") for p, own in zip(problems, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(25):
        got = []
        for stream, problem, own in zip(streams, problems, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(testing.run(problem, own, "triton"))
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)


def captured(layer, x):
    """A CUDA graph of a forward and backward, and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            trained(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = trained(layer, x)
    return graph, results


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=str)
@pytest.mark.parametrize("T", [1, 300])
def test_every_replay_of_a_captured_graph_gives_the_same_bits(T, dtype):
    """A hundred replays, and a replay on other inputs, are what the call gives uncaptured."""
    layer = adapted_layer("cuda", dtype=dtype)
    x = torch.randn(T, 70, device="cuda", dtype=dtype)
    graph, results = captured(layer, x)
    for _ in range(2):
        expected = trained(layer, x)
        for _ in range(100):
            graph.replay()
            assert_same(results, expected)
        x.normal_()


@needs_gpu
def test_replays_of_a_captured_graph_draw_other_masks():
    layer = adapted_layer("cuda", dtype=BF16, dropout=0.2)
    graph, results = captured(layer, torch.randn(64, 70, device="cuda", dtype=BF16))
    graph.replay()
    first = results[0].clone()
    graph.replay()
    assert not torch.equal(results[0], first)
