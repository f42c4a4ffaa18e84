"""What a layer keeps for its backward, counted in bytes, and ``keep="x"``: the same gradients."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels import testing, torch_backend
from pera_kernels.backends import unavailable
from pera_kernels.terms import lane_count
from pera_kernels.testing import Case
from tests.test_quantized import BASES, base

T, N, M, R = 21, 64, 128, 4
# Of what is computed in the interpreter, backward and all.
SMALL = {"r": 3, "T": 17, "N": 40, "M": 24}
SEED = 8
BF16, F32 = torch.bfloat16, torch.float32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept(call, *without):
    """The bytes of each storage that autograd keeps of a call, but for those of these tensors."""
    # A quantized weight has no storage of its own.
    plain = [t for t in without if type(t) in (torch.Tensor, nn.Parameter)]
    found, known = {}, {t.untyped_storage().data_ptr() for t in plain}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = call()
    del results
    return {at: size for at, size in found.items() if at not in known}


def bytes_of_u(backend, terms="full", dtype=F32, tokens=T):
    """The kernels pad lanes to whole vectors."""
    lanes = lane_count(R, terms) if backend == "triton" else pk.expanded_rank(R, terms)
    return tokens * lanes * dtype.itemsize


def filled(model):
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def adapted(backend, layer=None, **options):
    layer = (layer or nn.Linear(N, M)).to(DEVICE)
    return filled(pk.PeraLinear.from_linear(layer, R, backend=backend, **options))


def input_like(*shape, dtype=F32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("plan, dropout", [("factored", 0.0), ("factored", 0.2), ("composed", 0.0)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("terms", ["full", "linear"])
def test_a_plain_base(terms, dtype, plan, dropout, keep, backend):
    """x and u; with dropout its seed, never a mask. Parameters are kept and not copied."""
    options = {"terms": terms, "plan": plan, "dropout": dropout, "keep": keep}
    layer, x = adapted(backend, nn.Linear(N, M).to(dtype), **options), input_like(T, N, dtype=dtype)
    both = plan == "factored" and keep == "u"
    u = bytes_of_u(backend, terms, dtype) if both else 0
    found = kept(lambda: layer(x), *layer.parameters())
    assert found.pop(x.untyped_storage().data_ptr()) == T * N * dtype.itemsize
    assert sum(found.values()) == u + SEED * (dropout > 0)


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("plan", ["factored", "composed"])
@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=3)), ids=str)
def test_parts_that_are_frozen(trains, plan, keep, backend):
    """x for A, u for B and h; nothing where nothing trains."""
    layer, x = adapted(backend, plan=plan, keep=keep), input_like(T, N)
    for parameter, own in zip(pk.adapter_parameters(layer), trains, strict=True):
        parameter.requires_grad_(own)
    of_A, of_u = trains[0], trains[1] or trains[2]
    from_x = plan == "composed" or keep == "x"
    expected = T * N * 4 * (of_A or (of_u and from_x))
    expected += bytes_of_u(backend) * (of_u and not from_x)
    assert sum(kept(lambda: layer(x), *layer.parameters()).values()) == expected


def hooked():
    layer = nn.Linear(N, M)
    layer.register_forward_hook(lambda *_: None)
    return layer


CALLED = {"hook": hooked, **{name: lambda name=name: base(name, BF16) for name in BASES}}


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CALLED)
def test_a_base_that_is_called(name, dropout, keep, backend):
    """Beside what the base keeps by itself: x and u."""
    layer = CALLED[name]().to(DEVICE).requires_grad_(False)
    dtype = F32 if name == "hook" else BF16
    x, parameters = input_like(T, N, dtype=dtype), list(layer.parameters())
    alone = kept(lambda: layer(x), x, *parameters)
    over = adapted(backend, layer, dropout=dropout, keep=keep)
    found = kept(lambda: over(x), *over.parameters())
    assert found.pop(x.untyped_storage().data_ptr()) == T * N * dtype.itemsize
    own = bytes_of_u(backend, dtype=dtype) * (keep == "u") + SEED * (dropout > 0)
    assert sum(found.values()) == sum(alone.values()) + own


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_layer_of_peft(adapters, keep):
    """However many adapters are active, x is kept once."""
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    config = PeraConfig(r=R, target_modules=["0"], init_weights=False, keep=keep)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(N, M)).to(DEVICE), config)
    x, backend = input_like(T, N), "triton" if DEVICE.type == "cuda" else "torch"
    if adapters == 2:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    found = kept(lambda: model(x), *model.parameters())
    assert found.pop(x.untyped_storage().data_ptr()) == T * N * 4
    assert sum(found.values()) == adapters * bytes_of_u(backend) * (keep == "u")


class Projections(nn.Module):
    """Grouped-query shapes: k and v are narrower than q."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(N, m) for m in (M, 32, 32))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_layers_that_share_their_input_keep_it_once(dropout, dtype, keep, backend, together):
    options = {"backend": backend, "dropout": dropout, "keep": keep}
    model, x = Projections().to(DEVICE, dtype), input_like(T, N, dtype=dtype)
    filled(pk.inject(model, ["q_proj", "k_proj", "v_proj"], R, **options))
    found = kept(lambda: model(x), *model.parameters())
    assert found.pop(x.untyped_storage().data_ptr()) == T * N * dtype.itemsize
    own = bytes_of_u(backend, dtype=dtype) * (keep == "u") + SEED * (dropout > 0)
    assert sum(found.values()) == 3 * own
    assert together == ([] if dropout else [3])


