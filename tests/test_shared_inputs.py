"""Adapted layers that share their input: together inside one call of their parent, else apart."""

import contextlib
import copy
import io
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import pera_kernels as pk
from pera_kernels.adapters.shared_inputs import SharedInputs
from pera_kernels.autograd import Onto
from pera_kernels.testing import judge

QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Grouped-query shapes: k and v are narrower than q."""

    def __init__(self, width=48, narrow=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, narrow, bias=False)
        self.v_proj = nn.Linear(width, narrow)
        self.o_proj = nn.Linear(width, width)

    def project(self, hidden):
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def forward(self, hidden):
        q, k, v = self.project(hidden)
        shape = hidden.shape[:-1]
        hidden = torch.tanh(q.view(*shape, -1, 16) * k.view(*shape, -1, 16)) * v.unsqueeze(-2)
        return self.o_proj(hidden.flatten(-2))


class Projections(Attention):
    def forward(self, hidden):
        return self.project(hidden)


def adapted(backend="torch", kind=Attention, targets=QKV, **options):
    torch.manual_seed(1)
    model = kind()
    pk.inject(model, list(targets), r=options.pop("r", 8), backend=backend, **options)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.4)
    return model


def apart(model):
    """A copy whose layers all compute alone."""
    model = copy.deepcopy(model)
    pk.shared_inputs(model, ())
    return model


def results(model, x):
    """y, dx and the gradients of the adapters, by name."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    gradients = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"y": y.detach(), **dict(zip(["dx", *named], gradients, strict=True))}


def pooled(model, xs):
    draws = [results(model, x) for x in xs]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@pytest.mark.parametrize(
    "terms, dtype, in_memory",
    [
        pytest.param("full", torch.float32, False, marks=pytest.mark.slow),
        ("full", torch.bfloat16, False),
        ("square", torch.float32, True),
        pytest.param("cross", torch.float32, True, marks=pytest.mark.slow),
        ("linear", torch.float32, True),
    ],
)
def test_the_numeric_rule(terms, dtype, in_memory, backend, device, together, monkeypatch):
    if in_memory and backend == "triton":
        from pera_kernels.kernels import tiles

        monkeypatch.setattr(tiles, "choices", lambda device: tiles.Choices(products=0))
    model = adapted(backend, terms=terms).to(device, dtype)
    # Pooled, as the rule asks for outputs of few numbers: dh has eight for terms="square".
    xs = [torch.randn(3, 7, 48, dtype=dtype, device=device) for _ in range(4)]
    got = pooled(model, xs)
    assert together == [3] * len(xs)
    reference, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    for layer in [*pk.adapted_modules(reference).values(), *pk.adapted_modules(truth).values()]:
        layer.backend = "reference"
    expected, exact = pooled(reference, xs), pooled(truth, [x.double() for x in xs])
    verdicts = [judge(n, got[n], expected[n], exact[n], dtype) for n in exact]
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]


def test_a_forward_has_the_same_bits_whoever_asks(backend, device, together):
    """With and without gradients, in eval and training mode, the first time and the tenth."""
    model = adapted(backend).to(device)
    x = torch.randn(5, 48, device=device)
    first = model(x)
    with torch.no_grad():
        outputs = [model(x) for _ in range(10)]
        outputs.append(model.eval()(x))
    model.train()
    outputs.append(model(x.clone().requires_grad_()))
    model.requires_grad_(False)
    outputs.append(model(x))
    assert all(torch.equal(y, first) for y in outputs)
    assert together == [3] * 14


def test_the_table_of_names_and_other_names():
    assert pk.shared_inputs(adapted(targets=("q_proj", "o_proj"))) == {}
    model = adapted(targets=(*QKV, "o_proj"))
    assert pk.shared_inputs(model) == {"": QKV}
    assert pk.shared_inputs(model, [("k_proj", "v_proj")]) == {"": ("k_proj", "v_proj")}
    assert model.q_proj.shared_inputs is None
    assert pk.shared_inputs(model, ()) == {}
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    assert not any(isinstance(getattr(hook, "__self__", None), SharedInputs) for hook in hooks)
    assert adapted(shared_inputs=()).q_proj.shared_inputs is None


