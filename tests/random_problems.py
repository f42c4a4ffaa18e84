"""Random calls of the package, what they should give, and the checks that hold for all of them.

``test_properties.py`` runs them; ``check_rule(Problem(...))`` runs a printed example again.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.dropout import draw_seed, keep_mask
from pera_kernels.terms import TERMS, coefficient_count, pairs

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# A truth for float64 needs a wider type, which not every platform has.
WIDE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
DTYPES = [F32, BF16, F16, *([F64] if WIDE else [])]
# An output of few values is judged on several draws of the inputs together; a verdict that chance
# may have spoken is asked for again with many more. Interpreted kernels take too long for as many.
POOLED_VALUES, DRAWS = 64, 8
MORE_POOLED_VALUES, MORE_DRAWS, MORE_DRAWS_INTERPRETED = 1024, 64, 16
NAMES = ("x", "weight", "bias", "A", "B", "h", "dy")
LAYOUTS = ("dense", "transposed", "sliced", "padded", "offset", "expanded")


@dataclass(frozen=True)
class Problem:
    """A call, how its inputs lie in memory, and which special values they hold."""

    op: str = "pera_linear"
    terms: str = "full"
    r: int = 3
    batch: tuple[int, ...] = (5,)
    N: int = 7
    M: int = 6
    dtype: torch.dtype = F32
    factor_dtype: torch.dtype = F32
    h_dtype: torch.dtype = F32
    scale: float = 1.0
    dropout_p: float = 0.0
    plan: str = "auto"
    bias: bool = True
    # Which inputs require a gradient.
    needs: tuple[str, ...] = ("x", "A", "B", "h")
    layouts: tuple[str, ...] = ("dense",) * 7
    # Powers of ten that the inputs are multiplied by, in the order of NAMES.
    sizes: tuple[int, ...] = (0,) * 7
    # (input, value, how many of its elements; 0 are all).
    special: tuple[tuple[str, float, int], ...] = ()
    seed: int = 0

    @property
    def T(self) -> int:
        return math.prod(self.batch)

    @property
    def K(self) -> int:
        return self.r + coefficient_count(self.r, self.terms)

    @property
    def differentiated(self) -> tuple[str, ...]:
        missing = {"h"} if self.terms == "linear" else set()
        missing |= {"x"} if self.op == "delta_weight" else set()
        return tuple(n for n in self.needs if n not in missing)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each input."""
        delta, factor = self.op == "delta_weight", self.factor_dtype
        y = (self.M, self.N) if delta else (*self.batch, self.M)
        return {
            "x": ((*self.batch, self.N), self.dtype),
            "weight": ((self.M, self.N), self.dtype),
            "bias": ((self.M,), self.dtype),
            "A": ((self.r, self.N), factor),
            "B": ((self.M, self.r), factor),
            "h": ((coefficient_count(self.r, self.terms),), self.h_dtype),
            "dy": (y, factor if delta else self.dtype),
        }


def laid_out(t, layout):
    """The same values with other strides, between NaNs; "expanded" repeats the first of them.

    Between numbers in bfloat16: PyTorch's products on a CPU read one past an odd row, times zero.
    """
    gap = torch.finfo(t.dtype).max if t.dtype == BF16 else math.nan
    if t.numel() == 0:
        return t
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, gap)], -1)[..., 0]
    if layout == "padded" and t.dim() > 1:
        return torch.cat([t, torch.full_like(t, gap)], -1)[..., : t.shape[-1]]
    if layout == "offset":
        ends = t.new_full((3,), gap)
        return torch.cat([ends, t.reshape(-1), ends])[3 : 3 + t.numel()].view(t.shape)
    if layout == "expanded" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t.contiguous()


def make_inputs(p, draw=0):
    """Random inputs by name, as ``testing.make_inputs`` sizes them, with the special values."""
    generator = torch.Generator().manual_seed(p.seed + 1000 * draw)
    std = {"weight": max(p.N, 1) ** -0.5, "A": 0.5, "B": 0.5}
    place = random.Random(p.seed)
    inputs = {}
    for name, size, layout in zip(NAMES, p.sizes, p.layouts, strict=True):
        shape, dtype = p.tensors[name]
        values = torch.randn(shape, generator=generator, dtype=F64)
        t = (values * std.get(name, 1.0) * 10.0**size).to(dtype)
        for where, value, count in p.special:
            if where == name and t.numel():
                flat = t.view(-1)
                at = [place.randrange(len(flat)) for _ in range(count)] or slice(None)
                flat[at] = value
        inputs[name] = laid_out(t, layout)
    if p.terms == "linear":
        inputs["h"] = None
    if not p.bias:
        inputs["bias"] = None
    return inputs


