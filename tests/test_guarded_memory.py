"""Nothing is read or written beside what an argument holds, and no address is cut to 32 bits.

Inputs lie between NaNs with known bits, fresh memory is NaN, and afterwards every byte around and
in the inputs is what it was.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pera_kernels as pk
from pera_kernels import testing as numerics
from pera_kernels.backends import unavailable
from pera_kernels.dropout import draw_seed
from pera_kernels.terms import TERMS, lane_count
from pera_kernels.testing import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# A NaN that no arithmetic makes.
CANARY = {F32: 0x7FC0DEAD, BF16: 0x7FE5, F16: 0x7EA5, torch.int64: 0x5AA55AA55AA55AA5}
BITS = {F32: torch.int32, BF16: torch.int16, F16: torch.int16, torch.int64: torch.int64}
# A multiple of a cache line: libraries choose their way by the alignment.
GUARD = 64
GIB = 2**30
REACH = 2**31


@pytest.fixture(params=["cpu", "cuda"])
def place(request):
    """Both kinds of device; without a GPU the kernels are interpreted."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton"])
def way(request, place):
    """A backend that runs there."""
    if (reason := unavailable(request.param, place)) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def triton_place(place):
    """A device on which the kernels run."""
    if (reason := unavailable("triton", place)) is not None:
        pytest.skip(f"backend triton: {reason}")
    return place


def bits(t):
    return t.view(BITS[t.dtype])


class Guards:
    """Tensors inside larger buffers of canaries."""

    def __init__(self):
        self.buffers = []

    def around(self, shape, dtype, device, gap=0):
        """Uninitialised memory for ``shape`` between canaries, ``gap`` of them after each row."""
        columns = shape[-1] if shape else 1
        rows = torch.Size(shape[:-1]).numel()
        buffer = torch.empty(rows * (columns + gap) + 2 * GUARD, dtype=dtype, device=device)
        bits(buffer).fill_(CANARY[dtype])
        inside = buffer[GUARD : buffer.numel() - GUARD].view(rows, columns + gap)[:, :columns]
        mine = torch.zeros_like(buffer, dtype=torch.bool)
        mine[GUARD : buffer.numel() - GUARD].view(rows, columns + gap)[:, :columns] = True
        self.buffers.append((buffer, mine))
        return inside.view(shape) if gap == 0 else inside.unflatten(0, shape[:-1])

    def copy(self, t, gap=0):
        guarded = self.around(t.shape, t.dtype, t.device, gap)
        return guarded.copy_(t)

    def assert_margins(self):
        for buffer, mine in self.buffers:
            outside = bits(buffer)[~mine]
            assert bool((outside == CANARY[buffer.dtype]).all()), "a canary was overwritten"

    def snapshot(self):
        return [bits(buffer).clone() for buffer, _ in self.buffers]


class GuardedAllocations(TorchFunctionMode):
    """Every fresh tensor that Python code asks for lies between canaries, and is NaN itself."""

    def __init__(self, guards):
        super().__init__()
        self.guards = guards
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function not in (torch.Tensor.new_empty, torch.empty, torch.empty_like):
            return made
        if made.dtype not in CANARY or not made.is_contiguous():
            return made
        self.count += 1
        with torch._C.DisableTorchFunction():
            inside = self.guards.around(tuple(made.shape), made.dtype, made.device)
            return inside.fill_(torch.nan) if made.is_floating_point() else inside


SHAPE = {"T": 19, "N": 37, "M": 23}
CASES = {
    **{
        f"{t}, rank {r}": Case(terms=t, r=r, **SHAPE)
        for t, r in zip(TERMS, (5, 7, 6, 3), strict=True)
    },
    "few tokens": Case(r=7, T=3, N=37, M=23),
    "one of each": Case(r=1, T=1, N=1, M=1),
    "bfloat16": Case(r=5, dtype=BF16, **SHAPE),
    "float16": Case(terms="cross", r=5, dtype=F16, **SHAPE),
    "float32 adapters": Case(r=3, dtype=BF16, adapter_dtype=F32, **SHAPE),
    "dropout": Case(r=3, dropout_p=0.3, **SHAPE),
    "composed": Case(terms="square", r=3, plan="composed", **SHAPE),
    "split sums": Case(r=3, T=270, N=330, M=23),
    "delta_weight": Case(op="delta_weight", r=5, **SHAPE),
    "delta_weight, cross": Case(op="delta_weight", terms="cross", r=6, **SHAPE),
}