@pytest.mark.parametrize("keep", ["u", "x"])
def test_under_autocast_casts_of_the_weight_are_not_kept(keep, backend):
    """x is, once, in place of x itself."""
    layer, x = adapted(backend, keep=keep), input_like(T, N)
    with torch.autocast(DEVICE.type, BF16):
        found = kept(lambda: layer(x), *layer.parameters())
    u = bytes_of_u(backend, dtype=BF16) * (keep == "u")
    assert x.untyped_storage().data_ptr() not in found
    assert sum(found.values()) == T * N * 2 + u


def test_an_x_that_does_not_flatten_is_kept_as_it_is(backend):
    """Not as a copy of its own for the backward."""
    layer, x = adapted(backend), input_like(3, T, N).detach().transpose(0, 1).requires_grad_()
    found = kept(lambda: layer(x), *layer.parameters())
    assert found.pop(x.untyped_storage().data_ptr()) == 3 * T * N * 4
    assert sum(found.values()) == bytes_of_u(backend, tokens=3 * T)


def test_compiled_code_keeps_no_u(backend):
    """It may keep expansions; the kernels' op makes them again."""
    torch._dynamo.reset()
    layer, x = adapted(backend, keep="x"), input_like(300, N)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = kept(lambda: compiled(x), x, *layer.parameters())
    assert bytes_of_u(backend, tokens=300) not in found.values()
    layer.keep = "u"
    found = kept(lambda: compiled(x), x, *layer.parameters())
    assert bytes_of_u(backend, tokens=300) in found.values()


WAYS = (
    *(("torch", way) for way in ("factors together", "factors apart")),
    *(("triton", way) for way in ("on chip", "in memory", "by the library")),
)


