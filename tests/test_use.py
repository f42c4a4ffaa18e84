"""What real use does to a layer: other people's modules, modes, optimizers, arguments."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import pera_kernels as pk
from pera_kernels.testing import judge
from tests.adapted import (
    Attention,
    filled,
    layer,
    plain_model,
    trained,
)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_an_output_may_be_changed_in_place(shape, backend):
    own, x = layer(backend=backend), torch.randn(shape, requires_grad=True)
    y = own(x)
    y *= 2.0
    torch.relu_(y).sum().backward()
    got, x.grad = x.grad, None
    torch.relu(2.0 * own(x)).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_outputs_with_a_shared_input_may_be_changed_in_place(together, backend):
    model = filled(pk.inject(Attention(), ["q_proj", "k_proj", "v_proj"], r=3, backend=backend))
    q, k, _ = model(torch.randn(4, 8))
    q *= 2.0
    (q.sum() + k.relu_().sum()).backward()
    assert together == [3] and model.q_proj.pera_A.grad is not None


@pytest.mark.parametrize("autocast", ["forward", "backward", "both"])
def test_a_backward_computes_in_the_state_of_its_forward(autocast, backend):
    def gradients(around):
        own, x = layer(backend=backend), torch.ones(3, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast != "backward"):
            y = own(x).sum() + own.delta_weight().sum()
        with around:
            y.backward()
        return x.grad, own.pera_A.grad, own.pera_B.grad, own.pera_h.grad

    inside = torch.autocast("cpu", torch.bfloat16, enabled=autocast != "forward")
    for got, expected in zip(gradients(inside), gradients(contextlib.nullcontext()), strict=True):
        assert torch.equal(got, expected)


def functions(own, backend):
    A, B, h = (p.detach().double() for p in (own.pera_A, own.pera_B, own.pera_h))
    weight, x = own.weight.double(), torch.randn(5, 8, dtype=torch.float64)
    given = {"backend": backend}
    return {
        "x": (lambda v: pk.pera_linear(v, weight, A, B, h, **given), x),
        "A": (lambda v: pk.pera_linear(x, weight, v, B, h, **given), A),
        "B": (lambda v: pk.pera_linear(x, weight, A, v, h, **given), B),
        "h": (lambda v: pk.pera_linear(x, weight, A, B, v, **given), h),
        "h = 0": (lambda v: pk.pera_linear(x, weight, A, B, v, **given), torch.zeros_like(h)),
        "delta of h": (lambda v: pk.delta_weight(A, B, v, **given), h),
        "delta of A": (lambda v: pk.delta_weight(v, B, h, **given), A),
    }


@pytest.mark.parametrize("of", functions(layer(), "torch"))
def test_transforms_go_through_plain_operators(of):
    f, v = functions(layer(), "torch")[of]
    reference, _ = functions(layer(), "reference")[of]
    torch.manual_seed(1)
    t = torch.randn_like(v)
    y, tangent = torch.func.jvp(f, (v,), (t,))
    expected = (f(v + 1e-6 * t) - f(v - 1e-6 * t)) / 2e-6
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(v.requires_grad_(), t)))
    torch.testing.assert_close(dual.tangent, tangent)
    v.requires_grad_(False)
    torch.testing.assert_close(torch.func.jacrev(f)(v), torch.func.jacfwd(reference)(v))
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([v, t]))[1], f(t))
    one = lambda v: f(v).square().sum()  # noqa: E731
    torch.testing.assert_close(
        torch.func.hessian(one)(v),
        torch.autograd.functional.hessian(lambda v: reference(v).square().sum(), v),
    )


@pytest.mark.parametrize("of", ["x", "one parameter", "all parameters"])
def test_transforms_of_layers_that_share_their_input(of):
    """Second derivatives of a whole attention block: its projections are members of one group."""
    names = ["q_proj", "k_proj", "v_proj"]
    model = filled(pk.inject(Attention(), names, r=3)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    kept = {
        "one parameter": ["k_proj.pera_h"],
        "all parameters": [n for n, p in model.named_parameters() if p.requires_grad],
    }
    state = {n: p.detach() for n, p in model.named_parameters()}
    chosen = {n: state[n] for n in kept.get(of, [])}
    v = torch.cat([x.flatten()] if of == "x" else [p.flatten() for p in chosen.values()])

    def f(v):
        if of == "x":
            return torch.cat(model(v.view_as(x))).square().sum()
        parts = v.split([p.numel() for p in chosen.values()])
        given = {n: p.view_as(state[n]) for n, p in zip(chosen, parts, strict=True)}
        return torch.cat(torch.func.functional_call(model, given, (x,))).square().sum()

    expected = torch.func.grad(f)(v)
    along = torch.randn_like(v)
    step = 1e-6 * along
    numeric = (f(v + step) - f(v - step)) / 2e-6
    torch.testing.assert_close(expected @ along, numeric, rtol=1e-5, atol=1e-6)
    second = torch.func.jvp(torch.func.grad(f), (v,), (along,))[1]
    numeric = (torch.func.grad(f)(v + step) - torch.func.grad(f)(v - step)) / 2e-6
    torch.testing.assert_close(second, numeric, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.hessian(f)(v) @ along, second)


def test_the_kernels_refuse_transforms(triton_backend):
    for f, v in functions(layer(), triton_backend).values():
        with pytest.raises(ValueError, match="no rules for torch.func"):
            torch.func.jvp(f, (v,), (v,))


def test_a_second_derivative_is_refused_though_the_first_came_from_a_constant(backend):
    for of in ("x", "delta"):
        own, x = layer(backend=backend), torch.randn(3, 8, requires_grad=True)
        y, v = (own(x), x) if of == "x" else (own.delta_weight(), own.pera_A)
        (gradient,) = torch.autograd.grad(y.sum(), v, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (y.sum() + gradient.square().sum()).backward()


def test_without_coefficients_there_is_no_parameter(backend, tmp_path):
    """An empty gradient makes clip_grad_norm_ fail in the infinity norm."""
    own = pk.PeraLinear(8, 6, r=1, terms="cross", backend=backend)
    own(torch.randn(2, 8)).sum().backward()
    assert own.pera_h is None
    assert torch.isfinite(nn.utils.clip_grad_norm_(own.parameters(), 1.0, float("inf")))
    pytest.importorskip("safetensors")
    model, fresh = nn.Sequential(filled(own)), nn.Sequential(nn.Linear(8, 6))
    fresh.load_state_dict(model.state_dict(), strict=False)
    pk.save_adapter(model, tmp_path)
    pk.load_adapter(fresh, tmp_path, backend=backend)
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), model(x))
    update = own.scale * (own.pera_B @ own.pera_A)
    torch.testing.assert_close(own.delta_weight(), update)


def test_an_output_that_is_not_used_gives_no_gradient(together, backend):
    """Though it overflows: the gradient of x comes from what is used."""
    model = filled(pk.inject(Attention(), ["q_proj", "k_proj", "v_proj"], r=3, backend=backend))
    with torch.no_grad():
        model.v_proj.pera_B.fill_(1e38)
    x = torch.randn(4, 8, requires_grad=True)
    q, k, _ = model(x)
    q.sum().backward()
    assert together == [3] and torch.isfinite(x.grad).all()
    assert all(p.grad is None for p in model.k_proj.parameters())
    k.sum().backward()
    assert model.k_proj.pera_B.grad is not None and model.v_proj.pera_B.grad is None


@pytest.mark.parametrize("terms", pk.terms.TERMS)
def test_gradients_keep_no_more_memory_than_their_own(terms, backend):
    own, x = layer(terms=terms, backend=backend), torch.randn(5, 8, requires_grad=True)
    adapter = list(pk.adapter_parameters(nn.Sequential(own)))
    for y, inputs in ((own(x), [x, *adapter]), (own.delta_weight(), adapter)):
        for gradient in torch.autograd.grad(y.sum(), inputs):
            assert gradient.untyped_storage().nbytes() == gradient.numel() * 4


BAD_STATE = {
    "h": lambda m: setattr(m, "pera_h", nn.Parameter(torch.randn(4))),
    "B": lambda m: setattr(m, "pera_B", nn.Parameter(torch.randn(6, 3))),
    "rows of B": lambda m: setattr(m, "pera_B", nn.Parameter(torch.randn(5, 4))),
    "A": lambda m: setattr(m, "pera_A", nn.Parameter(torch.randn(4, 7))),
    "terms": lambda m: setattr(m, "terms", "square"),
    "no h": lambda m: setattr(m, "pera_h", None),
    "dtype": lambda m: setattr(m, "pera_B", nn.Parameter(torch.randn(6, 4).bfloat16())),
    "weight": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(6, 7), requires_grad=False)),
}


@pytest.mark.parametrize("kind", BAD_STATE)
def test_parameters_that_do_not_fit(kind, backend, together, tmp_path):
    own = layer(backend=backend)
    BAD_STATE[kind](own)
    with pytest.raises((ValueError, TypeError)):
        own(torch.randn(3, 8))
    if kind not in ("dtype", "weight"):
        with pytest.raises((ValueError, RuntimeError)):
            own.merge()
    model = pk.inject(Attention(), ["q_proj", "k_proj"], r=3, backend=backend)
    model(torch.randn(2, 8))
    BAD_STATE[kind](model.k_proj)
    with pytest.raises((ValueError, TypeError)):
        model(torch.randn(2, 8))
    if kind != "weight":
        with pytest.raises(ValueError, match="k_proj"):
            pk.save_adapter(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_leaves_no_trace(dtype, backend):
    r = 7 if backend == "torch" else 9
    torch.set_default_dtype(dtype)
    try:
        own = pk.PeraLinear(8, 6, r=r, dtype=torch.float32, backend=backend)
        own(torch.randn(20, 8, dtype=torch.float32)).sum().backward()
        own.merge()
    finally:
        torch.set_default_dtype(torch.float32)
    after = pk.PeraLinear(8, 6, r=r, backend=backend)
    after(torch.randn(20, 8)).sum().backward()
    assert after.pera_A.grad.dtype == torch.float32


@pytest.mark.parametrize("keep_base", [True, False])
def test_what_is_done_in_inference_mode_serves_outside_of_it(keep_base):
    x = torch.randn(3, 8, requires_grad=True)
    model = filled(pk.inject(nn.Sequential(nn.Linear(8, 6)), ["0"], r=2))
    with torch.inference_mode():
        model[0].merge(keep_base=keep_base)
    with model[0].disabled():
        model(x).sum().backward()
    model[0].unmerge()
    model(x).sum().backward()
    assert model[0].pera_A.grad is not None


def test_adapters_made_in_inference_mode_train():
    model = nn.Sequential(nn.Linear(8, 6))
    with torch.inference_mode():
        pk.inject(model, ["0"], r=2)
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].pera_B.grad is not None


def test_inference_mode_and_a_device_leave_no_trace(backend):
    own = pk.PeraLinear(8, 6, r=5, dropout=0.5, backend=backend)
    with torch.inference_mode():
        own(torch.randn(2, 8))
    x = torch.randn(2, 8)
    with torch.device("meta"):
        own(x)
    own(x).sum().backward()
    assert torch.isfinite(own.pera_A.grad).all()


@pytest.mark.parametrize("backend", ["auto", "torch", "triton", "reference"])
def test_meta(backend):
    own = pk.PeraLinear(8, 6, r=4, device="meta", backend=backend)
    assert own(torch.randn(3, 8, device="meta")).shape == (3, 6)
    assert own.delta_weight().shape == (6, 8)
    own.merge()
    own.unmerge()
    assert own.to_empty(device="cpu").reset_parameters() is None
    assert torch.isfinite(own.weight).all() and not own.pera_B.any()


def test_batched_gradients(backend):
    if backend == "triton":
        pytest.skip("the kernels take one gradient at a time")
    own, x = layer(backend=backend), torch.randn(3, 8, requires_grad=True)
    inputs = (x, own.pera_A, own.pera_B, own.pera_h)
    y = own(x)
    dys = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, inputs, dys, retain_graph=True, is_grads_batched=True)
    for number, dy in enumerate(dys):
        alone = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for several, one in zip(batched, alone, strict=True):
            torch.testing.assert_close(several[number], one)


@pytest.mark.parametrize("fused", [False, True])
def test_no_answer_is_stale(fused, backend):
    """Fused optimizers and writes through .data change no version."""
    model = filled(pk.inject(Attention(), ["q_proj", "k_proj", "v_proj"], r=3, backend=backend))
    x = torch.randn(4, 8)
    optimizer = torch.optim.AdamW(pk.parameter_groups(model, 0.1), fused=fused)
    for _ in range(2):
        sum(y.square().sum() for y in model(x)).backward()
        optimizer.step()
        model.k_proj.pera_B.data.mul_(1.5)
        model.k_proj.weight.data.add_(0.1)
        alone = [getattr(copy.deepcopy(model), name)(x) for name in ("q_proj", "k_proj", "v_proj")]
        for got, expected in zip(model(x), alone, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_can_be_swapped_after_a_call(swapping, backend):
    model = filled(pk.inject(Attention(), ["q_proj", "k_proj", "v_proj"], r=3, backend=backend))
    x = torch.randn(4, 8)
    sum(y.sum() for y in model(x)).backward()
    expected = model(x)[0].detach()
    model.zero_grad()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    torch.testing.assert_close(model(x)[0].detach(), expected)
    if backend == "torch":
        torch.testing.assert_close(model.double()(x.double())[0].detach().float(), expected)


@pytest.mark.parametrize(
    "name",
    ["merge", "unmerge", "unload", "adapted_modules", "adapter_state_dict", "shared_inputs"]
    + ["save_adapter", "load_adapter", "load_released", "export_lora", "inject"],
)
@pytest.mark.parametrize("model", [3, None, {}])
def test_a_model_that_is_none(name, model):
    more = {"inject": (["a"],), "adapted_modules": ()}
    needs_folder = name.startswith(("save", "load", "export"))
    arguments = more.get(name, ("folder",) if needs_folder else ())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got"):
        getattr(pk, name)(model, *arguments)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got"):
        pk.parameter_groups(model, 1e-3)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got"):
        list(pk.adapter_parameters(model))


def test_numbers_too_large_for_a_float():
    huge, own = 10**400, layer()
    model = nn.Sequential(own)
    for call in (
        lambda: pk.delta_weight(own.pera_A, own.pera_B, own.pera_h, scale=huge),
        lambda: pk.expand_factors(own.pera_A, own.pera_B, own.pera_h, scale=huge),
        lambda: layer(alpha=huge),
        lambda: layer(dropout=huge),
        lambda: pk.parameter_groups(model, huge),
        lambda: pk.parameter_groups(model, 1e-3, lr_h=huge),
        lambda: pk.parameter_groups(model, 1e-3, weight_decay=huge),
    ):
        with pytest.raises(ValueError, match=r"1000.*\.\.\. \(401 characters\)"):
            call()


def test_tensors_that_are_not_dense(backend):
    own, x = layer(backend=backend), torch.randn(3, 8)
    for given in (
        x.to_sparse(),
        x.to_sparse_csr(),
        torch.nested.nested_tensor([x, x[:2]]),
        torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    ):
        with pytest.raises(TypeError, match="x must be a dense tensor"):
            own(given)
    with pytest.raises(TypeError, match="A must be a dense tensor"):
        pk.delta_weight(own.pera_A.detach().to_sparse(), own.pera_B, own.pera_h)


def test_float64_adapters_go_with_float64_layers():
    with pytest.raises(TypeError, match="adapter_dtype must be float64 for a float64 layer"):
        pk.PeraLinear(8, 6, r=2, adapter_dtype=torch.float64)
    with pytest.raises(TypeError, match="adapter_dtype must be float64 for a float64 layer"):
        pk.PeraLinear(8, 6, r=2, dtype=torch.float64, adapter_dtype=torch.float32)
    assert pk.PeraLinear(8, 6, r=2, dtype=torch.float64).pera_A.dtype == torch.float64


def average(parameter):
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= torch.distributed.get_world_size()


def fsdp1(rank, file):
    """What docs/torch.md says for FSDP1, in one of two processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    model = trained(plain_model().bfloat16())
    plain, adapters = copy.deepcopy(model), list(pk.adapter_parameters(model))
    for parameter in adapters:
        parameter.register_post_accumulate_grad_hook(average)
    sharded = FullyShardedDataParallel(
        model, ignored_states=adapters, use_orig_params=True, device_id=torch.device("cpu")
    )
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    sharded(x[2 * rank : 2 * rank + 2]).float().square().mean().backward()
    plain(x).float().square().mean().backward()
    for own, alone in zip(adapters, pk.adapter_parameters(plain), strict=True):
        torch.testing.assert_close(own.grad, alone.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_fsdp1_with_adapters_left_out(tmp_path):
    torch.multiprocessing.spawn(fsdp1, (tmp_path / "store",), nprocs=2)


@pytest.mark.filterwarnings("error::UserWarning")
def test_fsdp2_takes_float32_adapters_over_half_precision(tmp_path):
    """And an output that is no view: one that is changed in place would lose its hooks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    file = tmp_path / "store"
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    try:
        model = trained(plain_model().bfloat16())[0].up
        x = torch.randn(2, 3, 24).bfloat16()
        expected = model(x)
        fully_shard(model, mesh=DeviceMesh("cpu", [0]))
        y = model(x)
        assert torch.equal(y, expected) and not y._is_view()
        y *= 2
        y.sum().backward()
        assert model.pera_A.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_what_nn_linear_has():
    own, x = layer(), torch.randn(3, 8)
    assert torch.equal(own(input=x), own(x))
    own.merge()
    torch.manual_seed(5)
    own.reset_parameters()
    torch.manual_seed(5)
    plain = nn.Linear(8, 6)
    assert torch.equal(own.weight, plain.weight) and torch.equal(own.bias, plain.bias)
    assert not own.merged and torch.equal(own(x), plain(x))


def test_expanded_factors_have_memory_of_their_own():
    own = layer(terms="linear")
    lora_A, lora_B = pk.expand_factors(own.pera_A, own.pera_B, None, terms="linear")
    with torch.no_grad():
        lora_A.zero_()
        lora_B.zero_()
    assert own.pera_A.all() and own.pera_B.all()


def test_a_shared_factor_is_in_a_group_once():
    model = pk.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "1"], r=2)
    model[1].pera_A = model[0].pera_A
    groups = pk.parameter_groups(model, 1e-3)
    assert len(groups[0]["params"]) == 3 and len(list(pk.adapter_parameters(model))) == 5


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9999, 0.99999, 0.9999999])
def test_dropout_keeps_the_mean(p, backend):
    from pera_kernels.dropout import keep_mask, keep_scale

    kept = keep_mask(torch.tensor([3]), 4096, 512, p).double().mean() * keep_scale(p)
    spread = (keep_scale(p) / (4096 * 512)) ** 0.5
    assert abs(kept - 1.0) < 5 * spread
    own, x = layer(dropout=p, backend=backend), torch.randn(5, 8)
    torch.manual_seed(1)
    got = own(x)
    torch.manual_seed(1)
    own.backend = "reference"
    torch.testing.assert_close(got, own(x), rtol=1e-4, atol=1e-3)


def test_the_numeric_rule_holds_after_a_life_of_changes(backend):
    own, x = layer(backend=backend), torch.randn(64, 8)
    own.merge(keep_base=False)
    own.alpha = 1.5
    own.unmerge()
    own.pera_h = nn.Parameter(torch.randn(10))
    truth = pk.reference.pera_linear(
        x.double(),
        own.weight.double(),
        own.pera_A.double(),
        own.pera_B.double(),
        own.pera_h.double(),
        own.bias.double(),
        scale=own.scale,
    )
    reference = pk.reference.pera_linear(
        x, own.weight, own.pera_A, own.pera_B, own.pera_h, own.bias, scale=own.scale
    )
    verdict = judge("y", own(x).detach(), reference.detach(), truth.detach(), torch.float32)
    assert verdict.passed, verdict
