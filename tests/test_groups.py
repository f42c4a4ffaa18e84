"""Projections that share their input: proof, results, and every reason to stay alone."""

import copy
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels import autograd, plans
from pera_kernels.groups import shared_inputs
from pera_kernels.verify.numerics import judge


class Attention(nn.Module):
    """Grouped-query shapes: k and v are narrower than q."""

    def __init__(self, width=48, narrow=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, narrow, bias=False)
        self.v_proj = nn.Linear(width, narrow)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden):
        shape = hidden.shape[:-1]
        q = self.q_proj(hidden).view(*shape, -1, 16)
        k = self.k_proj(hidden).view(*shape, -1, 16)
        v = self.v_proj(hidden)
        hidden = torch.tanh(q * k) * v.unsqueeze(-2)
        return self.o_proj(hidden.flatten(-2))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)

    def forward(self, x):
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


def adapted(backend, targets=("q_proj", "k_proj", "v_proj"), width=48, **options):
    torch.manual_seed(1)
    model = Attention(width)
    pk.inject(model, list(targets), r=options.pop("r", 8), backend=backend, **options)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.4)
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


@pytest.fixture
def applied(monkeypatch):
    """How often a group and how often a single layer was evaluated."""
    counts = {"group": 0, "single": 0}
    for key, function in (
        ("group", autograd.PeraGroupFunction),
        ("single", autograd.PeraLinearFunction),
    ):
        original = function.apply

        def counted(*arguments, key=key, original=original):
            counts[key] += 1
            return original(*arguments)

        monkeypatch.setattr(function, "apply", counted)
    return counts


@pytest.mark.parametrize(
    "terms, dtype, limit",
    [
        ("full", torch.float32, None),
        ("full", torch.bfloat16, None),
        ("square", torch.float32, 0),
        ("cross", torch.float32, 0),
        ("linear", torch.float32, 0),
    ],
)
def test_a_group_obeys_the_numeric_rule(terms, dtype, limit, backend, device, applied, monkeypatch):
    if limit is not None:
        monkeypatch.setattr(plans, "EXPANDED_SOURCE_TOKENS", limit)
    model = adapted(backend, terms=terms).to(device, dtype)
    # Pooled, as the rule asks for outputs of few numbers: dh has eight for terms="square".
    xs = [torch.randn(3, 7, 48, dtype=dtype, device=device) for _ in range(4)]
    got = pooled(model, xs)
    assert applied == {"group": len(xs), "single": 0}
    reference, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    for layer in [*pk.adapted_modules(reference).values(), *pk.adapted_modules(truth).values()]:
        layer.backend = "reference"
    expected, exact = pooled(reference, xs), pooled(truth, [x.double() for x in xs])
    verdicts = [judge(n, got[n], expected[n], exact[n], dtype) for n in exact]
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]


def test_large_stacks_are_contracted_one_by_one(triton_backend, device, monkeypatch):
    from pera_kernels import launch

    model = adapted("triton").to(device)
    x = torch.randn(5, 48, device=device)
    together = results(model, x)
    monkeypatch.setattr(launch, "CONTRACTED_ROWS", 8)
    apart = results(model, x)
    for name in together:
        torch.testing.assert_close(apart[name], together[name], rtol=1e-5, atol=1e-5)


