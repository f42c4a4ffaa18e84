"""What real use does to a layer and to a model: other people's modules, modes and optimizers."""

import contextlib
import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels.testing import judge
from tests.adapted import assert_unchanged, plain_model, refused, state, trained


def filled(model, std=0.4):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model):
            parameter.normal_(std=std)
    return model


def layer(**options):
    torch.manual_seed(0)
    return filled(pk.PeraLinear(8, 6, r=4, **options))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


# ---- outputs and gradients among other code


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


# ---- state that does not fit


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


# ---- disabled


def dx(x, call):
    x.grad = None
    call()
    return x.grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward", "both", "inside", "nested", "twice"])
def test_a_checkpoint_computes_again_what_its_forward_computed(where, reentrant):
    """Disabled around the forward, the backward or both, or within what is computed again."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)

    def partly(x):
        with own.disabled():
            first = own(x)
        return first + own(x)

    run = {"inside": partly, "nested": lambda x: checkpoint(own, x, use_reentrant=reentrant)}
    run = {**run, "twice": partly}.get(where, own)
    around = own.disabled if where in ("forward", "both", "nested", "twice") else nullcontext
    with around():
        plain = dx(x, lambda: run(x).square().sum().backward())

    def checkpointed():
        with around():
            y = checkpoint(run, x, use_reentrant=reentrant)
            if where == "both":
                return y.square().sum().backward()
        with own.disabled() if where == "backward" else nullcontext():
            y.square().sum().backward()

    try:
        got = dx(x, checkpointed)
    except torch.utils.checkpoint.CheckpointError:
        assert not reentrant
    else:
        torch.testing.assert_close(got, plain)


nullcontext = contextlib.nullcontext


def test_disabled_is_of_a_thread_and_not_of_a_copy():
    own, x, got = layer(), torch.randn(3, 8), {}
    enabled = own(x)

    def in_a_thread(name, module):
        def call():
            got[name] = module(x)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with own.disabled():
        got["here"] = own(x)
        in_a_thread("thread", own)
        got["copy"] = copy.deepcopy(own)(x)
        got["pickle"] = pickle.loads(pickle.dumps(own))(x)
        # What nn.DataParallel calls in its threads.
        replica = own._replicate_for_data_parallel()
        replica._parameters.update(own._parameters)
        in_a_thread("replica", replica)
    base = nn.functional.linear(x, own.weight, own.bias)
    for name in ("here", "replica"):
        assert torch.equal(got[name], base), name
    for name in ("thread", "copy", "pickle"):
        assert torch.equal(got[name], enabled), name
    assert torch.equal(own(x), enabled)


def test_a_reference_pass_within_disabled_leaves_training_as_it_is():
    """As in preference tuning: a pass without the adapter, then a step with it."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    plain = dx(x, lambda: own(x).square().sum().backward())
    for _ in range(2):
        with own.disabled(), torch.no_grad():
            checkpoint(own, x, use_reentrant=True)
        again = dx(x, lambda: checkpoint(own, x, use_reentrant=True).square().sum().backward())
        torch.testing.assert_close(again, plain)


def test_disabled_does_not_reach_other_threads():
    """Not in what they compute in a backward, nor after a thread that never left."""
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    plain, got = dx(x, lambda: own(x).square().sum().backward()), []
    entered, release = threading.Event(), threading.Event()

    def inside():
        with own.disabled():
            entered.set()
            release.wait(10)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(10)
    for reentrant in (True, False):
        again = checkpoint(own, x, use_reentrant=reentrant)
        torch.testing.assert_close(dx(x, lambda y=again: y.square().sum().backward()), plain)
    release.set()
    thread.join()
    left_open = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: left_open.append(own.disabled().__enter__()))
        thread.start()
        thread.join()
        thread = threading.Thread(target=lambda: got.append(own(x)))
        thread.start()
        thread.join()
    assert all(torch.equal(y, own(x)) for y in got) and len(got) == 3


class Again(torch.autograd.Function):
    """As a checkpoint of another library: the names of its arguments are its own."""

    @staticmethod
    def forward(context, module, x):
        context.module, context.x = module, x.detach()
        return module(x.detach())

    @staticmethod
    def backward(context, dy):
        x = context.x.requires_grad_()
        with torch.enable_grad():
            y = context.module(x)
        return None, torch.autograd.grad(y, x, dy)[0]