@pytest.mark.parametrize("names", ["q_proj", ["q_proj", "k_proj"], [("q_proj",)], [(1, 2)], None])
def test_bad_names_are_refused_and_nothing_is_changed(names):
    model = Attention()
    with pytest.raises(ValueError, match="shared_inputs must be a list of tuples"):
        pk.inject(model, ["q_proj"], r=2, shared_inputs=names)
    assert not pk.adapted_modules(model)


def test_a_name_in_two_groups_is_refused():
    with pytest.raises(ValueError, match="'k_proj' more than once"):
        pk.shared_inputs(adapted(), [("q_proj", "k_proj"), ("k_proj", "v_proj")])


def test_called_from_elsewhere_a_layer_computes_alone(together):
    model, x = adapted(), torch.randn(5, 48)
    y = model.q_proj(x)
    with torch.no_grad():
        model.k_proj.weight.mul_(2.0)
        expected = apart(model).k_proj(x)
        x_before = x.clone()
    assert torch.equal(model.k_proj(x), expected)
    assert not together and torch.equal(x, x_before) and y.shape == (5, 48)


WRITES = {
    "x": lambda model, x: x.add_(1.0),
    "weight": lambda model, x: model.v_proj.weight.mul_(2.0),
    "bias": lambda model, x: model.v_proj.bias.mul_(2.0),
    "pera_A": lambda model, x: model.v_proj.pera_A.mul_(2.0),
    "pera_B": lambda model, x: model.v_proj.pera_B.mul_(2.0),
    "pera_h": lambda model, x: model.v_proj.pera_h.mul_(2.0),
    "parameter replaced": lambda model, x: setattr(
        model.v_proj, "pera_A", nn.Parameter(torch.ones(8, 48))
    ),
    "merge": lambda model, x: model.v_proj.merge(),
    "hook": lambda model, x: model.v_proj.register_forward_hook(lambda m, a, y: y * 2),
    "alpha": lambda model, x: setattr(model.v_proj, "alpha", 3.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_between_two_calls_is_seen(name, together):
    class Writes(Projections):
        def forward(self, hidden):
            q, k = self.q_proj(hidden), self.k_proj(hidden)
            with torch.no_grad():
                WRITES[name](self, hidden)
            return q, k, self.v_proj(hidden)

    model, x = adapted(kind=Writes), torch.randn(5, 48)
    expected = apart(model)(x.clone())
    for got, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert together == [3]


@pytest.mark.parametrize("mode", ["no_grad", "autocast", "inference"])
def test_another_mode_between_two_calls_is_seen(mode, together):
    modes = {
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
    }

    class Changes(Projections):
        def forward(self, hidden):
            q = self.q_proj(hidden)
            with modes[mode]():
                k = self.k_proj(hidden)
            return q, k, self.v_proj(hidden)

    model, x = adapted(kind=Changes), torch.randn(5, 48)
    got, expected = model(x), apart(model)(x)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b)
    assert together == [3]


def test_another_stream_between_two_calls_is_seen(together, monkeypatch):
    streams = iter([1, 1, 1, 1, 2, 1])
    monkeypatch.setattr("pera_kernels.adapters.shared_inputs._stream", lambda device: next(streams))
    model = adapted(kind=Projections)
    model(torch.randn(5, 48))
    assert together == [3] and model.q_proj.shared_inputs.dissolved


@pytest.mark.parametrize(
    "change", ["merge", "disable", "hook", "rank", "eval", "subclass", "inference", "reference"]
)
def test_a_layer_that_differs_computes_alone(change, together):
    model = adapted(kind=Projections)
    x, stack = torch.randn(2, 48), contextlib.ExitStack()
    if change == "merge":
        model.k_proj.merge()
    elif change == "disable":
        stack.enter_context(model.k_proj.disabled())
    elif change == "hook":
        model.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif change == "rank":
        model.k_proj = pk.PeraLinear(48, 16, r=3)
        pk.shared_inputs(model)
    elif change == "eval":
        model.k_proj.dropout = model.q_proj.dropout = model.v_proj.dropout = 0.5
        model.eval().k_proj.train()
    elif change == "subclass":

        class Sharded(nn.Parameter):
            pass

        model.k_proj.weight = Sharded(model.k_proj.weight.detach(), requires_grad=False)
    elif change == "reference":
        model.k_proj.backend = "reference"
    else:
        stack.enter_context(torch.inference_mode())
        x = x.clone()
    with stack:
        torch.manual_seed(0)
        got = model(x)
        torch.manual_seed(0)
        copied = apart(model)
        if change == "disable":
            stack.enter_context(copied.k_proj.disabled())
        alone = copied(x)
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert together == ([] if change == "inference" else [2])


def test_what_is_not_asked_for_dissolves_the_group(together):
    class Cross(Projections):
        def forward(self, hidden):
            return self.q_proj(hidden), self.k_proj(hidden + 1), self.v_proj(hidden + 1)

    model, x = adapted(kind=Cross), torch.randn(5, 48)
    for _ in range(3):
        for got, want in zip(model(x), apart(model)(x), strict=True):
            assert torch.equal(got, want)
    assert together == [3] and model.q_proj.shared_inputs.dissolved


def test_an_exception_frees_and_does_not_dissolve(together):
    class Fails(Projections):
        fail = True

        def forward(self, hidden):
            q = self.q_proj(hidden)
            if self.fail:
                raise RuntimeError("stop")
            return q, self.k_proj(hidden), self.v_proj(hidden)

    model, x = adapted(kind=Fails), torch.randn(5, 48)
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    group = model.q_proj.shared_inputs
    assert group._thread.call is None and not group.dissolved
    model.fail = False
    model(x)
    assert together == [3, 3] and not group.dissolved


def test_an_output_nobody_used_has_no_gradient(backend, device, together):
    model = adapted(backend, kind=Projections).to(device)
    alone = apart(model)
    x = torch.randn(5, 48, device=device)
    for own in (model, alone):
        own.q_proj.pera_A.requires_grad_(False)
        q, k, _ = own(x)
        (q.sum() + k.square().sum()).backward()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert model.v_proj.pera_B.grad is None and together == [3]


def test_one_backward_after_the_other(backend, device, together):
    model = adapted(backend, kind=Projections).to(device)
    alone = apart(model)
    x = torch.randn(5, 48, device=device)
    for own in (model, alone):
        for y in own(x):
            y.sum().backward()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert together == [3]


class Adds(TorchDispatchMode):
    """Counts the additions of whole gradients."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        return function(*arguments, **(keywords or {}))


def near(a, b):
    """As near as sums are whose parts were rounded to bfloat16 in another order."""
    return (a - b).norm() < 0.01 * b.norm()


class TestOneGradientOfX:
    """In bfloat16 the kernels' layers add their parts of dx into one tensor."""

    @pytest.fixture
    def models(self, triton_backend, device):
        model = adapted("triton", kind=Projections, r=3).to(device, torch.bfloat16)
        return model, apart(model)

    @pytest.fixture
    def x(self, device):
        return torch.randn(5, 48, dtype=torch.bfloat16, device=device, requires_grad=True)

    def test_nothing_else_adds(self, models, x, together):
        adds = []
        for model in models:
            y = torch.cat(model(x), -1).sum()
            # What launches under a mode is traced, layer by layer: the kernels do not see this one.
            with pytest.MonkeyPatch.context() as patch, Adds() as mode:
                patch.setattr("pera_kernels.kernels.ops._traced", lambda *tensors: False)
                y.backward()
            adds.append(mode.count)
        assert adds[0] == 0 and adds[1] >= 2 and together == [3]

    @pytest.mark.parametrize("used", [(1,), (2, 0), (0, 1, 2)])
    def test_whichever_outputs_are_used(self, used, models, x, together):
        results = []
        for model in models:
            ys = model(x)
            (dx,) = torch.autograd.grad(sum(ys[i].square().sum() for i in used), x)
            results.append(dx)
        assert near(*results)
        assert together == [3]

    def test_one_backward_after_the_other(self, models, x, together):
        results = []
        for model in models:
            x.grad = None
            for y in model(x):
                y.sum().backward()
            results.append(x.grad)
        assert near(*results)

    def test_again_over_a_kept_graph(self, models, x, together):
        model, _ = models
        y = sum(y.square().sum() for y in model(x))
        first, _ = torch.autograd.grad(y, (x, model.q_proj.pera_A), retain_graph=True)
        kept = first.clone()
        torch.autograd.grad(y, model.k_proj.pera_A, retain_graph=True)
        (second,) = torch.autograd.grad(y, x, retain_graph=True)
        assert torch.equal(first, kept) and torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()

    def test_a_backward_that_is_traced(self, models, x):
        results = []
        for model in models:
            y = sum(y.square().sum() for y in model(x))
            with Adds():
                results.append(torch.autograd.grad(y, x)[0])
        assert near(*results)

    def test_other_uses_of_x_and_a_checkpoint(self, models, x, together):
        results = []
        for model in models:
            for run in (model, lambda x, own=model: checkpoint(own, x, use_reentrant=False)):
                x.grad = None
                hidden = x * 2
                q, k, v = run(hidden)
                (hidden.sum() + (q + hidden).square().sum() + k.sum() + v.sum()).backward()
                results.append(x.grad)
        for dx in results[1:]:
            assert near(dx, results[0])

    def test_x_changed_before_the_backward(self, models, x):
        hidden = x * 2
        y = sum(y.sum() for y in models[0](hidden))
        hidden.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_a_hook_that_replaces_its_gradient_is_refused(self, models, x):
        q, k, v = models[0](x)
        q.grad_fn.register_hook(lambda gradients, _: (2 * gradients[0], *gradients[1:]))
        with pytest.raises(RuntimeError, match="replaced the gradient of an input"):
            (q.sum() + k.sum() + v.sum()).backward()

    def test_passes_at_the_same_time(self, monkeypatch):
        """Passes over one graph do not meet in one sum."""
        passes = iter([1, 1, 2, 2, 1, 1])
        queued = []
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: next(passes))
        engine = SimpleNamespace(queue_callback=queued.append)
        monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", engine)
        onto, first, second = Onto(), torch.zeros(2), torch.zeros(2)
        onto.add(first)
        assert onto.sum() is first
        assert onto.sum() is None
        onto.add(second)
        assert onto.sum() is first
        assert len(queued) == 2 and not onto._sums.keys() - {1, 2}
        for ended in queued:
            ended()
        assert not onto._sums


