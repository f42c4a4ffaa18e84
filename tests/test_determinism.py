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
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.backends import unavailable
from pera_kernels.testing import Case

BF16, F16 = torch.bfloat16, torch.float16
RUNS = 100
THREADS = 8
KERNELS = Path(pk.__file__).parent / "kernels"
CPU = torch.device("cpu")
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
# What a GPU splits into partial sums.
LARGE = {
    "tokens": Case(r=16, T=8200, N=520, M=264, dtype=BF16),
    "features": Case(r=16, T=16, N=4096, M=1024, dtype=BF16),
    "lanes": Case(r=32, T=700, N=520, M=264),
    "dropout": Case(r=12, T=1100, N=1000, M=520, dtype=F16, dropout_p=0.2),
    "delta_weight": Case(op="delta_weight", r=16, T=1, N=1000, M=520),
}


def disturb():
    """Leave other memory behind, so that the next call does not get the same."""
    size = int(torch.randint(1, 5000, (1,)))
    return torch.full((size,), torch.nan), torch.full((3 * size,), 7.0)


def assert_same(got, expected, what=""):
    for name, t in expected.items():
        assert torch.equal(got[name], t), f"{what} {name}: other bits"


def runs_agree(case, backend, device, runs):
    inputs = numerics.make_inputs(case, device)
    expected = numerics.run(case, inputs, backend)
    assert all(t.isfinite().all() for t in expected.values())
    for number in range(1, runs):
        kept = disturb()
        assert_same(numerics.run(case, inputs, backend), expected, f"run {number}")
        del kept


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_runs_on_the_torch_backend(name, record):
    """Output and every gradient, bit for bit."""
    runs_agree(CASES[name], "torch", CPU, RUNS)
    record(runs=RUNS)