def test_a_function_that_calls_a_layer_again_finds_its_forward():
    own, x = layer(), torch.randn(3, 8, requires_grad=True)
    with own.disabled():
        plain = dx(x, lambda: own(x).square().sum().backward())
        y = Again.apply(own, x)
    torch.testing.assert_close(dx(x, lambda: y.square().sum().backward()), plain)


# ---- merged


def test_a_merged_layer_trains_no_weight():
    own, x = layer(), torch.randn(3, 8)
    own.merge()
    own.requires_grad_(True)
    for around in (nullcontext, own.disabled):
        with around(), pytest.raises(ValueError, match="weight must not require grad"):
            own(x)


def test_an_unmerge_that_fails_changes_nothing(tmp_path):
    pytest.importorskip("safetensors")
    model, x = trained(), torch.randn(3, 24)
    pk.save_adapter(model, tmp_path)
    pk.merge(model)
    with torch.no_grad():
        model[0].up.pera_B.mul_(2.0)
    parametrizations.weight_norm(model[1].down, "weight")
    expected = model(x)
    with pytest.raises(TypeError, match=r"1\.down: the weight must be"):
        pk.unmerge(model)
    with pytest.raises(TypeError, match=r"1\.down: the weight must be"):
        pk.load_adapter(model, tmp_path, overwrite=True)
    assert torch.equal(model(x), expected)


COMPUTED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_not_merged_into(kind):
    model, x = nn.Sequential(layer()).eval(), torch.randn(3, 8)
    COMPUTED[kind](model[0])
    with torch.no_grad():
        expected = model(x)
    for change in (model[0].merge, lambda: pk.merge(model), lambda: pk.unload(model)):
        with pytest.raises(TypeError, match="computed"):
            change()
    with pytest.raises(TypeError, match="computed"):
        pk.unload(model, merge=False)
    with torch.no_grad():
        assert torch.equal(model(x), expected) and not model[0].merged


def test_a_weight_that_becomes_computed_while_merged_is_not_lost():
    own, x = layer(), torch.randn(3, 8)
    own.merge()
    expected = own(x)
    parametrizations.weight_norm(own, "weight")
    for change in (own.unmerge, own.state_dict):
        with pytest.raises(TypeError, match="computed"):
            change()
    torch.testing.assert_close(own(x), expected)
    parametrize.remove_parametrizations(own, "weight")
    own.unmerge()
    torch.testing.assert_close(own.weight, layer().weight)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_base_with_a_computed_weight_is_called(kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6)).eval()
    COMPUTED[kind](base[0])
    x = torch.randn(3, 8)
    expected = base(x)
    model = filled(pk.inject(base, ["0"], r=2))
    assert not torch.equal(model(x), expected)
    pk.unload(model, merge=False)
    torch.testing.assert_close(model(x), expected)


def test_one_tied_layer_is_not_merged():
    model = nn.Module()
    model.emb, model.lm_head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
    model.lm_head.weight = model.emb.weight
    filled(pk.inject(model, ["lm_head"], r=2))
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = own.emb.weight.clone()
        with pytest.raises(ValueError, match="would change emb.weight as well"):
            own.lm_head.merge()
        assert torch.equal(own.emb.weight, before)
    model.emb.weight = nn.Parameter(model.emb.weight.detach().clone())
    model.lm_head.merge()
    assert not torch.equal(model.lm_head.weight, model.emb.weight)


@pytest.mark.parametrize("keep_base", [True, False])
def test_unmerging_takes_away_what_was_added(keep_base):
    own, x = layer(), torch.randn(3, 8)
    weight = own.weight.clone()
    with own.disabled():
        base = own(x)
    own.merge(keep_base=keep_base)
    with torch.no_grad():
        own.alpha *= 9.0
        own.pera_B.mul_(3.0)
    own.pera_h = nn.Parameter(torch.randn(10))
    again = copy.deepcopy(own)
    with own.disabled():
        torch.testing.assert_close(own(x), base)
    own.unmerge()
    torch.testing.assert_close(own.weight, weight, rtol=1e-6, atol=1e-6)
    again.unmerge()
    torch.testing.assert_close(again.weight, weight, rtol=1e-6, atol=1e-6)


def test_a_state_dict_taken_while_merged_says_what_it_holds():
    model = trained()
    pk.merge(model)
    with pytest.warns(UserWarning, match=r"pera_kernels\.unload"):
        saved = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = pk.unload(copy.deepcopy(model)).state_dict()
    assert not torch.equal(saved["0.up.weight"], plain["0.up.weight"])


# ---- who reads a weight without calling the layer