def test_an_output_may_be_changed_in_place(together):
    model, x = adapted(kind=Projections), torch.randn(5, 48, requires_grad=True)
    q, k, v = model(x)
    (q.relu_().sum() + k.sum() + v.sum()).backward()
    assert x.grad is not None and together == [3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_the_parent(reentrant, together):
    model = adapted()
    x = torch.randn(6, 48, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x.grad = None
        run(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert not model.q_proj.shared_inputs.dissolved and together == [3] * 3


class Inside(Projections):
    """k and v are checkpointed by themselves: they are recomputed outside the parent's call."""

    def forward(self, hidden):
        def some(hidden):
            return self.k_proj(hidden), self.v_proj(hidden)

        return self.q_proj(hidden), *checkpoint(some, hidden, use_reentrant=False)


class Unasked(Projections):
    def forward(self, hidden):
        return self.q_proj(hidden), self.k_proj(hidden)


@pytest.mark.parametrize("T", [6, 400])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [Projections, Inside, Unasked])
def test_a_checkpoint_computes_the_same_again(kind, dropout, T):
    """With the masks of the forward, and keeping as much, though a group dissolves in between."""
    model = adapted(kind=kind, dropout=dropout, r=16)
    x = torch.randn(T, 48)
    gradients = []
    for own in (apart(model), model):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        ys = checkpoint(own, leaf, use_reentrant=False)
        sum(y.square().sum() for y in ys).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_with_dropout_every_layer_has_its_own_mask(together):
    model = adapted(kind=Projections, dropout=0.5)
    x = torch.randn(4, 48)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(got, apart(model)(x), strict=True))
    assert not together
    model.eval()(x)
    assert together == [3]


def test_a_composed_plan_computes_alone(together):
    """What ``plan="auto"`` chooses does not depend on being in a group."""
    model = adapted(kind=Projections, r=16)
    x = torch.randn(400, 48)
    for a, b in zip(model(x), apart(model)(x), strict=True):
        assert torch.equal(a, b)
    assert together == [3] and not model.q_proj.shared_inputs.dissolved


def test_autocast(together):
    model, x = adapted().eval(), torch.randn(6, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, apart(model)(x))
    y.float().sum().backward()
    assert together == [3]


def test_a_trace_computes_apart(triton_backend, device, together):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = adapted("triton", kind=Projections).to(device)
    x = torch.randn(4, 48, device=device)
    traced = make_fx(lambda x: model(x))(x)
    assert "pera_kernels.forward" in traced.code and not together
    for a, b in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_computes_apart(together):
    torch._dynamo.reset()
    model = adapted()
    x = torch.randn(6, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert not together
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_copies_have_their_own_group():
    model = adapted()
    clone = copy.deepcopy(model)
    assert clone.q_proj.shared_inputs is clone.k_proj.shared_inputs
    assert clone.q_proj.shared_inputs is not model.q_proj.shared_inputs
    with torch.no_grad():
        clone.k_proj.pera_B.zero_()
    x = torch.randn(2, 48)
    torch.testing.assert_close(clone(x), apart(clone)(x))
    layer = copy.deepcopy(model.q_proj)
    torch.testing.assert_close(layer(x), model.q_proj(x))


def test_pickled_models_share_again(together):
    model = adapted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 48)
    assert torch.equal(loaded(x), model(x))
    assert together == [3, 3]


def test_hooks_of_another_process_are_kept():
    """There hooks are numbered from 0: a new one must not take the place of the closing one."""
    model = adapted(kind=Projections)
    numbers = {*model._forward_hooks, *model._forward_pre_hooks}
    before, RemovableHandle.next_id = RemovableHandle.next_id, 0
    try:
        loaded = pickle.loads(pickle.dumps(model))
        assert loaded.register_forward_hook(lambda module, args, y: y).id not in numbers
        assert loaded.register_forward_pre_hook(lambda module, args: args).id not in numbers
    finally:
        RemovableHandle.next_id = before


def test_a_hook_on_one_member_leaves_the_others_together(together):
    model, x = adapted(kind=Projections), torch.randn(4, 48)
    model.q_proj.register_forward_hook(lambda module, args, y: y * 2)
    for a, b in zip(model(x), apart(model)(x), strict=True):
        assert torch.equal(a, b)
    assert together == [2]


def test_dissolved_is_dissolved_though_others_are_injected(together):
    model, x = adapted(kind=Unasked), torch.randn(4, 48)
    model(x)
    assert model.q_proj.shared_inputs.dissolved
    pk.inject(model, ["o_proj"], r=2)
    model(x)
    assert together == [3]


def test_a_call_while_an_exception_is_handled_dissolves_as_others_do():
    model, x = adapted(kind=Unasked), torch.randn(4, 48)
    try:
        raise RuntimeError("outside")
    except RuntimeError:
        model(x)
    assert model.q_proj.shared_inputs.dissolved


def test_a_member_that_cannot_be_computed_does_not_stop_another(together):
    model, x = adapted(kind=Unasked), torch.randn(4, 48)
    model.v_proj.weight.requires_grad_(True)
    q, k = model(x)
    assert together == [2] and q.shape == (4, 48) and k.shape == (4, 16)


def test_an_unloaded_model_has_no_hooks():
    model = adapted()
    expected = model(x := torch.randn(2, 48))
    pk.unload(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_threads_have_calls_of_their_own(together):
    model = adapted().eval()
    xs = [torch.randn(5, 48) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    wrong = []

    def work(x, want):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(x), want):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(together) == 4 + 80


def test_nothing_waits_after_an_interrupt(together):
    """PyTorch calls no hooks after one: what was computed must not come back later, and the next
    call starts afresh.
    """

    class Interrupted(Projections):
        stop = True

        def forward(self, hidden):
            q = self.q_proj(hidden)
            if self.stop:
                raise KeyboardInterrupt
            return q, self.k_proj(hidden), self.v_proj(hidden)

    model, x = adapted(kind=Interrupted), torch.randn(5, 48)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.k_proj.pera_B.data.mul_(2.0)
    assert torch.equal(model.k_proj(x), apart(model).k_proj(x))
    model.stop = False
    for got, want in zip(model(x), apart(model)(x), strict=True):
        torch.testing.assert_close(got, want)
    assert together == [3, 3] and not model.q_proj.shared_inputs.dissolved
