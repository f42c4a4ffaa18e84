"""Nothing is read or written beside what an argument holds, and no address is cut to 32 bits.

Inputs lie between NaNs with known bits, fresh memory is NaN, and afterwards every byte around and
in the inputs is what it was.
"""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.backends import unavailable
from pera_kernels.dropout import draw_seed
from pera_kernels.operands import Base, Factors, Options, Saved
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


class Guards:
    """Tensors inside larger buffers of canaries."""

    def __init__(self):
        self.buffers = []

    def around(self, shape, dtype, device, gap=0):
        """Uninitialised memory for ``shape`` between canaries, ``gap`` of them after each row."""
        columns, rows = (shape[-1] if shape else 1), torch.Size(shape[:-1]).numel()
        buffer = torch.empty(rows * (columns + gap) + 2 * GUARD, dtype=dtype, device=device)
        buffer.view(BITS[dtype]).fill_(CANARY[dtype])
        mine = torch.zeros_like(buffer, dtype=torch.bool)
        inside, own = (
            t[GUARD : len(t) - GUARD].view(rows, columns + gap)[:, :columns] for t in (buffer, mine)
        )
        own.fill_(True)
        self.buffers.append((buffer, mine))
        return inside.view(shape) if gap == 0 else inside.unflatten(0, shape[:-1])

    def copy(self, t, gap=0):
        return self.around(t.shape, t.dtype, t.device, gap).copy_(t)

    def assert_margins(self):
        for buffer, mine in self.buffers:
            outside = buffer.view(BITS[buffer.dtype])[~mine]
            assert bool((outside == CANARY[buffer.dtype]).all()), "a canary was overwritten"

    def snapshot(self):
        return [buffer.view(BITS[buffer.dtype]).clone() for buffer, _ in self.buffers]


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


def run(case, tensors, backend):
    """Output and gradients on the very tensors of ``tensors``, which are not copied."""
    names = ("A", "B", "h") if case.op == "delta_weight" else ("x", "A", "B", "h")
    own = {n: t if t is None else t.detach().requires_grad_(n in names) for n, t in tensors.items()}
    leaves = [own[name] for name in names if own[name] is not None]
    options = {"scale": case.scale, "terms": case.terms, "backend": backend}
    if case.op == "delta_weight":
        y = pk.delta_weight(own["A"], own["B"], own["h"], **options)
    else:
        torch.manual_seed(0)
        options |= {"dropout_p": case.dropout_p, "plan": case.plan}
        y = pk.pera_linear(**{n: t for n, t in own.items() if n != "dy"}, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, own["dy"])]


