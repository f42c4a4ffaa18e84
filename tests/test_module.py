"""PeraLinear as a drop-in: state, merging, disabling, copies, bases of every kind."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import pera_kernels as pk


def trained(device="cpu", **options):
    layer = pk.PeraLinear(20, 12, r=3, device=device, **options)
    with torch.no_grad():
        for p in pk.adapter_parameters(layer):
            p.normal_(std=0.5)
    return layer


@pytest.mark.parametrize("terms", ["full", "square", "cross", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_at_initialisation_is_the_base_layers(terms, dtype, bias, backend, device):
    base = nn.Linear(40, 24, bias=bias, device=device, dtype=dtype)
    x = torch.randn(3, 7, 40, device=device, dtype=dtype)
    expected = base(x)
    for plan in ("factored", "composed"):
        layer = pk.PeraLinear.from_linear(base, 5, terms=terms, backend=backend, plan=plan)
        assert torch.equal(layer(x), expected)


def test_trainable_are_exactly_the_adapters_parameters():
    layer = pk.PeraLinear(20, 12, r=3)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"pera_A", "pera_B", "pera_h"}
    assert pk.PeraLinear(20, 12, r=3, terms="linear").pera_h is None


def test_initialisation():
    layer = pk.PeraLinear(4000, 12, r=8)
    bound = 1 / 4000**0.5
    assert layer.pera_A.abs().max() <= bound and layer.pera_A.std() > 0.5 * bound
    assert not layer.pera_B.any() and not layer.pera_h.any()
    gaussian = pk.PeraLinear(4000, 12, r=8, init="gaussian")
    assert abs(gaussian.pera_A.std() - 1 / 8) < 0.01
    assert layer.scale == 1.0 and pk.PeraLinear(4, 4, r=8, alpha=16).scale == 2.0


def test_from_linear_shares_the_base():
    base = nn.Linear(20, 12)
    layer = pk.PeraLinear.from_linear(base, 3)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not base.weight.requires_grad
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "pera_A", "pera_B", "pera_h"}


def test_loads_a_plain_linears_checkpoint():
    base, layer = nn.Linear(20, 12), trained()
    missing = layer.load_state_dict(base.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"pera_A", "pera_B", "pera_h"}
    assert not missing.unexpected_keys and torch.equal(layer.weight, base.weight)


class Scaled(nn.Module):
    """A base layer of a kind the package does not know: an integer weight and a scale."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 20, 12
        self.register_buffer("weight", torch.randint(-127, 127, (12, 20), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * 0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_linear_like_base_is_called(dropout, backend, device):
    base = Scaled().to(device)
    before = base.weight.clone()
    layer = pk.PeraLinear.from_linear(base, 3, backend=backend, dropout=dropout)
    assert isinstance(layer, pk.PeraLinear) and layer.pera_A.dtype == torch.float32
    assert layer.weight is base.weight
    x = torch.randn(2, 5, 20, device=device, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        for p in pk.adapter_parameters(layer):
            p.normal_()
    results = []
    for name in (backend, "reference"):
        layer.backend = name
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(2)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad.clone(), *(p.grad.clone() for p in pk.adapter_parameters(layer))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(base.weight, before)
    with pytest.raises(TypeError, match="merge needs a plain nn.Linear as base; Scaled"):
        layer.merge()


def test_a_linear_with_hooks_is_called():
    base = nn.Linear(20, 12)
    base.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(4, 20)
    assert torch.equal(pk.PeraLinear.from_linear(base, 3)(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
def test_merge_and_unmerge(dtype, adapter_dtype, backend, device):
    layer = trained(device, dtype=dtype, adapter_dtype=adapter_dtype, backend=backend)
    base = layer.weight.clone()
    x = torch.randn(6, 20, device=device, dtype=dtype)
    unmerged = layer(x)
    exact = layer.weight.double() + pk.reference.delta_weight(
        layer.pera_A.double(), layer.pera_B.double(), layer.pera_h.double()
    )
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    merged = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged)
    assert torch.equal(layer(x), F.linear(x, merged, layer.bias))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(layer(x), unmerged, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, base)
    assert torch.equal(layer(x), unmerged)


def test_merge_without_a_kept_base_unmerges_approximately():
    layer = trained()
    base = layer.weight.clone()
    layer.merge(keep_base=False)
    assert layer.merged_base is None
    layer.unmerge()
    torch.testing.assert_close(layer.weight, base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merge_in_inference_mode_is_good_for_training(keep_base):
    layer = trained()
    with torch.inference_mode():
        layer.merge(keep_base=keep_base)
    x = torch.randn(6, 20, requires_grad=True)
    with layer.disabled():
        layer(x).sum().backward()
    expected = torch.ones(6, 12) @ layer.base_weight()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name, shape", [("pera_A", (3, 19)), ("pera_B", (1, 3))])
def test_merge_refuses_factors_of_other_features(name, shape):
    layer = trained()
    setattr(layer, name, nn.Parameter(torch.randn(shape)))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"A and B are for \(in, out\)"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


@pytest.mark.parametrize("disabled", ["forward", "backward"])
def test_a_checkpoint_that_is_not_reentrant_tells_disabled_from_merged(disabled):
    """Both save one weight of one shape: the gradient would be that of the other."""
    layer = trained()
    layer.merge()
    x = torch.randn(6, 20, requires_grad=True)

    def around(part):
        return layer.disabled() if disabled == part else contextlib.nullcontext()

    with around("forward"):
        y = checkpoint(layer, x, use_reentrant=False)
    with around("backward"), pytest.raises(CheckpointError):
        y.sum().backward()


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_disabled_merged_layer_is_transformed_as_its_base(keep_base, backend, device):
    layer = trained(device, backend=backend)
    x, expected = torch.randn(6, 20, device=device), layer.weight.clone()
    layer.merge(keep_base=keep_base)
    with layer.disabled():
        _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, x @ expected.t())


def test_merge_refuses_what_is_not_finite():
    layer = trained(dtype=torch.float16, adapter_dtype=torch.float32)
    with torch.no_grad():
        layer.pera_B[0] = 1e6
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="infinite or NaN; the weight is unchanged"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged
    layer.merge(safe=False)
    assert layer.merged and not layer.weight.isfinite().all()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_checkpoint_taken_while_merged_counts_the_adapter_once(keep_base):
    layer = trained()
    x = torch.randn(6, 20)
    expected = layer(x)
    layer.merge(keep_base=keep_base)
    state = layer.state_dict()
    fresh = pk.PeraLinear(20, 12, r=3)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-5)
    layer.load_state_dict(state)
    assert not layer.merged
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_loading_into_a_merged_layer_replaces_weight_and_adapter():
    merged, other = trained(), trained()
    merged.merge()
    merged.load_state_dict(other.state_dict())
    x = torch.randn(6, 20)
    assert not merged.merged and torch.equal(merged(x), other(x))


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_and_survives_nesting_and_exceptions(merged):
    layer = trained()
    x = torch.randn(6, 20)
    base, adapted = F.linear(x, layer.weight, layer.bias), layer(x)
    if merged:
        layer.merge()
    with pytest.raises(RuntimeError, match="inside"), layer.disabled() as same:
        assert same is layer and torch.equal(layer(x), base)
        with layer.disabled():
            assert torch.equal(layer(x), base)
        assert torch.equal(layer(x), base)
        raise RuntimeError("inside")
    torch.testing.assert_close(layer(x), adapted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer(x), base)


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    layer = trained(dropout=0.1).eval()
    x = torch.randn(6, 20)
    if merged:
        layer.merge()
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert other.merged == merged and torch.equal(other(x), expected)
        other.unmerge()
        with torch.no_grad():
            other.pera_B.zero_()
        assert torch.equal(layer(x), expected)


def test_to_moves_the_adapter_and_the_kept_base():
    layer = trained()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.merged_base.dtype == torch.bfloat16 == layer.pera_h.dtype
    layer.unmerge()
    assert layer(torch.randn(3, 20).bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").pera_A.device.type == "meta"


def test_repr_says_what_it_is():
    text = repr(pk.PeraLinear(20, 12, r=3, alpha=6, terms="square", dropout=0.1))
    for part in (
        "in_features=20",
        "r=3",
        "alpha=6",
        "terms='square'",
        "dropout=0.1",
        "merged=False",
    ):
        assert part in text


def test_delta_weight_is_differentiable():
    layer = trained()
    layer.delta_weight().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pk.adapter_parameters(layer))


@pytest.mark.parametrize("terms", ["full", "square", "cross"])
def test_quadratic_share(terms):
    layer = trained(terms=terms)
    linear = layer.pera_B @ layer.pera_A
    quadratic = layer.delta_weight() - linear
    expected = float(quadratic.norm() / linear.norm())
    assert layer.quadratic_share() == pytest.approx(expected, rel=1e-4)
    assert pk.PeraLinear(20, 12, r=3).quadratic_share() == 0.0
    assert trained(terms="linear").quadratic_share() == 0.0
