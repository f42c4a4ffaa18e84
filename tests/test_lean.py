"""The ``torch`` backend's own ways: few tokens, groups, kept expansions, coefficients at zero."""

import copy
import gc
import threading

import pytest
import torch

import pera_kernels as pk
from pera_kernels import lean, lean_adapters, lean_cache, lean_factors
from pera_kernels.terms import TERMS, expanded_rank
from pera_kernels.verify import numerics
from pera_kernels.verify.numerics import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CALLS = lean_cache.CALLS_BEFORE + 1


def assert_passes(case):
    verdicts = numerics.check(case, "torch")
    failed = [str(v) for v in verdicts if not v.passed]
    assert len(verdicts) >= 3 and not failed, f"{case}:\n" + "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 2, 7, 16, 20])
@pytest.mark.parametrize("above", [0, 1])
def test_boundary_of_few_tokens(above, r, terms, dtype, poison):
    T = min(lean_adapters.FEW_TOKENS, r) + above
    assert_passes(Case(terms=terms, r=r, dtype=dtype, T=T, N=70, M=50))
    if dtype != torch.float32:
        assert_passes(
            Case(terms=terms, r=r, dtype=dtype, adapter_dtype=torch.float32, T=T, dropout_p=0.2)
        )


@pytest.mark.parametrize("T", [lean.TRANSPOSED_TOKENS.start, lean.TRANSPOSED_TOKENS.stop])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_base_product(bias, T):
    x, weight = torch.randn(T, 40), torch.randn(24, 40)
    b = torch.randn(24) if bias else None
    A, B, h = torch.randn(3, 40), torch.zeros(24, 3), torch.zeros(6)
    y = pk.pera_linear(x, weight, A, B, h, b, backend="torch")
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("terms", ["full", "cross"])
@pytest.mark.parametrize("r", [2, 3, 8, 9])
def test_both_contractions_agree(r, terms, monkeypatch):
    factor = torch.randn(r, 30, dtype=torch.float64)
    dphi = torch.randn(expanded_rank(r, terms), 30, dtype=torch.float64)
    gathered = lean_factors.contract(dphi, factor, terms)
    monkeypatch.setattr(lean_factors, "GATHER_ELEMENTS", 0)
    torch.testing.assert_close(lean_factors.contract(dphi, factor, terms), gathered)
    leaf = factor.clone().requires_grad_()
    order = torch.tensor(lean_factors.circular_order(r, terms)) + r
    phi = pk.reference.expand(leaf, terms)
    phi = torch.cat([phi[:r], phi[order]])
    (expected,) = torch.autograd.grad(phi, leaf, dphi)
    torch.testing.assert_close(gathered, expected)


def group_inputs(dtype, terms, r, T, Ms=(24, 10, 17), N=40, factor_dtype=None):
    cases = [
        numerics.make_inputs(
            Case(
                terms=terms, r=r, T=T, N=N, M=M, dtype=dtype, adapter_dtype=factor_dtype, seed=seed
            )
        )
        for seed, M in enumerate(Ms)
    ]
    return cases[0].x, cases


def run_group(x, members, terms, dropout_p, seed, *, exact=False, unused=()):
    """y of each, dx and the gradients by the group functions."""
    lists = [[getattr(p, name) for p in members] for name in ("weight", "bias", "A", "B", "h")]
    weights, biases, As, Bs, hs = lists
    options = (seed, 0.7, terms, dropout_p)
    *ys, u = lean.group_forward(x, weights, biases, As, Bs, hs, *options)
    dys = [None if g in unused else p.dy for g, p in enumerate(members)]
    needs = [True] * (1 + 3 * len(members))
    if terms == "linear":
        needs[3::3] = [False] * len(members)
    gradients = lean.group_backward(dys, x, u, weights, As, Bs, hs, *options, needs)
    return ys, u, gradients


def run_reference(x, members, terms, dropout_p, seed, exact):
    def leaf(t):
        return None if t is None else (t.double() if exact else t).clone().requires_grad_()

    x = leaf(x)
    ys, leaves = [], [x]
    for p in members:
        A, B, h = leaf(p.A), leaf(p.B), leaf(p.h)
        weight, bias = (p.weight.double(), p.bias.double()) if exact else (p.weight, p.bias)
        options = {"scale": 0.7, "terms": terms, "dropout_p": dropout_p, "seed": seed}
        ys.append(pk.reference.pera_linear(x, weight, A, B, h, bias, **options))
        leaves += [t for t in (A, B, h) if t is not None]
    dys = [p.dy.double() if exact else p.dy for p in members]
    return [y.detach() for y in ys], list(torch.autograd.grad(ys, leaves, dys))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("T", [5, 33])