def test_encoder_layers_keep_calling_in_evaluation():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for layers in ("linear1", "linear2"), ("linear2",):
        model = filled(pk.inject(copy.deepcopy(encoder), list(layers), r=4)).eval()
        for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for given in (None, mask):
                with torch.no_grad():
                    got = own(x, src_key_padding_mask=given)
                expected = own(x.requires_grad_(), src_key_padding_mask=given)
                kept = slice(None) if given is None else ~mask
                torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-4)
        pk.unload(model)
        assert model.use_nested_tensor == encoder.use_nested_tensor
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Head(nn.Module):
    """What a fused loss does: the weight of the output layer is read."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)


class Direct(Head):
    def forward(self, x):
        return self.body(x) @ self.lm_head.weight.t()


class Inherited(Direct):
    def forward(self, x):
        return super().forward(x) + 1


class ByMethod(Head):
    def loss(self, x):
        return nn.functional.linear(x, self.lm_head.weight)

    def forward(self, x):
        return self.loss(self.body(x))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Head()

    def forward(self, x):
        return self.model.body(x) @ self.model.lm_head.weight.t()


@pytest.mark.parametrize("kind", [Direct, Inherited, ByMethod, Around])
def test_a_parent_that_reads_a_weight_is_refused(kind):
    refused(kind(), r"lm_head \(by ", lambda m: pk.inject(m, ["lm_head"], r=2))
    pk.inject(kind(), ["body"], r=2)


def test_a_forward_put_on_an_instance_is_read_as_well():
    model = Head()
    model.forward = Direct.forward.__get__(model)
    with pytest.raises(ValueError, match="lm_head"):
        pk.inject(model, ["lm_head"], r=2)


class Sometimes(Head):
    def forward(self, x, fused=False):
        dtype = self.body.weight.dtype
        x = self.body(x.to(dtype))
        return x @ self.lm_head.weight.t() if fused else self.lm_head(x)


def test_a_parent_that_reads_a_weight_on_some_paths_is_told():
    with pytest.warns(UserWarning, match=r"on some paths.*lm_head \(by Sometimes\)"):
        pk.inject(Sometimes(), ["lm_head"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Sometimes(), ["body"], r=2)


class Hidden(Head):
    def forward(self, x):
        return self.body(x) @ self._modules["lm_head"].weight.t()


def test_adapters_that_were_not_called_are_named_after_the_first_forward():
    model = pk.inject(Hidden(), ["body", "lm_head"], r=2)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError):
        model(torch.randn(2, 9))
    with pytest.warns(UserWarning, match="1 adapted layers were not called.*: lm_head"):
        model(torch.randn(2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8))
        called = trained()
        called(torch.randn(2, 24))
    with pytest.warns(UserWarning, match="lm_head"):
        twin(torch.randn(2, 8))
    assert not model._forward_hooks


class HandedOn(Head):
    def forward(self, x):
        penalty = self.lm_head.weight.square().sum()
        return checkpoint(self.lm_head, self.body(x), use_reentrant=False) + penalty


class ByAnotherName(Head):
    def forward(self, x):
        head = self.lm_head
        return head(self.body(x)) + self.lm_head.weight.sum()


@pytest.mark.parametrize("kind", [HandedOn, ByAnotherName])
def test_a_layer_that_is_handed_on_may_be_called(kind):
    with pytest.warns(UserWarning, match="on some paths"):
        model = pk.inject(kind(), ["lm_head"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.randn(2, 8))


def test_parts_that_are_compiled_are_not_said_to_be_uncalled():
    model = trained()
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.randn(2, 24))
    assert not [w for w in seen if "not called" in str(w.message)]


def test_layers_that_are_offloaded_are_refused():
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    model = cpu_offload(plain_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"0\.up is offloaded"):
        pk.inject(model, ["up"], r=2)
    assert type(model[0].up) is nn.Linear


def test_state_space_blocks_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    model = transformers.MambaForCausalLM(config)
    match = r"dt_proj \(by MambaMixer\)"
    refused(model, match, lambda m: pk.inject(m, ["in_proj", "dt_proj"], r=2))


# ---- injection


def test_every_target_of_a_list_has_to_match():
    refused(Attention(), "'v_porj' matches no linear", lambda m: pk.inject(m, ["q_proj", "v_porj"]))


def test_experts_in_one_tensor_are_named():
    model = Attention()
    model.experts = nn.ParameterDict({"gate_up_proj": torch.zeros(2, 8, 8)})
    refused(model, "Experts in one tensor", lambda m: pk.inject(m, ["q_proj", "gate_up_proj"]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("target", ["a", "b"])
def test_a_module_with_two_names_is_one(target, tmp_path):
    pytest.importorskip("safetensors")
    model, fresh, x = Twice(), Twice(), torch.randn(3, 8)
    filled(pk.inject(model, [target], r=2))
    assert model.a is model.b
    pk.save_adapter(model, tmp_path)
    pk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    pk.merge(model)
    torch.testing.assert_close(model(x), fresh(x))
    pk.unload(model)
    assert type(model.a) is nn.Linear and model.a is model.b


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def __setattr__(self, name, value):
        if name == "last" and isinstance(value, pk.PeraLinear):
            raise RuntimeError("not here")
        super().__setattr__(name, value)


def test_a_parent_that_takes_no_other_child_leaves_the_model_as_it_was():
    model = Stubborn()
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="not here"):
        pk.inject(model, ["q_proj", "last"], r=2)
    assert_unchanged(model, before, kinds)
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_hooks


@pytest.mark.parametrize("targets", [["0"], ["0", "1"]])
def test_lazy_parameters_are_refused(targets):
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias get theirs"):
        pk.inject(model, targets, r=2)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(TypeError, match="first call"):
        pk.PeraLinear.from_linear(nn.LazyLinear(4))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.body(x))


def test_a_head_is_frozen_with_a_word():
    with pytest.warns(UserWarning, match=r"freezes classifier.*modules_to_save=\['classifier'\]"):
        model = pk.inject(Classifier(), ["body"], r=2)
    assert not model.classifier.weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Classifier(), ["body"], r=2, modules_to_save=())
        model = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])
    assert model.classifier.weight.requires_grad
    refused(
        Classifier(),
        "modules_to_save: 'clasifier' matches no module",
        lambda m: pk.inject(m, ["body"], r=2, modules_to_save=["clasifier"]),
    )


@pytest.mark.parametrize("saved", [["body"], ["embedding"]])
def test_a_base_that_would_train_is_refused(saved):
    def model():
        made = Classifier()
        made.embedding = nn.Embedding(8, 8)
        made.embedding.weight = made.body.weight
        return made

    refused(model(), "body: weight must not require grad",
            lambda m: pk.inject(m, ["body"], r=2, modules_to_save=saved))  # fmt: skip


def test_a_head_that_is_the_target_is_not_said_to_be_frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Classifier(), ["classifier"], r=2)


def test_ties_are_those_of_the_last_injection():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    pk.inject(model, ["0"], r=2)
    pk.inject(model, ["1"], r=2)
    with pytest.raises(ValueError, match="1.weight"):
        model[0].merge()
    model[1].weight = nn.Parameter(model[1].weight.clone(), requires_grad=False)
    model[0].merge()


def test_a_second_injection_leaves_alone_what_trains():
    model = pk.inject(Attention(), ["q_proj"], r=2, modules_to_save=["v_proj"])
    model.q_proj.pera_h.requires_grad_(False)
    pk.inject(model, ["k_proj"], r=2)
    assert model.v_proj.weight.requires_grad and not model.q_proj.pera_h.requires_grad
    assert not model.k_proj.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_over_half_precision_are_float32(dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = trained(plain_model().to(dtype))
    assert {p.dtype for p in pk.adapter_parameters(model)} == {torch.float32}
    model(torch.randn(2, 24, dtype=dtype)).sum().backward()
    asked = trained(plain_model().to(dtype), adapter_dtype=dtype)
    assert {p.dtype for p in pk.adapter_parameters(asked)} == {dtype}
    pk.save_adapter(asked, tmp_path)
    promoted, kept = plain_model().to(dtype), plain_model().to(dtype)
    pk.load_adapter(promoted, tmp_path)
    pk.load_adapter(kept, tmp_path, adapter_dtype=dtype)
    assert {p.dtype for p in pk.adapter_parameters(promoted)} == {torch.float32}
    assert {p.dtype for p in pk.adapter_parameters(kept)} == {dtype}
    with pytest.raises(ValueError, match="adapter_dtype goes with a model without adapters"):
        pk.load_adapter(kept, tmp_path, overwrite=True, adapter_dtype=dtype)


def test_a_model_that_is_synchronized_takes_no_new_adapters(tmp_path):
    """Their gradients would differ from process to process."""
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path / "adapter")
    file = tmp_path / "store"
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(plain_model())
        for change in (
            lambda: pk.inject(model, ["up"], r=2),
            lambda: pk.load_adapter(model, tmp_path / "adapter"),
        ):
            with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
                change()
        adapted = nn.parallel.DistributedDataParallel(trained(seed=5))
        pk.load_adapter(adapted, tmp_path / "adapter", overwrite=True)
        x = torch.randn(2, 24)
        assert torch.equal(adapted(x), trained()(x))
    finally:
        torch.distributed.destroy_process_group()


# ---- what is saved is what was trained


def test_wrappers_are_no_part_of_a_name(tmp_path):
    pytest.importorskip("safetensors")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = plain_model()
        model[0] = torch.compile(model[0], backend="eager")
        model[1] = checkpoint_wrapper(model[1])
        return model

    x, model = torch.randn(2, 24), trained(wrapped(), targets=["up"])
    with torch.no_grad():
        model[1].down.bias.requires_grad_(True).add_(0.5)
    pk.save_adapter(model, tmp_path)
    filled = pk.inject(wrapped(), ["up"], r=3)
    for loaded in (plain_model(), wrapped(), filled):
        assert pk.load_adapter(loaded, tmp_path) == ([], [])
        torch.testing.assert_close(loaded(x), model(x))


def test_a_trained_head_is_saved(tmp_path):
    pytest.importorskip("safetensors")
    model, x = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"]), None
    filled(model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
        model.body.bias.requires_grad_(True).add_(0.5)
    x = torch.randn(4, 8)
    pk.save_adapter(model, tmp_path)
    fresh = Classifier()
    assert pk.load_adapter(fresh, tmp_path) == ([], [])
    assert torch.equal(fresh.classifier(x), model.classifier(x))
    assert torch.equal(fresh.body.bias, model.body.bias)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == trains
    again = pk.inject(Classifier(), ["body"], r=2, modules_to_save=())
    pk.load_adapter(again, tmp_path)
    assert torch.equal(again.classifier(x), model.classifier(x))


def test_a_head_that_the_model_lacks_or_has_in_another_shape(tmp_path):
    pytest.importorskip("safetensors")
    model = filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"]))
    pk.save_adapter(model, tmp_path)
    wide, without = Classifier(), Classifier()
    wide.classifier = nn.Linear(8, 4)
    del without.classifier
    refused(wide, r"classifier.weight \(\(3, 8\) for", lambda m: pk.load_adapter(m, tmp_path))
    refused(without, "parameters that the model lacks", lambda m: pk.load_adapter(m, tmp_path))
    missing, unexpected = pk.load_adapter(without, tmp_path, strict=False)
    assert not missing and unexpected == ["classifier.weight", "classifier.bias"]


class Normed(Classifier):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.classifier(self.norm(self.body(x)))


def test_a_trained_module_is_saved_with_its_buffers_and_trains_on_in_peft(tmp_path):
    pytest.importorskip("safetensors")
    peft = pytest.importorskip("peft")
    import pera_kernels.peft

    assert pera_kernels.peft.PeraConfig
    model = filled(pk.inject(Normed(), ["body"], r=2, modules_to_save=["classifier", "norm"]))
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    for _ in range(3):
        model(torch.randn(9, 8))
    model.eval()
    x = torch.randn(4, 8)
    pk.save_adapter(model, tmp_path / "own")
    fresh = Normed().eval()
    pk.load_adapter(fresh, tmp_path / "own")
    assert torch.equal(fresh(x), model(x))
    loaded = peft.PeftModel.from_pretrained(Normed(), tmp_path / "own", is_trainable=True).eval()
    torch.testing.assert_close(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Normed(), tmp_path / "again").eval()
    torch.testing.assert_close(again(x), model(x))


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.body = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 6, bias=False)
        if tied:
            self.classifier.weight = self.emb.weight

    def forward(self, x):
        return self.classifier(self.body(self.emb(x)))


def test_heads_across_tied_and_untied_models(tmp_path):
    pytest.importorskip("safetensors")
    x = torch.arange(6)
    given = {"r": 2, "modules_to_save": ["emb", "classifier"]}
    for tied in (False, True):
        model = filled(pk.inject(Tied(tied), ["body"], **given))
        with torch.no_grad():
            model.classifier.weight.add_(1.0)
        pk.save_adapter(model, tmp_path / str(tied))
        if tied:
            fresh = Tied(False)
            pk.load_adapter(fresh, tmp_path / "True")
            assert torch.equal(fresh(x), model(x))
    match = "emb.weight and classifier.weight differ in the file and are one tensor"
    refused(Tied(True), match, lambda m: pk.load_adapter(m, tmp_path / "False"))


def test_a_file_without_the_head_that_trains_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=())), tmp_path)
    model = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"missing in the file \(2\): classifier.weight"):
        pk.load_adapter(model, tmp_path)
    missing, _ = pk.load_adapter(model, tmp_path, strict=False)
    assert missing == ["classifier.weight", "classifier.bias"]


class Nested(Classifier):
    """With a child of its own that has the name of ours."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(8, 3)
        self.classifier.base_layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.classifier.base_layer(self.classifier(self.body(x)))