def evaluate(p, inputs, backend, *, exact=False):
    """The output and the gradients that were asked for, by name."""
    needs = p.differentiated

    def leaf(name):
        t = inputs[name]
        if t is None:
            return None
        # Not a clone, which would lay an expanded tensor out anew.
        return (t.double() if exact else t).detach().requires_grad_(name in needs)

    x, weight, bias, A, B, h = (leaf(name) for name in NAMES[:-1])
    options = {"scale": p.scale, "terms": p.terms, "backend": backend}

    def call():
        if p.op == "delta_weight":
            return pk.delta_weight(A, B, h, **options)
        torch.manual_seed(p.seed)
        # Products of one batch of rows, as the others compute them: PyTorch has other ways of
        # summing those of a vector or of several batches.
        rows = x.reshape(p.T, p.N) if backend == "reference" else x
        y = pk.pera_linear(
            rows, weight, A, B, h, bias, dropout_p=p.dropout_p, plan=p.plan, **options
        )
        return y.view(*p.batch, p.M)

    y = call()
    assert y.requires_grad == bool(needs)
    if not exact and backend == "torch":
        with torch.no_grad():
            assert same_bits(call(), y), f"{p}\nother bits without gradients"
    if needs:
        y.backward(inputs["dy"].double() if exact else inputs["dy"])
    leaves = {"x": x, "A": A, "B": B, "h": h}
    for name, t in leaves.items():
        assert t is None or (t.grad is None) == (name not in needs), name
    return {"y": y.detach(), **{f"d{name}": leaves[name].grad for name in needs}}


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@np.errstate(all="ignore")
def wide_truth(p, inputs):
    """Output and gradients by the formulas in a type wider than float64, as float64."""

    def wide(name, shape=None):
        t = inputs[name]
        return None if t is None else t.numpy().astype(np.longdouble).reshape(shape or t.shape)

    def contract(dphi, factor):
        d = dphi[: p.r].copy()
        for row, (i, j) in enumerate(pairs(p.r, p.terms), p.r):
            d[i] += dphi[row] * factor[j]
            d[j] += dphi[row] * factor[i]
        return d

    A, B, h = wide("A"), wide("B").T, wide("h")
    i, j = np.array(pairs(p.r, p.terms), dtype=int).reshape(-1, 2).T
    phi_A, phi_B = (np.concatenate([f, f[i] * f[j]]) for f in (A, B))
    c = np.ones(p.r, np.longdouble) if h is None else np.concatenate([np.ones(p.r), h])
    s, cA, cB = np.longdouble(p.scale), c[:, None] * phi_A, c[:, None] * phi_B
    if p.op == "delta_weight":
        G = wide("dy")
        dphi_A, dphi_B = s * phi_B @ G, s * phi_A @ G.T
        y, dx, dh = s * cB.T @ phi_A, None, (dphi_A * phi_A).sum(1)
    else:
        x, dy, weight = wide("x", (p.T, p.N)), wide("dy", (p.T, p.M)), wide("weight")
        torch.manual_seed(p.seed)
        keep = keep_mask(draw_seed(torch.device("cpu")), p.T, p.N, p.dropout_p).numpy()
        share = 1 - np.longdouble(p.dropout_p)
        dropped = np.where(keep, x / share, 0)
        u, v = dropped @ phi_A.T, dy @ phi_B.T
        y = x @ weight.T + s * (u @ cB) + (0 if inputs["bias"] is None else wide("bias"))
        dx = dy @ weight + np.where(keep, s * (v @ cA) / share, 0)
        dphi_A, dphi_B, dh = s * v.T @ dropped, s * u.T @ dy, s * (u * v).sum(0)
    dA, dB = contract(c[:, None] * dphi_A, A), contract(c[:, None] * dphi_B, B).T
    found = {"y": y, "dx": dx, "dA": dA, "dB": dB, "dh": dh[p.r :]}
    shape = {"y": inputs["dy"].shape, "dx": inputs["x"].shape}
    return {
        name: torch.from_numpy(np.ascontiguousarray(found[name], np.float64)).view(
            shape.get(name, found[name].shape)
        )
        for name in ("y", *(f"d{n}" for n in p.differentiated))
    }


def true_values(p, inputs):
    if F64 in (p.dtype, p.factor_dtype):
        return wide_truth(p, inputs)
    return evaluate(p, inputs, "reference", exact=True)