def test_group_under_the_numeric_rule(T, terms, dtype, dropout_p, poison):
    r = 6
    x, members = group_inputs(dtype, terms, r, T)
    seed = torch.tensor([11]) if dropout_p else None
    ys, u, gradients = run_group(x, members, terms, dropout_p, seed)
    assert u.shape == (T, len(members) * expanded_rank(r, terms))
    got = [*ys, *(g for g in gradients if g is not None)]
    reference = sum(run_reference(x, members, terms, dropout_p, seed, False), [])
    truth = sum(run_reference(x, members, terms, dropout_p, seed, True), [])
    verdicts = [
        numerics.judge(str(number), *own, dtype)
        for number, own in enumerate(zip(got, reference, truth, strict=True))
    ]
    failed = [str(v) for v in verdicts if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("T", [0, 4, 33])
def test_group_is_its_members(T):
    """Alone, or with outputs that nobody used; each member's bits are those of a single layer."""
    x, members = group_inputs(torch.float32, "full", 6, T)
    ys, u, gradients = run_group(x, members, "full", 0.0, None)
    _, _, partial = run_group(x, members, "full", 0.0, None, unused=(1,))
    dx = []
    for g, p in enumerate(members):
        options = (p.A, p.B, p.h, None, 0.7, "full", 0.0, False)
        y, own_u = lean.linear_forward(x, p.weight, p.bias, None, *options)
        assert torch.equal(y, ys[g])
        own = lean.linear_backward(p.dy, x, own_u, p.weight, *options, [True] * 4)
        dx.append(own[0])
        for name, single, together in zip(
            "ABh", own[1:], gradients[1 + 3 * g : 4 + 3 * g], strict=True
        ):
            torch.testing.assert_close(together, single, msg=f"d{name} of member {g}")
    torch.testing.assert_close(gradients[0], sum(dx), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(partial[0], dx[0] + dx[2], rtol=1e-4, atol=1e-4)
    assert partial[4:7] == [None] * 3
    for k in (1, 2, 3, 7, 8, 9):
        torch.testing.assert_close(partial[k], gradients[k])


def test_group_with_no_used_output():
    x, members = group_inputs(torch.float32, "full", 3, 4)
    _, _, gradients = run_group(x, members, "full", 0.0, None, unused=(0, 1, 2))
    assert gradients == [None] * 10


@pytest.fixture
def made(monkeypatch):
    """Counts expansions; the cache starts empty."""
    lean_cache._entries.clear()
    count = [0]
    expand = lean_adapters.expand

    def counting(*arguments):
        count[0] += 1
        return expand(*arguments)

    monkeypatch.setattr(lean_adapters, "expand", counting)
    yield count
    lean_cache._entries.clear()


def warm_layer(dtype=torch.float32, calls=CALLS, **options):
    layer = pk.PeraLinear(24, 16, r=4, backend="torch", dtype=dtype, **options).eval()
    with torch.no_grad():
        for p in (layer.pera_B, layer.pera_h):
            p.normal_()
    x = torch.randn(5, 24, dtype=dtype)
    for _ in range(calls):
        with torch.no_grad():
            layer(x)
    return layer, x


def assert_right(layer, x):
    """What the layer gives is what a layer without a history gives, bit for bit."""
    with torch.no_grad():
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def assert_evaluates(case):
    p = numerics.make_inputs(case)
    options = {"scale": 0.7, "terms": case.terms, "dropout_p": case.dropout_p}

    def evaluate(backend, exact=False):
        tensors = [p.x, p.weight, p.A, p.B, p.h, p.bias]
        torch.manual_seed(0)
        with torch.no_grad():
            tensors = [t.double() if exact and t is not None else t for t in tensors]
            return pk.pera_linear(*tensors, backend=backend, **options)

    truth, reference = evaluate("reference", True), evaluate("reference")
    verdict = numerics.judge("y", evaluate("torch"), reference, truth, case.dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("T", [1, lean_adapters.SINGLE_TOKENS, lean_adapters.SINGLE_TOKENS + 1, 40])
def test_evaluation_under_the_numeric_rule(T, terms, dtype, dropout_p):
    """Without gradients the coefficients are part of φ(B)."""
    assert_evaluates(Case(terms=terms, r=8, T=T, N=96, M=80, dtype=dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [lean_adapters.GRAM_RANK - 1, lean_adapters.GRAM_RANK])
def test_evaluation_of_a_few_tokens_under_the_numeric_rule(r, terms, dtype, dropout_p):
    assert_evaluates(Case(terms=terms, r=r, dtype=dtype, T=3, N=40, M=24, dropout_p=dropout_p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
def test_kept_expansions_give_the_same_bits(T, dtype, made):
    layer, _ = warm_layer(dtype, calls=0)
    x = torch.randn(T, 24, dtype=dtype)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(CALLS + 2)]
    assert made[0] == 2 * CALLS
    assert all(torch.equal(y, outputs[0]) for y in outputs)


CHANGES = {
    "optimizer step": lambda layer: torch.optim.SGD([layer.pera_A], lr=1.0).step(),
    "copy_": lambda layer: layer.pera_B.copy_(torch.randn_like(layer.pera_B)),
    "data add": lambda layer: layer.pera_A.data.add_(1.0),
    "data of one element": lambda layer: layer.pera_h.data[3].mul_(2.0),
    "data replaced": lambda layer: setattr(
        layer.pera_B, "data", torch.randn_like(layer.pera_B).t().contiguous().t()
    ),
    "numpy write": lambda layer: layer.pera_A.detach().numpy().__setitem__((1, 2), 7.0),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {k: v + 1.0 for k, v in layer.state_dict().items()}
    ),
    "parameter replaced": lambda layer: setattr(
        layer, "pera_A", torch.nn.Parameter(torch.randn_like(layer.pera_A))
    ),
    "coefficients replaced": lambda layer: setattr(
        layer, "pera_h", torch.nn.Parameter(torch.randn_like(layer.pera_h))
    ),
    "scale": lambda layer: setattr(layer, "alpha", 9.0),
    "reset": lambda layer: layer.reset_adapter(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, made):
    layer, x = warm_layer()
    with torch.no_grad():
        before = layer(x)
        layer.pera_A.grad = torch.randn_like(layer.pera_A)
        CHANGES[name](layer)
        after = layer(x)
    assert not torch.equal(before, after)
    for _ in range(CALLS):
        assert_right(layer, x)


def test_dtype_change(made):
    layer, x = warm_layer()
    assert_right(layer.double(), x.double())
    assert_right(layer.bfloat16(), x.bfloat16())


def test_two_inputs_dtypes_on_one_adapter(made):
    layer, x = warm_layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert_right(layer, x)


def test_copies_and_neighbours_are_apart(made):
    layer, x = warm_layer()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.pera_A.data.add_(1.0)
    assert_right(other, x)
    assert_right(layer, x)
    shared = pk.PeraLinear.from_linear(torch.nn.Linear(24, 16), r=4, backend="torch").eval()
    shared.pera_A = layer.pera_A
    assert_right(shared, x)
    assert_right(layer, x)


def test_training_keeps_nothing(made):
    layer, x = warm_layer(calls=0)
    layer.train()
    optimizer = torch.optim.SGD(pk.adapter_parameters(layer), lr=1e-5)
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        assert all(entry.made is None for entry in lean_cache._entries.values())
    assert_right(layer.eval(), x)


def test_micro_batches_use_what_is_kept_and_get_the_same_gradients(made, monkeypatch):
    layer, x = warm_layer(calls=0)
    layer.train()
    gradients = []
    for _ in range(CALLS + 2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in pk.adapter_parameters(layer)])
    assert any(entry.made is not None for entry in lean_cache._entries.values())
    for later in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, gradients[0], strict=True))
    # Enough tokens for the way with expansions, which neither direction forms any more.
    wide = torch.randn(32, x.shape[-1])
    with monkeypatch.context() as patch:
        patch.setattr(lean_adapters, "expand", None)
        y = layer(wide)
        kept = torch.autograd.grad(y.square().sum(), [layer.pera_A, layer.pera_B, layer.pera_h])
        # The backward sees a change that leaves the version alone.
        y = layer(wide)
        layer.pera_B.data.mul_(2.0)
        with pytest.raises(TypeError, match="must be callable"):
            y.sum().backward()
    layer.pera_B.data.div_(2.0)
    again = copy.deepcopy(layer)
    y = again(wide)
    fresh = torch.autograd.grad(y.square().sum(), [again.pera_A, again.pera_B, again.pera_h])
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))