@pytest.mark.parametrize("op, runs", [("pera_linear", RUNS), ("delta_weight", RUNS // 4)])
def test_runs_of_the_interpreted_kernels(op, runs, record):
    """A small problem, whose sums over tokens are split in two."""
    if (reason := unavailable("triton", CPU)) is not None:
        pytest.skip(f"backend triton: {reason}")
    runs_agree(Case(op=op, r=3, T=70, N=9, M=7, dropout_p=0.25), "triton", CPU, runs)
    record(runs=runs)


@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_hundred_runs_on_a_gpu(name, record):
    """Compiled kernels at sizes that are split: partial sums are added in a fixed order."""
    runs_agree(LARGE[name], "triton", torch.device("cuda"), RUNS)
    record(runs=RUNS)


def test_no_kernel_adds_atomically():
    """An atomic floating-point sum has no order."""
    sources = list(KERNELS.glob("*.py"))
    assert len(sources) >= 6
    for source in sources:
        assert "atomic" not in source.read_text(encoding="utf-8"), source.name


@pytest.fixture
def layer(device):
    """An adapted layer whose coefficients are not zero."""
    made = pk.PeraLinear(70, 50, r=6, device=device)
    torch.nn.init.normal_(made.pera_B, std=0.3)
    torch.nn.init.normal_(made.pera_h)
    return made


def trained(layer, x):
    """Output and gradients of a layer on x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *pk.adapter_parameters(layer)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def evaluated(layer, x):
    with torch.no_grad():
        return [layer(x)]


def test_evaluation_has_the_bits_of_its_first_call(layer, device):
    """From the third call on a CPU uses expansions that it kept."""
    x = torch.randn(9, 70, device=device)
    layer.eval()
    (expected,) = evaluated(layer, x)
    for _ in range(RUNS):
        assert torch.equal(evaluated(layer, x)[0], expected)


@pytest.mark.parametrize("name", ["full", "cross, float16", "dropout", "delta_weight"])
def test_deterministic_algorithms_are_all_there_is(name, backend, device):
    """With use_deterministic_algorithms(True) nothing is refused and no bit changes."""
    case = replace(CASES[name], T=19, N=40, M=24)
    inputs = numerics.make_inputs(case, device)
    expected = numerics.run(case, inputs, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = numerics.run(case, inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(got, expected)


def digest_of_a_run():
    """A digest of all results of one case; what :func:`test_every_process` runs elsewhere."""
    digest = hashlib.sha256()
    for case in CASES.values():
        results = numerics.run(case, numerics.make_inputs(case), "torch")
        for t in results.values():
            digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_every_process_gives_the_same_bits():
    """Also with another hash seed: no order of a set or dictionary matters."""
    root = Path(__file__).parent.parent
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('determinism', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['determinism'] = module\n"
        "spec.loader.exec_module(module)\n"
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "print(module.digest_of_a_run())"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert found == {digest_of_a_run()}


def other_rows(t):
    """The same first row among others."""
    return torch.cat([t[:1], torch.randn_like(t[1:]) * 3])


@pytest.mark.parametrize("name", ["full", "square, bfloat16", "cross, float16", "few tokens"])
def test_a_row_does_not_depend_on_its_neighbours(name, backend, device):
    """y and dx of a row have the same bits whatever stands in the other rows."""
    case = CASES[name] if backend == "torch" else replace(CASES[name], N=40, M=24)
    inputs = numerics.make_inputs(case, device)
    expected = numerics.run(case, inputs, backend)
    got = numerics.run(
        case, replace(inputs, x=other_rows(inputs.x), dy=other_rows(inputs.dy)), backend
    )
    for output in ("y", "dx"):
        assert torch.equal(got[output][0], expected[output][0])
        assert not torch.equal(got[output], expected[output])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=str)
def test_batch_dimensions_are_only_rows(dtype, backend, device):
    """(12, N), (3, 4, N) and (2, 1, 6, N) are the same call."""
    case = Case(r=5, T=12, N=40, M=24, dtype=dtype)
    inputs = numerics.make_inputs(case, device)
    expected = numerics.run(case, inputs, backend)
    for batch in ((3, 4), (2, 1, 6)):
        x, dy = inputs.x.view(*batch, 40), inputs.dy.view(*batch, 24)
        got = numerics.run(case, replace(inputs, x=x, dy=dy), backend)
        assert got["y"].shape == (*batch, 24) and got["dx"].shape == x.shape
        got |= {n: got[n].view(expected[n].shape) for n in ("y", "dx")}
        assert_same(got, expected, str(batch))


@pytest.mark.parametrize("cut", [1, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_batch_in_two_parts_agrees_to_rounding(dtype, cut, backend, device):
    """The rows of two calls are those of one, and the gradients their sums: no bits promised."""
    case = Case(r=5, T=48, N=40, M=24, dtype=dtype)
    inputs = numerics.make_inputs(case, device)
    whole = numerics.run(case, inputs, backend)
    parts = [
        numerics.run(case, replace(inputs, x=inputs.x[at], dy=inputs.dy[at]), backend)
        for at in (slice(0, cut), slice(cut, None))
    ]
    tolerance = 64 * torch.finfo(dtype).eps
    for name, t in whole.items():
        first, second = (p[name] for p in parts)
        joined = torch.cat([first, second]) if name in ("y", "dx") else first + second
        torch.testing.assert_close(
            joined, t, rtol=tolerance, atol=tolerance * float(t.abs().max()), msg=name
        )


def in_threads(work):
    """Run ``work(number)`` in threads that start together, and raise what any of them raised."""
    barrier, errors = threading.Barrier(THREADS), []

    def target(number):
        try:
            barrier.wait(timeout=60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def many_layers(device):
    """A layer and an input for each thread, of several ranks and terms."""
    layers = []
    for number in range(THREADS):
        terms = ("full", "square", "cross", "linear")[number % 4]
        made = pk.PeraLinear(70, 50, r=3 + number, terms=terms, device=device)
        torch.nn.init.normal_(made.pera_B, std=0.3)
        if made.pera_h is not None:
            torch.nn.init.normal_(made.pera_h)
        layers.append((made, torch.randn(5 + 7 * number, 70, device=device)))
    return layers


def compiled_or_torch(device):
    """The interpreter has one program at a time; compiled kernels and PyTorch have threads."""
    return "auto" if device.type == "cuda" else "torch"


def test_eight_threads_that_train_their_own_layers(device, record):
    """Each thread gets the bits that it gets alone."""
    layers = many_layers(device)
    for layer, _ in layers:
        layer.backend = compiled_or_torch(device)
    expected = [trained(layer, x) for layer, x in layers]

    def work(number):
        layer, x = layers[number]
        for _ in range(20):
            for a, b in zip(trained(layer, x), expected[number], strict=True):
                assert torch.equal(a, b)

    in_threads(work)
    record(threads=THREADS, calls=20)


def test_eight_threads_that_share_a_module_in_evaluation(layer, device, record):
    """A server's threads, each with its own inputs, while the module begins to keep expansions."""
    layer.backend = compiled_or_torch(device)
    layer.eval()
    inputs = [torch.randn(1 + 5 * number, 70, device=device) for number in range(THREADS)]
    with torch.no_grad():
        fresh = pk.PeraLinear(70, 50, r=6, backend=layer.backend, device=device).eval()
        fresh.load_state_dict(layer.state_dict())
        expected = [fresh(x) for x in inputs]

    def work(number):
        for _ in range(50):
            assert torch.equal(evaluated(layer, inputs[number])[0], expected[number])

    in_threads(work)
    record(threads=THREADS, calls=50)


def test_eight_threads_that_share_a_module_in_training(layer, device, record):
    """Gradients with respect to shared parameters, taken at the same time from own inputs."""
    layer.backend = compiled_or_torch(device)
    inputs = [torch.randn(2 + 5 * number, 70, device=device) for number in range(THREADS)]
    expected = [trained(layer, x) for x in inputs]

    def work(number):
        for _ in range(10):
            for a, b in zip(trained(layer, inputs[number]), expected[number], strict=True):
                assert torch.equal(a, b)

    in_threads(work)
    record(threads=THREADS, calls=10)


@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_two_streams_at_once_give_the_same_bits(name, record):
    """Forward and backward, interleaved on two streams, each with its own inputs."""
    case = LARGE[name]
    problems = [replace(case, seed=seed) for seed in (0, 1)]
    inputs = [numerics.make_inputs(problem, "cuda") for problem in problems]
    expected = [numerics.run(p, own, "triton") for p, own in zip(problems, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(RUNS // 4):
        got = []
        for stream, problem, own in zip(streams, problems, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(numerics.run(problem, own, "triton"))
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    record(streams=2, calls=RUNS // 4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=str)
@pytest.mark.parametrize("T", [1, 300])
def test_every_replay_of_a_captured_graph_gives_the_same_bits(T, dtype, record):
    """A hundred replays, and a replay on other inputs, are what the call gives uncaptured."""
    made = pk.PeraLinear(512, 256, r=8, device="cuda", dtype=dtype)
    torch.nn.init.normal_(made.pera_B, std=0.1)
    torch.nn.init.normal_(made.pera_h)
    x = torch.randn(T, 512, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(T, 256, device="cuda", dtype=dtype)
    leaves = [x, *pk.adapter_parameters(made)]

    def call():
        y = made(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for fresh in (False, True):
        if fresh:
            with torch.no_grad():
                x.normal_()
        expected = [t.detach().clone() for t in call()]
        for _ in range(RUNS):
            graph.replay()
            for a, b in zip(captured, expected, strict=True):
                assert torch.equal(a, b)
    record(replays=2 * RUNS)