def test_which_projections_are_grouped():
    model = adapted("torch", ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert pk.group_projections(model) == {"": ("q_proj", "k_proj", "v_proj")}
    gated = pk.inject(Gated(), ["gate_proj", "up_proj", "down_proj"], r=2)
    assert pk.group_projections(gated) == {"": ("gate_proj", "up_proj")}
    assert pk.group_projections(pk.inject(Gated(), ["up_proj"], r=2)) == {}
    alone = pk.inject(Gated(), ["gate_proj", "up_proj"], r=2, group=False)
    assert alone.gate_proj._group is None


def test_layers_of_different_kinds_are_not_grouped():
    model = Gated()
    pk.inject(model, ["gate_proj"], r=2)
    pk.inject(model, ["up_proj"], r=3)
    assert pk.group_projections(model) == {}


class Rebound(Gated):
    def forward(self, x):
        gate = self.gate_proj(x)
        x = x * 2
        return gate * self.up_proj(x)


class Perhaps(Gated):
    def forward(self, x):
        return self.gate_proj(x) if x.sum() > 0 else self.up_proj(x)


class InBranches(Gated):
    def forward(self, x):
        if x.sum() > 0:
            return self.gate_proj(x)
        return self.up_proj(x)


class Twice(Gated):
    def forward(self, x):
        return self.gate_proj(x) * self.up_proj(x) + self.up_proj(x + 1)


class InLoop(Gated):
    def forward(self, x):
        for layer in (self.gate_proj, self.up_proj):
            y = layer(x)
        return y


class Shorted(Gated):
    def forward(self, x):
        return x is not None and self.gate_proj(x) or self.up_proj(x)


class Expression(Gated):
    def forward(self, x):
        return self.gate_proj(x + 1) * self.up_proj(x + 1)


class InBlock(Gated):
    def forward(self, x):
        if x.dim() > 1:
            gate = self.gate_proj(x)
            return gate * self.up_proj(x)
        return x


@pytest.mark.parametrize("kind", [Rebound, Perhaps, InBranches, Twice, InLoop, Shorted, Expression])
def test_what_cannot_be_proved_stays_alone(kind):
    assert shared_inputs(kind(), ["gate_proj", "up_proj"]) == []


def test_a_block_that_runs_as_a_whole_is_proof():
    assert shared_inputs(InBlock(), ["gate_proj", "up_proj"]) == [["gate_proj", "up_proj"]]


def test_a_replaced_forward_and_missing_source_are_no_proof():
    model = Gated()
    model.forward = lambda x: x
    assert shared_inputs(model, ["gate_proj", "up_proj"]) == []
    kind = type("Made", (nn.Module,), {"forward": eval("lambda self, x: self.a(x) * self.b(x)")})
    assert shared_inputs(kind(), ["a", "b"]) == []


def test_layers_called_apart_are_still_right(applied):
    """Other inputs, other order, in-place changes between the calls: each gets its own result."""
    model = adapted("torch")
    x, other = torch.randn(2, 48), torch.randn(2, 48)
    with torch.no_grad():
        expected = {
            (n, id(t)): copy.deepcopy(getattr(model, n))(t)
            for n in ("q_proj", "k_proj")
            for t in (x, other)
        }
        applied.update(group=0, single=0)
        for name, tensor in [("q_proj", x), ("k_proj", other), ("k_proj", x), ("k_proj", x)]:
            torch.testing.assert_close(
                getattr(model, name)(tensor), expected[name, id(tensor)], rtol=1e-5, atol=1e-5
            )
        model.q_proj(x)
        x.add_(1.0)
        changed = copy.deepcopy(model.k_proj)(x)
        torch.testing.assert_close(model.k_proj(x), changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias", "pera_A", "pera_B", "pera_h"])
def test_outputs_of_a_changed_layer_are_computed_again(name):
    model, x = adapted("torch"), torch.randn(5, 48)
    before = model.q_proj(x)
    with torch.no_grad():
        getattr(model.v_proj, name).mul_(2.0)
    torch.testing.assert_close(model.v_proj(x), copy.deepcopy(model).v_proj(x.clone()))
    torch.testing.assert_close(model.q_proj(x), before)


@pytest.mark.parametrize("threaded", [False, True])
def test_outputs_are_not_used_after_a_backward(threaded):
    model, x = adapted("torch"), torch.randn(5, 48)
    backward = model.q_proj(x).sum().backward
    if threaded:
        worker = threading.Thread(target=backward)
        worker.start()
        worker.join()
    else:
        backward()
    model.k_proj(x).sum().backward()
    alone = copy.deepcopy(model.k_proj)
    alone._group, alone.pera_B.grad = None, None
    alone(x).sum().backward()
    torch.testing.assert_close(model.k_proj.pera_B.grad, alone.pera_B.grad)


def test_outputs_outlive_neither_the_input_nor_the_graph():
    model = adapted("torch")
    with torch.no_grad():
        x = torch.randn(2, 48)
        model.q_proj(x)
    own = model.q_proj._group._own
    assert set(own.waiting.outputs) == {"k_proj", "v_proj"}
    del x
    assert not own.waiting.outputs
    # With gradients the graph of the outputs that wait holds x.
    y, v = model.q_proj(torch.randn(2, 48)), weakref.ref(own.waiting.outputs["v_proj"])
    y.sum().backward()
    assert not own.waiting.outputs and v() is None


def test_outputs_under_no_grad_are_not_used_for_training():
    model = adapted("torch")
    x = torch.randn(2, 48)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


@pytest.mark.parametrize("change", ["merge", "disable", "hook", "rank", "eval", "inference"])
def test_a_layer_that_differs_dissolves_the_group(change, applied):
    model = adapted("torch")
    x = torch.randn(2, 48)
    plain = adapted("torch", group=False)
    stack = __import__("contextlib").ExitStack()
    for own in (model, plain):
        if change == "merge":
            own.k_proj.merge()
        elif change == "disable":
            stack.enter_context(own.k_proj.disabled())
        elif change == "hook":
            own.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        elif change == "rank":
            own.k_proj = pk.PeraLinear(48, 16, r=3)
            torch.manual_seed(2)
            nn.init.normal_(own.k_proj.pera_B)
        elif change == "eval":
            own.k_proj.eval()
    if change == "rank":
        plain.load_state_dict(model.state_dict())
    if change == "inference":
        stack.enter_context(torch.inference_mode())
        x = x.clone()
    with stack:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    assert applied["group"] == 0


def test_dropout_is_one_mask_for_the_group(backend, device):
    """x̂ of q, k and v is the same, and the gradients know it."""
    model = adapted(backend, dropout=0.5).to(device)
    x = torch.randn(4, 48, device=device)
    with torch.no_grad():
        for layer in pk.adapted_modules(model).values():
            layer.pera_A.copy_(model.q_proj.pera_A)
            layer.pera_B.copy_(model.q_proj.pera_B[: layer.out_features])
            layer.pera_h.copy_(model.q_proj.pera_h)
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
        q, k = model.q_proj(x), model.k_proj(x)
    torch.testing.assert_close(q[:, :16], k)
    torch.manual_seed(3)
    got = results(model, x)
    torch.manual_seed(3)
    again = results(model, x)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert got["dx"].abs().sum() > 0


def test_partial_gradients(backend, device):
    """Frozen parameters, an output that is not used, an input that needs no gradient."""
    model = adapted(backend).to(device)
    alone = copy.deepcopy(model)
    for layer in pk.adapted_modules(alone).values():
        layer._group = None
    x = torch.randn(5, 48, device=device)
    for own in (model, alone):
        own.q_proj.pera_A.requires_grad_(False)
        own.v_proj.pera_h.requires_grad_(False)
        q, k = own.q_proj(x), own.k_proj(x)
        own.v_proj(x)
        (q.sum() + k.square().sum()).backward()
    for (name, got), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        if got.requires_grad and not name.startswith("v_proj"):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
        elif got.grad is not None:
            assert not got.grad.any()


def test_checkpointing_and_autocast():
    model = adapted("torch", dropout=0.3)
    x = torch.randn(6, 48, requires_grad=True)
    torch.manual_seed(5)
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.manual_seed(5)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(plain, again)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_compiled_layers_compute_for_themselves(applied):
    torch._dynamo.reset()
    model = adapted("torch")
    x = torch.randn(6, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_copies_have_their_own_group():
    model = adapted("torch")
    clone = copy.deepcopy(model)
    assert clone.q_proj._group is clone.k_proj._group is not model.q_proj._group
    with torch.no_grad():
        clone.k_proj.pera_B.zero_()
    x = torch.randn(2, 48)
    clone.q_proj(x)
    torch.testing.assert_close(clone.k_proj(x), clone.k_proj._base_forward(x))
    assert copy.deepcopy(model.q_proj)._group is None


def test_pickled_models_are_grouped_again_on_demand():
    model = adapted("torch")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.q_proj._group is None
    x = torch.randn(2, 48)
    torch.testing.assert_close(loaded(x), model(x))
    assert pk.group_projections(loaded) == {"": ("q_proj", "k_proj", "v_proj")}


def test_an_opcheck_of_the_group_ops(triton_backend, device):
    from pera_kernels import ops

    layers = [
        (torch.randn(m, 20), torch.randn(3, 20), torch.randn(m, 3), torch.randn(6)) for m in (12, 8)
    ]
    weights, As, Bs, hs = ([t.to(device) for t in group] for group in zip(*layers, strict=True))
    x = torch.randn(9, 20, device=device)
    rest = (As, Bs, hs, None, 0.5, "full", 0.0)
    torch.library.opcheck(ops.group_forward, (x, weights, [None, None], *rest))
    *ys, u = ops.group_forward(x, weights, [None, None], *rest)
    dys = [torch.randn_like(y) for y in ys]
    for needs in ([True] * 7, [False, True, False, True, False, True, False]):
        torch.library.opcheck(ops.group_backward, (dys, x, u, weights, *rest, needs))