def test_entries_die_with_the_parameters_and_with_a_change(made):
    layer, x = warm_layer()
    assert lean_cache._entries[layer.pera_A].made is not None
    with torch.no_grad():
        layer.pera_h.mul_(2.0)
        layer(x)
    assert lean_cache._entries[layer.pera_A].made is None
    del layer
    gc.collect()
    assert len(lean_cache._entries) == 0


def test_memory_is_bounded(made, monkeypatch):
    layer, x = warm_layer()
    held = lean_cache._entries[layer.pera_A].nbytes()
    K = expanded_rank(4)
    assert K * (24 + 16) * 4 <= held <= (K + 2 * 4) * (24 + 16) * 4 + 1024
    monkeypatch.setattr(lean_cache, "LIMIT_BYTES", held + 100)
    second, _ = warm_layer(calls=3 * CALLS)
    assert lean_cache._entries[second.pera_A].made is None
    assert lean_cache._entries[layer.pera_A].made is not None
    assert_right(second, x)


def test_non_leaf_and_inference_tensors_are_not_kept(made):
    layer, x = warm_layer(calls=0)
    with torch.inference_mode():
        frozen = [p.clone() for p in (layer.pera_A, layer.pera_B, layer.pera_h)]
        for _ in range(CALLS + 1):
            pk.pera_linear(x, layer.weight, *frozen, backend="torch")
    for _ in range(CALLS + 1):
        pk.pera_linear(x, layer.weight, layer.pera_A * 2, layer.pera_B, layer.pera_h)
    assert len(lean_cache._entries) == 0