def test_names_like_ours_are_left_alone(tmp_path):
    pytest.importorskip("safetensors")
    model = filled(pk.inject(Nested(), ["body"], r=2, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(1.0)
    pk.save_adapter(model, tmp_path)
    fresh, x = Nested(), torch.randn(2, 8)
    pk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert all(p.requires_grad for p in fresh.classifier.parameters())


@pytest.mark.parametrize("bias", ["all", "pera_only"])
def test_a_peft_folder_with_trained_biases_runs(bias, tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    own = PeraConfig(r=2, target_modules=["up"], bias=bias, init_weights=False)
    model = peft.get_peft_model(plain_model(), own)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    plain, x = plain_model(), torch.randn(3, 24)
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x))


def test_a_load_that_fails_late_takes_the_adapters_out_again(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    from pera_kernels.adapters import trained as beside

    pk.save_adapter(filled(pk.inject(Classifier(), ["body"], modules_to_save=())), tmp_path)

    def fail(self):
        raise RuntimeError("late")

    monkeypatch.setattr(beside.Places, "write", fail)
    model = Classifier()
    with pytest.raises(RuntimeError, match="late"):
        pk.load_adapter(model, tmp_path)
    assert type(model.body) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_head_on_the_meta_device(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(
        filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])), tmp_path
    )
    model = Classifier().to("meta")
    pk.load_adapter(model, tmp_path)
    assert model(torch.randn(2, 8, device="meta")).shape == (2, 3)