def largest(p, inputs):
    """A bound on every number that any order of evaluation forms from these inputs."""
    x, weight, bias, A, B, h, dy = (
        None if inputs[name] is None else inputs[name].double().abs() for name in NAMES
    )
    s = max(1.0, abs(p.scale)) / (1.0 - p.dropout_p)
    c = s * max([1.0, *([] if h is None else h.tolist())])
    phi_A, phi_B = (pk.reference.expand(f) for f in (A, B.t()))
    dphi = []
    if p.op == "delta_weight":
        dW, formed = dy, []
    else:
        x, dy = x.reshape(p.T, p.N), dy.reshape(p.T, p.M)
        u, v, dW = c * x @ phi_A.t(), c * dy @ phi_B.t(), s * dy.t() @ x
        dphi = [(v.t() @ x, phi_A, A), (u.t() @ dy, phi_B, B)]
        composed, b = weight + c * phi_B.t() @ phi_A, 0.0 if bias is None else bias
        formed = [s * x, s * dy, u, v, (u * v).sum(0), u @ phi_B, v @ phi_A]
        formed += [x @ composed.t() + b, dy @ composed, x @ weight.t() + b, dy @ weight]
    dphi += [(c * phi_B @ dW, phi_A, A), (c * phi_A @ dW.t(), phi_B, B)]
    for d, phi, factor in dphi:
        most = max([1.0, *factor.flatten().tolist()])
        formed += [d * most * (p.r + 2), (d * phi).sum(1)]
    formed += [c * phi_A, c * phi_B, c * phi_B.t() @ phi_A, dW]
    return max([0.0, *(float(t.max()) for t in formed if t.numel())])


def limit(p):
    return min(torch.finfo(t).max for t in (p.dtype, p.factor_dtype, p.h_dtype))


def all_underflow(p, truth):
    """Whether an output is so small that the order of the factors decides what is left of it."""
    info = torch.finfo(p.dtype)
    most = float(truth.abs().max()) if truth.numel() else 0.0
    return p.dtype != F16 and 0.0 < most < info.smallest_normal / info.eps**2


def pooled_verdicts(p, backend, draws):
    """A verdict on each output and gradient that can be judged, by name."""
    outputs = [[], [], []]
    for draw in range(draws):
        inputs = make_inputs(p, draw)
        outputs[0].append(evaluate(p, inputs, backend))
        outputs[1].append(evaluate(p, inputs, "reference"))
        outputs[2].append(true_values(p, inputs))
    verdicts = {}
    for name in outputs[0][0]:
        got, reference, truth = (torch.stack([o[name] for o in group]) for group in outputs)
        if not all_underflow(p, truth):
            verdicts[name] = testing.judge(name, got, reference, truth, p.dtype)
    return verdicts


