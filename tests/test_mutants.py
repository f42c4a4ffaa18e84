"""What nothing else noticed when ``tools.mutate`` broke it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pera_kernels as pk
from pera_kernels import configs, lean_cache, lean_factors
from pera_kernels import testing as numerics
from pera_kernels.dropout import keep_mask
from pera_kernels.terms import circular_order, lane_count
from pera_kernels.testing import Case
from tests.adapted import plain_model, trained


def circular(factor, terms="full"):
    """φ of a factor in the kernels' order, in at least float32."""
    r = factor.shape[0]
    order = torch.tensor(circular_order(r, terms), dtype=torch.int64, device=factor.device) + r
    phi = pk.reference.expand(factor, terms)
    return torch.cat([phi[:r], phi[order]])


def in_circular_order(h, r):
    """(1, h) ``(K,)``."""
    return torch.cat([h.new_ones(r), h[torch.tensor(circular_order(r, "full"), device=h.device)]])


# ---- kernels and launchers


def test_lanes_over_several_programs_of_several_accumulators(triton_backend, device, monkeypatch):
    """80 lanes as 32, 32 and 16: what a program starts at is not what it has in one accumulator."""
    tile = configs.Tile(16, 16, 16, num_warps=4, num_stages=1, pieces=2)
    monkeypatch.setattr(configs, "tile_for", lambda *arguments: tile)
    assert lane_count(11) == 80 and configs.pieces(80, 16, 2) == 2
    verdicts = numerics.check(Case(r=11, T=17, N=40, M=40), "triton", device)
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]


def test_every_split_projection_is_summed(triton_backend, device, poison, monkeypatch):
    from pera_kernels import launch

    split = []
    project = launch.project

    def recorded(*arguments, **options):
        split.append(project(*arguments, **options))
        return split[-1]

    monkeypatch.setattr(launch, "project", recorded)
    xs = torch.randn(3, 5, 600, device=device)
    factors = torch.randn(3, 2, 600, device=device)
    sources = [
        launch.Source(x, launch.Factor(f, None, 2, "full"))
        for x, f in zip(xs, factors, strict=True)
    ]
    u = launch.update(sources, [], scale=1.0)
    assert len(split) == 3 and None not in split
    for own, x, factor in zip(u.tensor_split(3, 1), xs, factors, strict=True):
        torch.testing.assert_close(own[:, :5], x @ circular(factor).t(), rtol=1e-4, atol=1e-4)
        assert not own[:, 5:].any()


@pytest.mark.parametrize("plan", ["factored", "composed"])
def test_a_base_weight_of_any_strides(plan, backend, device):
    x, A, B, h = (torch.randn(s, device=device) for s in ((7, 12), (3, 12), (9, 3), (6,)))
    strided = torch.randn(12, 9, device=device).t()
    results = []
    for weight in (strided, strided.contiguous()):
        leaves = [t.clone().requires_grad_() for t in (x, A, B, h)]
        y = pk.pera_linear(leaves[0], weight, *leaves[1:], plan=plan, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


class Strange(nn.Module):
    """A base layer that keeps what it returns, and returns it column by column."""

    in_features, out_features = 12, 9

    def __init__(self, device):
        super().__init__()
        self.register_buffer("matrix", torch.randn(9, 12, device=device))

    def forward(self, x):
        self.kept = F.linear(x, self.matrix).t().contiguous().t()
        return self.kept


def test_a_base_output_of_any_strides_is_not_written_to(backend, device):
    layer = pk.PeraLinear.from_linear(Strange(device), 3, backend=backend).to(device)
    with torch.no_grad():
        for p in pk.adapter_parameters(layer):
            p.normal_()
    x = torch.randn(7, 12, device=device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert layer.base_layer.kept.stride() == (1, 7)
        base = F.linear(x, layer.base_layer.matrix)
        assert torch.equal(layer.base_layer.kept, base)
        expected = base + x @ layer.delta_weight().t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_no_tokens_are_zero(backend, device, poison):
    shapes = ((0, 12), (3, 12), (9, 3), (6,))
    leaves = [torch.ones(s, device=device).requires_grad_() for s in shapes]
    weight = torch.ones(9, 12, device=device)
    y = pk.pera_linear(leaves[0], weight, *leaves[1:], backend=backend)
    dx, *gradients = torch.autograd.grad(y.sum(), leaves)
    assert dx.shape == (0, 12) and not any(g.any() for g in gradients)


def test_factors_out_of_32_bits_are_copied(triton_backend):
    from pera_kernels import launch

    near = torch.empty_strided((2, 4), (2**30, 1), device="meta")
    far = torch.empty_strided((3, 4), (2**30, 1), device="meta")
    assert launch.addressable(near) is near
    assert launch.addressable(far).stride() == (4, 1)


def test_single_precision_is_exact_unless_torch_allows_tf32(triton_backend):
    from pera_kernels import launch

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, expected in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert launch.dot_precision(torch.float32) == expected
            assert launch.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "r, terms, lanes",
    [(16, "full", 160), (16, "linear", 16), (32, "full", 560), (1, "full", 16), (5, "full", 32)],
)
def test_lanes_are_whole_groups_of_16_and_no_more(r, terms, lanes):
    assert lane_count(r, terms) == lanes


# ---- rounding


@pytest.mark.parametrize("way", ["torch", "triton"])
@pytest.mark.parametrize(
    "factor_dtype, dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_h", [False, True])
def test_an_expansion_is_rounded_once(with_h, factor_dtype, dtype, way, request, device):
    """Factors and coefficient are multiplied in float32, then rounded: bit for bit."""
    r, N = 6, 50
    factor = torch.randn(r, N, device=device).to(factor_dtype)
    h = torch.randn(21, device=device) if with_h else None
    exact = circular(factor.float())
    if h is not None:
        exact = exact * in_circular_order(h, r).unsqueeze(1)
    if way == "triton":
        request.getfixturevalue("triton_backend")
        from pera_kernels import launch

        (phi,) = launch.expand([launch.Factor(factor, h, r, "full")], dtype=dtype)
        got = phi.rows[: len(exact)]
    else:
        c = lean_factors.coefficients(h, r, 1.0, "full")
        got = lean_factors.expand(factor, "full", dtype, c)
    assert torch.equal(got, exact.to(dtype))


# ---- dropout


def test_an_element_whose_lot_is_the_threshold_survives():
    """No lot is below 0, so that a probability of less than half a lot drops nothing."""
    seed, T, N = torch.tensor([3]), 1024, 1024
    assert keep_mask(seed, T, N, 2.0**-18).all()
    # The masks of growing probabilities are nested, and lot 1 is there to tell them apart.
    one, two = (keep_mask(seed, T, N, n * 2.0**-16) for n in (1, 2))
    assert 0 < int((~one).sum()) < int((~two).sum()) and bool((one | ~two).all())


# ---- kept expansions


def test_what_evaluation_keeps_is_not_used_in_training():
    """The former has scale and coefficients in φ(B), the latter has not."""
    layer = pk.PeraLinear(24, 16, 4, alpha=2.0, backend="torch")
    with torch.no_grad():
        layer.pera_B.normal_()
        layer.pera_h.normal_()
    x = torch.randn(32, 24)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for _ in range(lean_cache.CALLS_BEFORE + 1):
            evaluated = layer(x)
    assert lean_cache._entries[layer.pera_A].made is not None
    for own in (layer, fresh):
        own(x).square().sum().backward()
    for kept, anew in zip(pk.adapter_parameters(layer), pk.adapter_parameters(fresh), strict=True):
        torch.testing.assert_close(kept.grad, anew.grad)
    for _ in range(lean_cache.CALLS_BEFORE + 1):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), evaluated)