@pytest.fixture(params=WAYS, ids=" ".join)
def one_way(request, monkeypatch):
    """A backend that projects in one of its ways: how φ(A) is expanded, and by whom."""
    backend, way = request.param
    if (reason := unavailable(backend, DEVICE)) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    if backend == "torch":
        limit = 0 if way == "factors apart" else 10**9
        monkeypatch.setattr(torch_backend, "FEW_ELEMENTS", limit)
        return backend
    from pera_kernels.kernels import tiles

    limits = {"products": 10**18 if way == "on chip" else 0}
    if way == "by the library":
        limits["library_projection"] = 1
    made = tiles.Choices(**limits)
    monkeypatch.setattr(tiles, "choices", lambda device: made)
    return backend


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": BF16, "adapter_dtype": F32, "dropout_p": 0.3},
        *(
            pytest.param(own, marks=pytest.mark.slow)
            for own in (
                {"dtype": F32},
                {"dtype": F32, "terms": "cross", "dropout_p": 0.3},
                {"dtype": F32, "terms": "linear"},
                {"dtype": BF16},
                {"dtype": F32, "plan": "composed"},
                {"dtype": torch.float16, "terms": "square"},
            )
        ),
    ],
    ids=str,
)
def test_u_made_again_gives_the_same_bits(options, one_way, poison):
    """And within the numeric rule."""
    backend = one_way
    case, again = (Case(**SMALL, **options, keep=keep) for keep in ("u", "x"))
    inputs = testing.make_inputs(case, DEVICE)
    outputs = [testing.run(own, inputs, backend) for own in (case, again)]
    for name, expected in outputs[0].items():
        assert torch.equal(outputs[1][name], expected), name
    failed = [str(v) for v in testing.check(again, backend, DEVICE) if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_whatever_needs_a_gradient(wanted, backend):
    p = testing.make_inputs(Case(**SMALL), DEVICE)
    asked = [t for t, want in zip((p.x, p.A, p.B, p.h), wanted, strict=True) if want]
    for leaf in asked:
        leaf.requires_grad_()
    gradients = []
    for keep in ("u", "x"):
        y = pk.pera_linear(p.x, p.weight, p.A, p.B, p.h, p.bias, backend=backend, keep=keep)
        gradients.append(torch.autograd.grad(y, asked, p.dy))
    assert all(map(torch.equal, *gradients))


def gradients(model, x, run=None):
    """Of x and the adapters, with the same masks at every call."""
    torch.manual_seed(7)
    y = (model if run is None else run)(x)
    return torch.autograd.grad(y.square().sum(), [x, *pk.adapter_parameters(model)])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_under_compile_and_checkpoints(use_reentrant, dropout, backend):
    """None is ``torch.compile``."""
    torch._dynamo.reset()
    layer, x = adapted(backend, nn.Linear(N, 24), dropout=dropout, keep="x"), input_like(7, N)
    expected = gradients(layer, x)
    if use_reentrant is None:
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for got, own in zip(gradients(layer, x, run), expected, strict=True):
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
        return
    torch.manual_seed(7)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    got = [x.grad, *(p.grad for p in pk.adapter_parameters(layer))]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layers_that_share_their_input_honour_it(dtype, backend, together):
    """Each makes its own u again: the gradients of layers apart, to the bit. One that keeps u where
    the others keep x is computed alone.
    """
    model, x = Projections().to(DEVICE, dtype), input_like(T, N, dtype=dtype)
    filled(pk.inject(model, ["q_proj", "k_proj", "v_proj"], R, backend=backend, keep="x"))
    parameters, results = list(pk.adapter_parameters(model)), []
    for names in ([("q_proj", "k_proj", "v_proj")], ()):
        pk.shared_inputs(model, names)
        results.append(torch.autograd.grad(sum(y.sum() for y in model(x)), parameters))
    assert all(map(torch.equal, *results)) and together == [3]
    pk.shared_inputs(model)
    model.v_proj.keep = "u"
    model(x)
    assert together == [3, 2]


def test_an_x_that_changed_is_refused(backend):
    layer, leaf = adapted(backend, keep="x"), input_like(T, N)
    layer.pera_A.requires_grad_(False)
    x = leaf * 1.0
    y = layer(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_it_is_not_saved(tmp_path):
    """As backend and plan it says how to compute: whoever loads an adapter chooses anew."""
    pytest.importorskip("safetensors")
    model = filled(pk.inject(nn.Sequential(nn.Linear(N, M)), ["0"], R, keep="x"))
    assert model[0].keep == "x" and "keep='x'" in repr(model)
    pk.save_adapter(model, tmp_path)
    assert "keep" not in (tmp_path / "adapter_config.json").read_text()
    fresh = nn.Sequential(nn.Linear(N, M))
    pk.load_adapter(fresh, tmp_path)
    assert fresh[0].keep == "u"


def test_peft_does_not_save_it(tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    model = nn.Sequential(nn.Linear(N, M))
    model = peft.get_peft_model(model, PeraConfig(r=R, target_modules=["0"], keep="x"))
    model.save_pretrained(tmp_path)
    assert "keep" not in (tmp_path / "adapter_config.json").read_text()
    assert PeraConfig.from_pretrained(tmp_path).keep == "u"
    with pytest.raises(ValueError, match="keep must be one of 'u', 'x'; got 'y'"):
        PeraConfig(r=R, target_modules=["0"], keep="y")