def run(case, tensors, backend, grad=True):
    """Output and gradients on the very tensors of ``tensors``, which are not copied."""
    leaves = {
        name: t.detach().requires_grad_(grad)
        for name, t in tensors.items()
        if name in ("x", "A", "B", "h") and t is not None
    }
    A, B, h = leaves["A"], leaves["B"], leaves.get("h")
    options = {"scale": case.scale, "terms": case.terms, "backend": backend}
    if case.op == "delta_weight":
        leaves.pop("x")
        y = pk.delta_weight(A, B, h, **options)
    else:
        torch.manual_seed(0)
        weight, bias = tensors["weight"], tensors["bias"]
        options |= {"dropout_p": case.dropout_p, "plan": case.plan}
        y = pk.pera_linear(leaves["x"], weight, A, B, h, bias, **options)
    if not grad:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), tensors["dy"])]


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_what_lies_around_the_inputs(name, grad, way, place, poison):
    """Bit for bit the same between canaries, none of which, and no input, has changed."""
    case = CASES[name]
    inputs = vars(numerics.make_inputs(case, place))
    guards = Guards()
    guarded = {n: None if t is None else guards.copy(t) for n, t in inputs.items()}
    before = guards.snapshot()
    got, expected = run(case, guarded, way, grad), run(case, inputs, way, grad)
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    for old, new in zip(before, guards.snapshot(), strict=True):
        assert torch.equal(old, new)


# PyTorch's own bfloat16 products on a CPU read one number past an odd row, times zero.
@pytest.mark.parametrize("name", [n for n in CASES if "bfloat16" not in n and "adapters" not in n])
def test_nothing_between_the_rows_is_read_or_written(name, way, place, poison):
    """The same with canaries between the rows of every input."""
    case = CASES[name]
    inputs = vars(numerics.make_inputs(case, place))
    guards = Guards()
    guarded = {
        n: None if t is None else guards.copy(t, gap=5 if t.dim() > 1 else 0)
        for n, t in inputs.items()
    }
    before = guards.snapshot()
    for a, b in zip(run(case, guarded, way), run(case, inputs, way), strict=True):
        tolerance = 200 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    for old, new in zip(before, guards.snapshot(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.plan == "factored"])
def test_kernels_write_nothing_beside_their_outputs(name, triton_place, poison):
    """All that the launchers allocate lies between canaries: outputs, expansions, partial sums."""
    from pera_kernels import ops

    case = CASES[name]
    p = numerics.make_inputs(case, triton_place)
    options = (p.A, p.B, p.h)
    guards = Guards()
    with GuardedAllocations(guards) as mode:
        if case.op == "delta_weight":
            y = ops.delta_forward._init_fn(*options, 0.7, case.terms)
            results = [y, *ops.delta_backward._init_fn(p.dy, *options, 0.7, case.terms, [True] * 3)]
        else:
            seed = draw_seed(triton_place) if case.dropout_p else None
            rest = (*options, seed, 0.7, case.terms, case.dropout_p, False)
            base = p.x.new_zeros(case.T, case.M)
            y, u = ops.linear_forward._init_fn(p.x, None, None, base, *rest)
            needs = [True, True, True, p.h is not None]
            results = [y, u, *ops.linear_backward._init_fn(p.dy, p.x, u, None, *rest, needs)]
    assert mode.count >= 6
    guards.assert_margins()
    for t in results:
        assert t.isfinite().all()