def test_threads(made):
    layers = [warm_layer(calls=0)[0] for _ in range(3)]
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = [copy.deepcopy(layer)(x) for layer in layers]
    wrong = []

    def work():
        for _ in range(30):
            for layer, y in zip(layers, expected, strict=True):
                with torch.no_grad():
                    if not torch.equal(layer(x), y):
                        wrong.append(layer)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", ["full", "square", "cross"])
def test_coefficients_frozen_at_zero(terms, dtype, poison):
    """The pairs are not formed, and all is as with terms="linear"."""
    p = numerics.make_inputs(Case(terms=terms, r=5, T=21, N=40, M=24, dtype=dtype))
    results = []
    for h, kind in ((torch.zeros_like(p.h), terms), (None, "linear")):
        leaves = [t.clone().requires_grad_() for t in (p.x, p.A, p.B)]
        x, A, B = leaves
        y = pk.pera_linear(x, p.weight, A, B, h, p.bias, terms=kind, backend="torch")
        results.append([y, *torch.autograd.grad(y, leaves, p.dy)])
    for pairs, linear in zip(*results, strict=True):
        torch.testing.assert_close(pairs, linear)


def test_zero_coefficients_cost_no_pairs_and_a_write_is_seen():
    p = numerics.make_inputs(Case(r=5, T=21, N=40, M=24))
    h = torch.zeros_like(p.h)
    options = (None, 1.0, "full", 0.0, False)
    y, u = lean.linear_forward(p.x, p.weight, p.bias, None, p.A, p.B, h, *options)
    assert u.shape == (21, 5)
    trainable = h.clone().requires_grad_()
    _, full = lean.linear_forward(p.x, p.weight, p.bias, None, p.A, p.B, trainable, *options)
    assert full.shape == (21, expanded_rank(5))
    h.data.copy_(p.h)
    changed, _ = lean.linear_forward(p.x, p.weight, p.bias, None, p.A, p.B, h, *options)
    expected = pk.pera_linear(p.x, p.weight, p.A, p.B, p.h, p.bias, backend="reference")
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(changed, y)


@pytest.mark.parametrize("wanted", ["x", "A", "B"])
def test_zero_coefficients_with_part_of_the_gradients(wanted):
    p = numerics.make_inputs(Case(r=5, T=21, N=40, M=24))
    h = torch.zeros_like(p.h)
    getattr(p, wanted).requires_grad_(True)
    got = []
    for backend in ("torch", "reference"):
        y = pk.pera_linear(p.x, p.weight, p.A, p.B, h, p.bias, backend=backend)
        got += torch.autograd.grad(y, getattr(p, wanted), p.dy)
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [79, 160, 165, 320])
@pytest.mark.parametrize("T, C", [(1, 7), (24, 25), (30, 2), (30, 30)])
def test_product_of_any_number_of_lanes(T, C, K):
    """Summed in blocks or not, whatever the strides."""
    a, b = torch.randn(K, T).t(), torch.randn(K, C)
    torch.testing.assert_close(
        lean_factors.product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4
    )