# ---- groups


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x):
        return self.gate(x) * self.up(x)


def pair(gate=None, **options):
    """A pair of layers with adapters that do something; ``gate`` has options of its own."""
    model = Pair()
    for name, own in (("gate", gate or {}), ("up", {})):
        pk.inject(model, [name], 2, backend="torch", **{**options, **own})
    with torch.no_grad():
        for p in pk.adapter_parameters(model):
            p.normal_()
    return model


def alone(layer):
    """A copy of a layer without the group."""
    layer = copy.deepcopy(layer)
    assert layer._group is None
    return layer


def test_an_input_changed_in_place_is_not_the_same_input():
    model, x = pair(), torch.randn(5, 8)
    with torch.no_grad():
        model.gate(x)
        assert set(model.gate._group._own.waiting.outputs) == {"up"}
        x.add_(1.0)
        torch.testing.assert_close(model.up(x), alone(model.up)(x))


def test_a_parameter_thawed_between_two_calls_gets_its_gradient():
    model, x = pair(), torch.randn(5, 8)
    model.up.pera_A.requires_grad_(False)
    model.gate(x)
    model.up.pera_A.requires_grad_(True)
    expected = alone(model.up)
    for layer in (model.up, expected):
        layer(x).square().sum().backward()
    torch.testing.assert_close(model.up.pera_A.grad, expected.pera_A.grad)


@pytest.mark.parametrize(
    "own", [{"alpha": 6.0}, {"terms": "square"}, {"dropout": 0.9}, {"plan": "factored"}], ids=str
)
def test_layers_that_compute_differently_are_not_grouped(own):
    model, x = pair(own), torch.randn(5, 8)
    model.gate(x)
    torch.testing.assert_close(model.up(x), alone(model.up)(x))
    assert pk.group_projections(model) == {} and pk.group_projections(pair()) != {}


def test_options_changed_later_dissolve_the_group():
    model, x = pair(), torch.randn(5, 8)
    model.gate.alpha = 6.0
    for layer in (model.gate, model.up):
        torch.testing.assert_close(layer(x), alone(layer)(x))


def test_a_group_drops_nothing_in_evaluation():
    model, x = pair(dropout=0.5).eval(), torch.randn(5, 8)
    assert model.gate._group is not None
    for layer in (model.gate, model.up):
        torch.testing.assert_close(layer(x), alone(layer)(x))


def test_outputs_of_autocast_are_not_used_outside():
    model, x = pair(), torch.randn(5, 8)
    for first, second in itertools.permutations((True, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            model.gate(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            assert model.up(x).dtype == (torch.bfloat16 if second else torch.float32)


# ---- models


def test_an_injection_that_fails_half_way_leaves_everything_trainable():
    """The second layer is float64, which the Triton backend does not compute in."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        pk.inject(model, r"\d", 2, backend="triton")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_loaded_into_merged_layers_counts_alone(tmp_path):
    pytest.importorskip("safetensors")
    model, other, x = trained(), trained(seed=7), torch.randn(5, 24)
    base = plain_model()(x)
    pk.save_adapter(model, tmp_path)
    pk.merge(other)
    pk.load_adapter(other, tmp_path, overwrite=True)
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), base)