def test_a_canary_that_is_overwritten_is_noticed():
    """The guards themselves: on either side, and between rows."""
    for at in (GUARD - 1, GUARD + 3, -1):
        guards = Guards()
        inside = guards.copy(torch.zeros(2, 3), gap=2)
        guards.assert_margins()
        inside.fill_(1.0)
        guards.assert_margins()
        guards.buffers[0][0][at] = 0.0
        with pytest.raises(AssertionError, match="canary"):
            guards.assert_margins()


@pytest.fixture
def sparse(tmp_path):
    """Views that reach far in a file with holes: only what is touched takes memory.

    They start in its middle, so that an address that wraps is wrong and not outside.
    """
    made = []

    def make(values, strides, dtype=None):
        values = values.to(dtype or values.dtype)
        reach = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
        path = tmp_path / f"{len(made)}.bin"
        size = REACH + max(reach, REACH)
        storage = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
        made.append(path)
        return storage.as_strided(values.shape, strides, REACH).copy_(values)

    yield make
    for path in made:
        path.unlink()


# Offsets past 2**31 by a product of 32-bit numbers, and by a stride that is no 32-bit number.
FAR = [(3 * 2**28 + 8, "product"), (2**31 + 24, "stride")]


def interpreted():
    if (reason := unavailable("triton", torch.device("cpu"))) is not None:
        pytest.skip(f"backend triton: {reason}")
    from pera_kernels import launch

    return launch


@pytest.mark.parametrize("stride, kind", FAR, ids=[kind for _, kind in FAR])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_projection_reads_far_rows_and_columns(axis, stride, kind, sparse):
    """u = x φ(A)ᵀ of an x whose rows, or columns, lie far apart, and of such an A."""
    launch = interpreted()
    x, A = torch.randn(5, 6), torch.randn(3, 6)
    strides = (stride, 1) if axis == "rows" else (1, stride)
    far, far_A = sparse(x, strides), sparse(A, strides)
    lanes = lane_count(3, "full")
    results = []
    for own_x, own_A in ((x, A), (far, far_A)):
        u = torch.empty(5, lanes)
        launch.project(own_x, launch.Factor(own_A, None, 3, "full"), out=u)
        results.append(u)
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("stride, kind", FAR, ids=[kind for _, kind in FAR])
def test_an_update_reads_and_writes_far_rows(stride, kind, sparse):
    """y = base + s u φ with base, u and y whose rows lie far apart."""
    launch = interpreted()
    u, base, phi = torch.randn(5, 16), torch.randn(5, 7), torch.randn(16, 7)
    near = torch.empty(5, 7)
    launch.accumulate(base, u, launch.Expanded(phi), out=near, scale=0.5)
    far = sparse(torch.zeros(5, 7), (stride, 1))
    far_base, far_u = sparse(base, (stride, 1)), sparse(u, (stride, 1))
    launch.accumulate(far_base, far_u, launch.Expanded(phi), out=far, scale=0.5)
    assert torch.equal(far, near) and near.any()


def contracted(launch, left, x, factor):
    df, dh = torch.empty_like(factor), torch.empty(6)
    operand = launch.Factor(factor, torch.ones(6), 3, "full")
    launch.sum_partials(launch.contract(left, x, operand, df=df, dh=dh, scale=0.5))
    return torch.cat([df.flatten(), dh])


@pytest.mark.parametrize("stride, kind", FAR, ids=[kind for _, kind in FAR])
@pytest.mark.parametrize("which", ["left rows", "x rows", "x columns", "factor"])
def test_a_contraction_reads_far_rows_and_columns(which, stride, kind, sparse):
    """df and dh from operands that reach far."""
    launch = interpreted()
    left, x, factor = torch.randn(5, 16), torch.randn(5, 7), torch.randn(3, 7)
    near = contracted(launch, left, x, factor)
    strides = (1, stride) if which == "x columns" else (stride, 1)
    if which == "left rows":
        left = sparse(left, strides)
    elif which == "factor":
        factor = sparse(factor, strides)
    else:
        x = sparse(x, strides)
    assert torch.equal(contracted(launch, left, x, factor), near) and near.any()