def check_rule(p, backend="torch"):
    """Where nothing can overflow, the numeric rule; else :func:`check_overflow`.

    The errors of few numbers are pooled over draws of the inputs, as ``testing.check`` does; a
    verdict that chance may have spoken is asked for again with many more draws.
    """
    sizes = [math.prod(p.tensors[name][0]) for name in ("dy", *p.differentiated)]
    fewest = min(filter(None, sizes), default=POOLED_VALUES)
    draws = min(DRAWS, -(-POOLED_VALUES // fewest))
    inputs = [make_inputs(p, draw) for draw in range(draws)]
    if max(largest(p, own) for own in inputs) > limit(p) / 4:
        return check_overflow(p, inputs[0], backend)
    verdicts = pooled_verdicts(p, backend, draws)
    if not all(v.passed for v in verdicts.values()):
        more = max(MORE_DRAWS, -(-MORE_POOLED_VALUES // fewest))
        more = MORE_DRAWS_INTERPRETED if backend == "triton" else more
        verdicts = pooled_verdicts(p, backend, more)
    for verdict in verdicts.values():
        assert verdict.passed, f"{p}\n{verdict}"


def check_overflow(p, inputs, backend):
    """A result past the dtype's range is never a finite number, but where the reference gives one:
    there large terms cancel, and their rounding decides. In float16 the factored output is infinite
    or NaN exactly where the reference is: there the products round in the same places.
    """
    got, truth = evaluate(p, inputs, backend), true_values(p, inputs)
    expected = evaluate(p, inputs, "reference")
    for name, t in got.items():
        beyond = truth[name].abs() > 2 * torch.finfo(t.dtype).max
        beyond &= ~expected[name].isfinite()
        assert not t[beyond].isfinite().any(), f"{p}\n{name}: an overflow was hidden"
    if p.dtype == F16 and p.plan != "composed" and p.dropout_p == 0.0:
        for kind in (torch.isposinf, torch.isneginf, torch.isnan):
            assert torch.equal(kind(got["y"]), kind(expected["y"])), f"{p}\n{kind.__name__}"


def check_spread(p, backend="torch"):
    """Inputs with infinities or NaNs: where the float64 truth is not finite, nothing is finite; and
    where it is finite, all is finite, but for these:

    * which of inf and NaN appears is the truth's only in the torch backend's y of the factored
      plan: gradients sum infinities in another order, and the kernels' unused lanes multiply them
      by zero;
    * "cross" gradients of factors: a_i is multiplied by a zero for its absent square, so dA_i is
      NaN where a_i is not finite itself;
    * the Triton contraction sends rows by a product with zeros and ones: within a column of dA (a
      row of dB) a NaN reaches the whole rank;
    * PyTorch's bfloat16 products on a CPU may take a NaN into the neighbouring row: there only
      that nothing is hidden is promised;
    * an empty batch: the truth has 0 · NaN.
    """
    inputs = make_inputs(p)
    got, truth = evaluate(p, inputs, backend), true_values(p, inputs)
    if p.T == 0:
        return
    for name, t in got.items():
        wrong = ~truth[name].isfinite()
        assert not t[wrong].isfinite().any(), f"{p}\n{name}: hidden"
        if p.dtype == BF16 or p.factor_dtype == BF16:
            continue
        if name in ("dA", "dB"):
            rank = 0 if name == "dA" else 1
            if backend == "triton":
                wrong = wrong.any(rank, keepdim=True).expand_as(wrong)
            elif p.terms == "cross":
                wrong = wrong | ~inputs[name[1]].isfinite()
        assert t[~wrong].isfinite().all(), f"{p}\n{name}: spread"
        if name == "y" and p.plan == "factored" and backend == "torch":
            for kind in (torch.isposinf, torch.isneginf, torch.isnan):
                assert torch.equal(kind(t), kind(truth[name])), f"{p}\n{kind.__name__}"


def finite_values(dtype):
    """Zeros, subnormal numbers and the limits of a dtype."""
    info = torch.finfo(dtype)
    small = [0.0, -0.0, info.smallest_normal, info.smallest_normal / 4, info.tiny * info.eps]
    return [*small, info.max, -info.max, info.max / 2, -math.sqrt(info.max), info.max**0.75]


@st.composite
def problems(draw, backend="torch", most=48, most_rank=20, special="finite", decades=6):
    dtype = draw(st.sampled_from(DTYPES if backend == "torch" else [F32, BF16, F16]))
    mixed = [dtype] if dtype == F64 else [dtype, dtype, F32]
    factor_dtype = draw(st.sampled_from(mixed))
    tokens = st.sampled_from([0, 1, 2, 4, 5, 16, 17]) | st.integers(0, most)
    few = st.integers(0, 3)
    batch = st.tuples(tokens) | st.just(()) | st.tuples(few, few) | st.tuples(few, few, few)
    # Wide enough now and then for the contraction by offsets.
    features = st.integers(1, most) | st.sampled_from([1, 64, 4 * most])
    plan = draw(st.sampled_from(["auto", "auto", "factored", "composed"]))
    # Sums of equal numbers round alike each time: one input at most repeats its rows.
    layouts = [draw(st.sampled_from(LAYOUTS[:-1])) for _ in NAMES]
    if draw(st.integers(0, 2)) == 0:
        layouts[draw(st.integers(0, len(NAMES) - 1))] = "expanded"
    p = Problem(
        op=draw(st.sampled_from(["pera_linear"] * 3 + ["delta_weight"])),
        terms=draw(st.sampled_from(TERMS)),
        r=draw(st.integers(1, most_rank)),
        batch=draw(batch),
        N=draw(features),
        M=draw(features),
        dtype=dtype,
        factor_dtype=factor_dtype,
        h_dtype=draw(st.sampled_from(list(dict.fromkeys([factor_dtype, *mixed])))),
        scale=draw(st.sampled_from([1.0, -1.0])) * 10.0 ** draw(st.floats(-decades, decades)),
        dropout_p=0.0 if plan == "composed" else draw(st.sampled_from([0.0, 0.0, 0.3])),
        plan=plan,
        bias=draw(st.booleans()),
        needs=draw(st.lists(st.sampled_from("xABh"), unique=True).map(tuple)),
        layouts=tuple(layouts),
        seed=draw(st.integers(0, 2**20)),
    )
    if special == "finite":
        # In float16 numbers of other sizes leave its range at once.
        sizes = tuple(0 if dtype == F16 else draw(st.integers(-3, 3)) for _ in NAMES)
        value = st.sampled_from(finite_values(dtype))
        places = st.tuples(st.sampled_from(NAMES), value, st.integers(1, 3))
        chosen = draw(st.lists(places, max_size=2))
        if draw(st.integers(0, 9)) == 0:
            chosen.append(("h", 0.0, 0))
        return replace(p, sizes=sizes, special=tuple(chosen))
    value = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
    name, count = draw(st.sampled_from(NAMES)), draw(st.integers(1, 2))
    return replace(p, special=((name, value, count),))