def test_a_computed_factor_is_not_loaded_into(tmp_path):
    pytest.importorskip("safetensors")
    model = trained()
    pk.save_adapter(model, tmp_path)
    parametrizations.weight_norm(model[0].up, "pera_A")
    with pytest.raises(ValueError, match=r"0\.up\.pera_A \(computed from other tensors"):
        pk.load_adapter(model, tmp_path, overwrite=True)


def test_peft_loads_a_folder_of_save_adapter(tmp_path):
    pytest.importorskip("safetensors")
    peft = pytest.importorskip("peft")
    import pera_kernels.peft

    assert pera_kernels.peft.PeraConfig
    model = trained(trained(r=2, targets=["0.up"]), r=5, alpha=3.0, targets=["1.down"])
    with torch.no_grad():
        model[0].down.bias.requires_grad_(True).add_(0.5)
    pk.save_adapter(model, tmp_path / "own")
    x = torch.randn(4, 24)
    loaded = peft.PeftModel.from_pretrained(plain_model(), tmp_path / "own").eval()
    torch.testing.assert_close(loaded(x), model(x))
    mixed = trained(trained(r=2, targets=["0.up"]), r=2, terms="square", targets=["1.down"])
    pk.save_adapter(mixed, tmp_path / "mixed")
    with pytest.raises(ValueError, match="terms must be one of.*got 'mixed'"):
        peft.PeftModel.from_pretrained(plain_model(), tmp_path / "mixed")


@pytest.mark.parametrize("tied", [False, True])
def test_a_peft_folder_with_an_adapted_head(tied, tmp_path):
    peft = pytest.importorskip("peft")
    from tests.test_peft import config, llama, logits

    torch.manual_seed(1)
    model = peft.get_peft_model(llama(tied), config(target_modules=["q_proj", "lm_head"]))
    model.eval().save_pretrained(tmp_path)
    plain = llama(tied)
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model))
    assert not plain.lm_head.weight.requires_grad


def test_a_nan_is_no_zero():
    own = layer()
    with torch.no_grad():
        own.pera_B[0, 0] = float("nan")
    assert own.quadratic_share() != own.quadratic_share()
    linear = pk.PeraLinear(8, 6, r=2, terms="linear")
    with torch.no_grad():
        linear.pera_A[0, 0] = float("nan")
    assert linear.quadratic_share() != linear.quadratic_share()


# ---- clear errors


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


# ---- sharded


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


# ---- as nn.Linear


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