def test_a_contraction_reads_far_lanes(sparse):
    """delta_weight passes φ(B)ᵀ, whose lanes are M apart: lanes · M may pass 2**31."""
    launch = interpreted()
    left, x, factor = torch.randn(5, 16), torch.randn(5, 7), torch.randn(3, 7)
    near = contracted(launch, left, x, factor)
    far = sparse(left, (1, 3 * 2**28 + 8))
    assert torch.equal(contracted(launch, far, x, factor), near)


@pytest.mark.parametrize("which", ["df", "dh"])
def test_a_contraction_writes_far_partial_sums(which, sparse, monkeypatch):
    """Partial sums of df lie R · N apart, those of dh L: their number times that may pass 2**31."""
    launch = interpreted()
    left, x, factor = torch.randn(700, 16), torch.randn(700, 7), torch.randn(3, 7)
    near = contracted(launch, left, x, factor)
    stride = 3 * 2**28 + 8
    kernel = launch.contract_kernel
    apart = {"df": "stride_df_split", "dh": "coefficients"}[which]

    class Far:
        def __getitem__(self, grid):
            def call(**arguments):
                partial = arguments[f"{which}_ptr"]
                assert partial.dim() == 2 and partial.shape[0] > 3, "the sums were not split"
                far = sparse(torch.zeros_like(partial), (stride, 1))
                kernel[grid](**arguments | {f"{which}_ptr": far, apart: stride})
                partial.copy_(far)

            return call

    monkeypatch.setattr(launch, "contract_kernel", Far())
    assert torch.equal(contracted(launch, left, x, factor), near) and near.any()


@pytest.mark.parametrize("stride, kind", FAR, ids=[kind for _, kind in FAR])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_composition_reads_a_far_base(axis, stride, kind, sparse):
    """W0 + ΔW of a W0 whose rows, or columns, lie far apart."""
    launch = interpreted()
    weight, A, B = torch.randn(5, 6), torch.randn(3, 6), torch.randn(5, 3)
    far = sparse(weight, (stride, 1) if axis == "rows" else (1, stride))
    factors = launch.Factor(A, None, 3, "full"), launch.Factor(B.t(), torch.ones(6), 3, "full")
    near, got = (launch.compose(w, *factors, scale=0.5, dtype=F32) for w in (weight, far))
    assert torch.equal(got, near)


def one_program(kernel, arguments):
    """Launch the first program alone: what a size is multiplied with may then be large."""
    kernel[(1, 1)](**arguments)


def recorded_arguments(monkeypatch, launch, name, call):
    """What the launcher passes to its kernel in ``call``."""
    found = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: found.append(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch, name, Recorder())
        call()
    return found[0]


WIDTH = 3 * 2**26


@pytest.mark.parametrize("name", ["expand", "accumulate", "compose"])
def test_expansions_with_far_lanes(name, sparse, monkeypatch):
    """φ (lanes, N) of so many columns that its last lanes lie past 2**31."""
    launch = interpreted()
    kernel_name = f"{name}_kernel"
    a, b = (launch.Factor(torch.randn(4, n).half(), None, 4, "full") for n in (16, 5))
    phi, phi_b = (launch.expand([f], dtype=F16)[0].rows for f in (a, b))
    assert phi.shape == (16, 16) and phi[13].any() and 13 * WIDTH > REACH
    u, y = torch.randn(5, 16).half(), torch.empty(5, 16).half()
    calls = {
        "expand": lambda: launch.expand([a], dtype=F16)[0].rows,
        "accumulate": lambda: launch.accumulate(None, u, launch.Expanded(phi), out=y, scale=0.5),
        "compose": lambda: launch.compose(None, a, b, scale=0.5, dtype=F16),
    }
    near = calls[name]()
    near = y if near is None else near
    arguments = recorded_arguments(monkeypatch, launch, kernel_name, calls[name])
    # The columns of the first tile are there; all others would be other programs'.
    got = sparse(torch.zeros_like(near), (WIDTH if name == "expand" else 1024, 1))
    far = sparse(phi, (WIDTH, 1))
    changed = {
        "expand": {
            "phi_0_ptr": got,
            "N_0": WIDTH,
            "f_0_ptr": sparse(a.rows, (1024, 1)),
            "stride_f_0_r": 1024,
        },
        "accumulate": {"phi_ptr": far, "M": WIDTH, "y_ptr": got, "stride_y_t": 1024},
        "compose": {
            "phi_a_ptr": far,
            "phi_b_ptr": phi_b,
            "N": WIDTH,
            "w_ptr": got,
            "stride_w_m": 1024,
        },
    }
    one_program(getattr(launch, kernel_name), arguments | changed[name])
    assert torch.equal(got, near) and near.any()