@pytest.mark.parametrize("gap", [0, 5], ids=["around", "between the rows"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_but_the_inputs_is_read_and_nothing_is_written(name, gap, backend, device, poison):
    """The results with canaries around, and between the rows of, every input; none has changed."""
    case = CASES[name]
    if gap and BF16 == case.dtype and device.type == "cpu":
        pytest.skip("PyTorch's own bfloat16 products on a CPU read one past an odd row, times zero")
    inputs = vars(testing.make_inputs(case, device))
    guards = Guards()
    guarded = {
        n: None if t is None else guards.copy(t, gap if t.dim() > 1 else 0)
        for n, t in inputs.items()
    }
    before = guards.snapshot()
    for got, expected in zip(run(case, guarded, backend), run(case, inputs, backend), strict=True):
        assert got.isfinite().all()
        # Libraries sum in another order where rows lie apart.
        tolerance = 200 * torch.finfo(got.dtype).eps if gap else 0.0
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=atol)
    for old, new in zip(before, guards.snapshot(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", CASES)
def test_kernels_write_nothing_beside_their_outputs(name, triton_backend, device, poison):
    """All that the launchers allocate lies between canaries: outputs, expansions, partial sums."""
    from pera_kernels.kernels import ops

    case = CASES[name]
    p = testing.make_inputs(case, device)
    adapter = Factors(p.A, p.B, p.h)
    options = Options(case.terms, 0.7, case.dropout_p, case.plan, triton_backend)
    needs = [True, True, True, p.h is not None]
    guards = Guards()
    with GuardedAllocations(guards) as mode:
        if case.op == "delta_weight":
            results = [ops.delta_forward(adapter, options)]
            results += ops.delta_backward(p.dy, adapter, options, needs[1:])
        else:
            seed = draw_seed(device) if case.dropout_p else None
            (y,), (u,) = ops.forward(p.x, [Base(p.weight, p.bias)], [adapter], seed, options)
            kept = None if case.plan == "composed" else u
            saved = Saved(p.x, kept, p.weight, adapter, seed)
            results = [y, *ops.backward(p.dy, saved, options, needs)]
    assert mode.count >= 6
    guards.assert_margins()
    for t in results:
        assert t.isfinite().all()


def test_a_canary_that_is_overwritten_is_noticed():
    """The guards themselves: on either side, and between rows."""
    for at in (GUARD - 1, GUARD + 3, -1):
        guards = Guards()
        inside = guards.copy(torch.zeros(2, 3), gap=2)
        inside.fill_(1.0)
        guards.assert_margins()
        guards.buffers[0][0][at] = 0.0
        with pytest.raises(AssertionError, match="canary"):
            guards.assert_margins()


# ---- addresses past 2**31 elements, in the interpreter and with little memory


@pytest.fixture
def interpreted():
    """The kernels on CPU tensors, also where there is a GPU."""
    if (reason := unavailable("triton", torch.device("cpu"))) is not None:
        pytest.skip(f"backend triton: {reason}")


@pytest.fixture
def sparse(tmp_path):
    """Views that reach far in a file with holes: only what is touched takes memory.

    They start in its middle, so that an address that wraps is wrong and not outside.
    """
    made = []

    def make(values, strides):
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
FAR = {"product": 3 * 2**28 + 8, "stride": 2**31 + 24}


def projected(x, f):
    from pera_kernels.kernels.launch import Factor
    from pera_kernels.kernels.project import project

    u = torch.empty(len(x), lane_count(3, "full"))
    project(x, Factor(f, None, 3, "full"), out=u)
    return u


def accumulated(base, u, out):
    from pera_kernels.kernels.accumulate import accumulate

    phi = torch.linspace(-1.0, 1.0, u.shape[1] * base.shape[1]).view(u.shape[1], -1)
    accumulate(base, u, phi, out=out, scale=0.5)
    return out


def contracted(left, x, f):
    from pera_kernels.kernels.contract import Contraction, contract
    from pera_kernels.kernels.launch import Factor
    from pera_kernels.kernels.reduce import sum_partials

    df, dh = torch.empty(f.shape), torch.empty(6)
    factor = Factor(f, torch.ones(6), 3, "full")
    sum_partials(contract([Contraction(left, x, factor, df, dh, 0.5)]))
    return torch.cat([df.flatten(), dh])


def composed(base):
    from pera_kernels.kernels.compose import compose

    phi_b, phi_a = torch.linspace(-1.0, 1.0, 160).view(16, 10).split((len(base), 5), 1)
    return compose(base, phi_b.contiguous(), phi_a.contiguous(), scale=0.5)


OPERANDS = {
    projected: {"x": (5, 6), "f": (3, 6)},
    accumulated: {"base": (5, 7), "u": (5, 16), "out": (5, 7)},
    contracted: {"left": (5, 16), "x": (5, 7), "f": (3, 7)},
    composed: {"base": (5, 5)},
}
# Which operands may lie far apart, and along which axis.
FAR_OPERANDS = [
    (projected, "x", "rows"),
    (projected, "x", "columns"),
    (projected, "f", "rows"),
    (projected, "f", "columns"),
    (accumulated, "base", "rows"),
    (accumulated, "u", "rows"),
    (accumulated, "out", "rows"),
    (contracted, "left", "rows"),
    # delta_weight passes φ(B)ᵀ, whose lanes are M apart.
    (contracted, "left", "columns"),
    (contracted, "x", "rows"),
    (contracted, "x", "columns"),
    (contracted, "f", "rows"),
    (composed, "base", "rows"),
    (composed, "base", "columns"),
]


@pytest.mark.parametrize("stride", FAR.values(), ids=FAR)
@pytest.mark.parametrize("operation, name, axis", FAR_OPERANDS)
def test_operands_whose_rows_or_columns_lie_far_apart(
    operation, name, axis, stride, sparse, interpreted
):
    operands = {n: torch.randn(shape) for n, shape in OPERANDS[operation].items()}
    far = sparse(operands[name], (stride, 1) if axis == "rows" else (1, stride))
    got, expected = operation(**{**operands, name: far}), operation(**operands)
    assert torch.equal(got, expected) and got.any() and got.isfinite().all()


def relaunch(call, grid, **changes):
    """Start the kernel of a recorded launch with other arguments."""
    assert changes.keys() <= call.arguments.keys()
    call.kernel[grid](**call.arguments | changes)


@pytest.mark.parametrize("which, apart", [("df", "stride_df_split"), ("dh", "stride_dh")])
def test_a_contraction_writes_far_partial_sums(which, apart, sparse, interpreted):
    """Partial sums of df lie R · N apart, those of dh L: their number times that may pass 2**31."""
    from pera_kernels.kernels.contract import _contract_tile
    from pera_kernels.kernels.launch import recorded

    with recorded() as calls:
        contracted(torch.randn(900, 16), torch.randn(900, 7), torch.randn(3, 7))
    (job,) = calls[0].arguments["jobs"]
    names = _contract_tile.arg_names[1 : 1 + len(job)]
    (partial,) = job[names.index(f"{which}_ptrs")]
    partial.zero_()
    assert partial.dim() == 2 and partial.shape[0] > 3, "the sums were not split"
    far, stride = sparse(partial, (FAR["product"], 1)), FAR["product"]
    relaunch(calls[0], calls[0].grid)
    changes = {f"{which}_ptrs": (far,), apart: stride}
    moved = tuple(changes.get(name, own) for name, own in zip(names, job, strict=True))
    relaunch(calls[0], calls[0].grid, jobs=(moved,))
    assert torch.equal(far, partial) and partial.any()


@pytest.mark.parametrize("name", ["expand", "accumulate", "compose"])
def test_expansions_with_far_lanes(name, sparse, interpreted):
    """φ (lanes, N) of so many columns that its last lanes lie past 2**31."""
    from pera_kernels.kernels.accumulate import accumulate
    from pera_kernels.kernels.compose import compose
    from pera_kernels.kernels.expand import expand
    from pera_kernels.kernels.launch import Factor, recorded

    width = 3 * 2**26
    a, b = (Factor(torch.randn(4, n).half(), None, 4, "full") for n in (16, 5))
    (phi,), (phi_b,) = (expand([f], dtype=F16) for f in (a, b))
    assert phi.shape == (16, 16) and phi[13].any() and 13 * width > REACH
    u, y = torch.randn(5, 16).half(), torch.empty(5, 16).half()
    launchers = {
        "expand": lambda: expand([a], dtype=F16)[0],
        "accumulate": lambda: accumulate(None, u, phi, out=y, scale=0.5),
        "compose": lambda: compose(None, phi_b, phi, scale=0.5),
    }
    near = launchers[name]()
    near = y if near is None else near
    with recorded() as calls:
        launchers[name]()
    got = sparse(torch.zeros_like(near), (width if name == "expand" else 1024, 1))
    far = sparse(phi, (width, 1))
    job = (sparse(a.rows, (1024, 1)), (), got, 0, width, 1024, 1)
    changes = {
        "expand": {"factors": (job,)},
        "accumulate": {"phi_ptr": far, "M": width, "y_ptr": got, "stride_y_t": 1024},
        "compose": {"phi_a_ptr": far, "N": width, "w_ptr": got, "stride_w_m": 1024},
    }
    # The first program alone: the columns of its tile are there, all others are not.
    relaunch(calls[0], (1, 1), **changes[name])
    assert torch.equal(got, near) and near.any()


def test_a_sum_of_far_partial_results(sparse, interpreted):
    """out = Σ partial[p] with partial results that lie past 2**31."""
    from pera_kernels.kernels.launch import recorded
    from pera_kernels.kernels.reduce import ELEMENTS, Sum, sum_partials

    partial = torch.randn(5, ELEMENTS // 8)
    out, got = torch.empty(2, partial.shape[1])
    job = Sum(partial, out, out.numel(), 0)
    sum_partials([job])
    with recorded() as calls:
        sum_partials([job])
    far, stride = sparse(partial, (FAR["product"], 1)), FAR["product"]
    relaunch(calls[0], (1,), sums=((far, got, 5, stride, out.numel(), 0),))
    assert torch.equal(got, out)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_a_whole_call_on_far_rows(backend_name, sparse, interpreted):
    """Output and gradients of x and dy whose rows lie far apart are those of dense ones."""
    case = Case(r=3, T=5, N=6, M=7)
    inputs = vars(testing.make_inputs(case))
    strides = (FAR["product"], 1)
    far = {n: sparse(t, strides) if n in ("x", "dy") else t for n, t in inputs.items()}
    for a, b in zip(run(case, far, backend_name), run(case, inputs, backend_name), strict=True):
        torch.testing.assert_close(a, b)


def assert_ends_count_alone(case, device, backend):
    """On tokens that are zero but for the first and last 64, outputs and gradients are those of
    these 128 alone.
    """
    ends = 64
    small = vars(testing.make_inputs(replace(case, T=2 * ends), device))
    small["bias"].zero_()
    large = dict(small)
    for name, width in (("x", case.N), ("dy", case.M)):
        large[name] = torch.zeros(case.T, width, dtype=case.dtype, device=device)
        large[name][:ends], large[name][-ends:] = small[name][:ends], small[name][ends:]
    got, expected = run(case, large, backend), run(case, small, backend)
    tolerance = 16 * torch.finfo(case.dtype).eps
    for name, a, b in zip(("y", "dx", "dA", "dB", "dh"), got, expected, strict=True):
        if name in ("y", "dx"):
            assert not a[ends:-ends].any(), name
            a = torch.cat([a[:ends], a[-ends:]])
        atol = tolerance * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, msg=name)


def test_first_and_last_rows_of_a_few(backend, device):
    """The check of the next test, where it is cheap."""
    assert_ends_count_alone(Case(r=6, T=300, N=40, M=24), device, backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_more_than_2_31_elements_on_a_gpu(backend_name):
    """x, y, dx and dy of more than 2**31 elements each."""
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free GPU memory; {free / GIB:.0f} GiB are free")
    case = Case(r=6, T=2**20 + 96, N=2064, M=2064, dtype=BF16)
    assert case.T * case.N > REACH
    assert_ends_count_alone(case, torch.device("cuda"), backend_name)
    torch.cuda.empty_cache()