def test_a_sum_of_far_partial_results(sparse, monkeypatch):
    """out = Σ partial[p] with partial results that lie past 2**31."""
    launch = interpreted()
    partial = torch.randn(5, launch.SUM_BLOCKS["BLOCK_S"])
    stride = 3 * 2**28 + 8
    out = torch.empty(partial.shape[1])
    job = launch.Sum(partial, out, out.numel(), 0)
    launch.sum_partials([job])
    arguments = recorded_arguments(
        monkeypatch, launch, "sum_partials_kernel", lambda: launch.sum_partials([job])
    )
    got = torch.empty_like(out)
    changed = {"partial_0_ptr": sparse(partial, (stride, 1)), "numel_0": stride, "out_0_ptr": got}
    one_program(launch.sum_partials_kernel, arguments | changed)
    assert torch.equal(got, out)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_a_whole_call_on_far_rows(backend_name, sparse):
    """Output and gradients of x and dy whose rows lie far apart are those of dense ones."""
    if (reason := unavailable(backend_name, torch.device("cpu"))) is not None:
        pytest.skip(f"backend {backend_name}: {reason}")
    case = Case(r=3, T=5, N=6, M=7)
    inputs = vars(numerics.make_inputs(case))
    stride = FAR[0][0]
    far = {n: sparse(t, (stride, 1)) if n in ("x", "dy") else t for n, t in inputs.items()}
    for a, b in zip(run(case, far, backend_name), run(case, inputs, backend_name), strict=True):
        torch.testing.assert_close(a, b)


def first_and_last_rows(device, T, N, M, dtype, backend):
    """A layer on T tokens that are zero but for the first and last 64: gradients of parameters
    are those of these 128 alone, and so are their outputs.
    """
    ends = 64
    case = Case(r=6, T=2 * ends, N=N, M=M, dtype=dtype)
    small = vars(numerics.make_inputs(case, device))
    small["bias"].zero_()
    large = dict(small)
    for name, width in (("x", N), ("dy", M)):
        large[name] = torch.zeros(T, width, dtype=dtype, device=device)
        large[name][:ends], large[name][-ends:] = small[name][:ends], small[name][ends:]
    got, expected = run(case, large, backend), run(case, small, backend)
    for name, a, b in zip(("y", "dx", "dA", "dB", "dh"), got, expected, strict=True):
        if name in ("y", "dx"):
            assert not a[ends:-ends].any(), name
            a = torch.cat([a[:ends], a[-ends:]])
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()), msg=name
        )


def test_first_and_last_rows_of_a_few(way, place):
    """The check of the next test, where it is cheap."""
    first_and_last_rows(place, 300, 40, 24, F32, way)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_more_than_2_31_elements_on_a_gpu(backend_name, record):
    """x, y, dx and dy of more than 2**31 elements each."""
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free GPU memory; {free / GIB:.0f} GiB are free")
    T, N = 2**20 + 96, 2064
    assert T * N > REACH
    first_and_last_rows(torch.device("cuda"), T, N, N, BF16, backend_name)
    torch.cuda.empty_cache()
    record(elements=T * N)
