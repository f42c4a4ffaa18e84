"""The life of a model with adapters: random actions, and after each what every layer computes.

An action does something to the model and the same to what is true of it (``tests/life.py``); what
must be refused changes nothing. A failure shows its seed and the actions so far:
``live(seed, backend, steps)`` runs it again.
"""

import collections
import contextlib
import copy
import gc
import io
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels.backends import unavailable
from pera_kernels.terms import TERMS
from tests.life import (
    LAYERS,
    NAMES,
    PARTS,
    WIDTH,
    Call,
    Model,
    Tape,
    Truth,
    World,
    assert_near,
    check_alone,
    double,
    expected_warning,
    random_values,
    rounding,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ACTIONS = {}


def action(function):
    ACTIONS[function.__name__] = function
    return function


class Life:
    """One model, perhaps a copy of an earlier state of it, and what was done so far."""

    def __init__(self, seed, backend, folder):
        torch.manual_seed(seed)
        self.rng, self.backend, self.folder = random.Random(seed), backend, folder
        self.done = ["made"]
        self.last = None
        # Inside a forward: the layer whose turn it is.
        self.inside, self.next = False, None
        self.dtypes = DTYPES[:2] if backend == "triton" else DTYPES
        model = Model().to(self.rng.choice(self.dtypes))
        truths = {}
        for name in LAYERS:
            layer = getattr(model, name)
            layer.requires_grad_(False)
            bias = None if layer.bias is None else layer.bias.clone()
            truths[name] = Truth(layer.weight.clone(), bias)
        truths["called"].shift = 1.0
        truths["score"].trains = {"weight", "bias"}
        self.worlds = [World(model, truths)]
        inject_further_layers(self, self.world)

    @property
    def world(self):
        return self.worlds[0]

    def goes_on_as(self, world):
        """Another model from now on; the present one is kept, and must not change by that."""
        for old in self.worlds[1:]:
            old.leave()
        self.worlds = [world, self.world]

    def note(self, text):
        self.done[-1] += f" {text}"

    def choose(self, *ways):
        way = self.rng.choice(ways)
        self.note(way)
        return way

    def input(self, requires_grad=True, dtype=None):
        shape = self.rng.choice([(5,), (2, 3), (), (1,), (70,)])
        if self.backend == "triton":
            shape = self.rng.choice([(5,), (1,), (2, 3)])
        dtype = dtype or self.world.dtype
        again = self.last is not None and self.last.dtype == dtype and not self.inside
        if again and self.rng.random() < 0.4:
            # The same tensor as before, perhaps with other values.
            x, self.last.requires_grad = self.last, requires_grad
            if self.rng.random() < 0.5:
                x.data.mul_(0.5)
            return x
        x = torch.randn(*shape, WIDTH).to(dtype)
        if self.rng.random() < 0.2:
            x = torch.cat([x, x], -1)[..., ::2]
        self.last = x.requires_grad_(requires_grad)
        return x

    def used(self):
        """Some of the outputs, and often all."""
        count = self.rng.choice([1, 2, 4, len(NAMES), len(NAMES)])
        return set(self.rng.sample(NAMES, count))

    def compare(self):
        """Forward and backward as the model is now."""
        call = Call(self.world, self.input(self.rng.random() < 0.8)).run()
        call.check_gradients(self.used())

    def pick(self, names=None):
        """(name, layer, truth) of an adapted layer."""
        names = self.world.adapted if names is None else names
        name = self.next if self.next in names else self.rng.choice(names)
        self.note(name)
        return name, self.world.layer(name), self.world.truths[name]

    def adapting(self, *but):
        """Names of layers whose adapters count now."""
        world = self.world
        names = set(world.adapted) - world.off - set(but)
        return sorted(name for name in names if world.truths[name].merged is None)

    def pick_part(self, names=None):
        """The same and one of A, B and h."""
        name, layer, truth = self.pick(names)
        part = self.rng.choice([part for part in PARTS if getattr(truth, part) is not None])
        self.note(part)
        return name, layer, truth, part


# What trains and what is written.


@action
def train_or_evaluate(life, world):
    name = life.rng.choice(["", "", *LAYERS])
    module = world.layer(name) if name else world.model
    module.train(life.rng.random() < 0.5)


@action
def optimizer_step(life, world):
    Call(world, life.input()).run().check_gradients(set(NAMES))
    trained = [p for p in world.model.parameters() if p.requires_grad]
    kind = life.rng.choice([torch.optim.AdamW, torch.optim.SGD])
    way = life.rng.choice([{}, {"foreach": True}, {"fused": True}])
    life.note(f"{kind.__name__} {way}")
    if life.rng.random() < 0.5 and any(world.truths[name].trains for name in world.adapted):
        trained = pk.parameter_groups(world.model, 1e-2, lr_h=1e-2)
    own = [p for p in world.model.parameters() if p.grad is not None]
    copies = [p.detach().clone() for p in own]
    for values, p in zip(copies, own, strict=True):
        values.grad = p.grad.clone()
    if own:
        # As it does to the same values that no layer holds.
        kind(trained, lr=1e-2, weight_decay=0.0, **way).step()
        kind(copies, lr=1e-2, weight_decay=0.0, **way).step()
        torch.testing.assert_close([p.detach() for p in own], copies)
    for name in world.adapted:
        world.truths[name].read(world.layer(name))
    for part in ("weight", "bias"):
        setattr(world.truths["score"], part, getattr(world.model.score, part).detach().clone())


@action
def write_a_parameter(life, world):
    _, layer, truth, part = life.pick_part()
    parameter, values = getattr(layer, f"pera_{part}"), random_values(getattr(truth, part))
    # Inside a forward, a write through data is not seen.
    ways = ["in place", "another parameter"] + ["data", "other data"] * (not life.inside)
    way = life.choose(*ways)
    if way == "data":
        parameter.data.copy_(values)
    elif way == "other data":
        parameter.data = values.clone()
    elif way == "in place":
        with torch.no_grad():
            parameter.copy_(values)
    else:
        new = nn.Parameter(values.clone(), requires_grad=part in truth.trains)
        setattr(layer, f"pera_{part}", new)
    setattr(truth, part, values)


@action
def parameter_of_a_wrong_shape(life, world):
    name, layer, truth, part = life.pick_part()
    kept, wrong = getattr(layer, f"pera_{part}"), "must|A and B are for"
    setattr(layer, f"pera_{part}", nn.Parameter(kept.detach().repeat_interleave(2, -1)))
    x = life.input()
    if name in life.adapting():
        world.refused(ValueError, wrong, lambda: world.model(x))
    if truth.merged is None and name in world.mergeable:
        world.refused(ValueError, wrong, layer.merge)
    world.refused(ValueError, wrong, lambda: pk.save_adapter(world.model, life.folder))
    setattr(layer, f"pera_{part}", kept)


@action
def change_alpha(life, world):
    name, layer, truth = life.pick()
    if name in life.adapting():
        for wrong, error in ((float("nan"), ValueError), ("2", TypeError)):
            layer.alpha = wrong
            with pytest.raises(error):
                layer(life.input())
    layer.alpha = truth.alpha = life.rng.choice([0.5, 1.0, 3.0])


@action
def change_dropout(life, world):
    _, layer, truth = life.pick()
    layer.dropout = truth.dropout = life.rng.choice([0.0, 0.3])
    layer.plan = "factored"


@action
def change_plan(life, world):
    name, layer, truth = life.pick()
    layer.plan = life.rng.choice(["auto", "factored", "composed"])
    if layer.plan == "composed" and (truth.dropout or name == "called"):
        if name in life.adapting() and (layer.training or name == "called"):
            world.refused(ValueError, "plan='composed'", lambda: world.model(life.input()))
        layer.plan = "auto"


@action
def reset_adapter(life, world):
    _, layer, truth = life.pick()
    layer.reset_adapter()
    truth.read(layer)
    assert not truth.B.any()


@action
def freeze_a_factor(life, world):
    _, layer, truth, part = life.pick_part()
    truth.trains ^= {part}
    getattr(layer, f"pera_{part}").requires_grad_(part in truth.trains)


# Merged and disabled.


@action
def merge_layer(life, world):
    name, layer, truth = life.pick()
    keep, safe = life.rng.random() < 0.5, life.rng.random() < 0.7
    around = life.rng.choice([contextlib.nullcontext, torch.inference_mode, torch.no_grad])
    life.note(f"{keep=} {around.__name__}")
    if name == "called":
        world.refused(TypeError, "plain nn.Linear", lambda: layer.merge(safe))
    elif name == "head":
        world.refused(ValueError, "embed.weight", lambda: layer.merge(safe))
    elif truth.merged is None:
        with around():
            layer.merge(safe, keep_base=keep)
        truth.merge(layer, keep)
    else:
        before = layer.weight.clone()
        layer.merge(safe, keep_base=keep)
        assert torch.equal(layer.weight, before)


@action
def unmerge_layer(life, world):
    _, layer, truth = life.pick()
    around = life.rng.choice([contextlib.nullcontext, torch.inference_mode])
    with around():
        layer.unmerge()
    truth.unmerge(layer)


@action
def merge_model(life, world):
    keep = life.rng.random() < 0.5
    errors = {"called": TypeError, "head": ValueError}
    reasons = [errors[name] for name in world.adapted if name in errors]
    if reasons:
        match = "plain nn.Linear|weights are shared"
        world.refused(tuple(reasons), match, lambda: pk.merge(world.model, keep_base=keep))
        return False
    waiting = [name for name in world.adapted if world.truths[name].merged is None]
    pk.merge(world.model, keep_base=keep)
    for name in waiting:
        world.truths[name].merge(world.layer(name), keep)


@action
def unmerge_model(life, world):
    pk.unmerge(world.model)
    for name in world.adapted:
        world.truths[name].unmerge(world.layer(name))


@action
def merge_what_is_not_finite(life, world):
    name, layer, truth = life.pick()
    if name in world.mergeable and truth.merged is None:
        with torch.no_grad():
            layer.pera_B[0, 0] = float("inf")
        call = life.rng.choice([layer.merge, lambda: layer.merge(keep_base=False)])
        world.refused(ValueError, "infinite or NaN", call)
        with torch.no_grad():
            layer.pera_B.copy_(truth.B)


@action
def disable(life, world):
    name, layer, _ = life.pick()
    if len(world.disabled[name]) < 2:
        context = layer.disabled()
        assert context.__enter__() is layer
        world.disabled[name].append(context)


@action
def enable(life, world):
    name = life.rng.choice([*world.off, LAYERS[0]])
    if world.disabled[name]:
        world.disabled[name].pop().__exit__(None, None, None)


# Calls of every kind.


@action
def without_gradients(life, world):
    context = life.rng.choice([torch.no_grad, torch.inference_mode])
    x = life.input(False)
    with context():
        call = Call(world, x).run()
    assert not any(y.requires_grad for y in call.results)


@action
def in_another_thread(life, world):
    call, used = Call(world, life.input(), off=set()), life.used()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call.run).result()
    if life.rng.random() < 0.5:
        call.check_gradients(used)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call.check_gradients, used).result()


@action
def threads_at_once(life, world):
    """Some disable a layer of their own; the interpreter of kernels runs one program at a time."""
    if life.backend == "triton" or any(world.truths[name].dropout for name in world.adapted):
        return False
    inputs = [life.input().detach() for _ in range(3)]
    switched = [life.rng.choice([None, *world.adapted]) for _ in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(x, name):
        entered = world.layer(name).disabled() if name else contextlib.nullcontext()
        barrier.wait(timeout=60)
        with entered, torch.no_grad():
            for _ in range(3):
                Call(world, x, off={name} - {None}).run()

    with ThreadPoolExecutor(len(inputs)) as pool:
        list(pool.map(work, inputs, switched))


def checkpointed(life, world, reentrant):
    """Forward and backward with a checkpoint, and disabled around one of the two or inside."""
    name = life.rng.choice(world.adapted)
    layer, when = world.layer(name), life.rng.choice(["forward", "backward", "inside", "never"])
    life.note(f"{name} disabled around {when}")
    off = world.off | ({name} if when in ("forward", "inside") else set())
    call = Call(world, life.input(), off=off)

    def inside(x, before):
        with layer.disabled() if when == "inside" else contextlib.nullcontext():
            return world.model(x, before)

    with layer.disabled() if when == "forward" else contextlib.nullcontext():
        call.run(lambda x, before: checkpoint(inside, x, before, use_reentrant=reentrant))

    def run_backward(*pairs):
        with layer.disabled() if when == "backward" else contextlib.nullcontext():
            torch.autograd.backward(*pairs)

    try:
        call.check_gradients(set(NAMES), run_backward)
    finally:
        call.results = None


@action
def reentrant_checkpoint(life, world):
    checkpointed(life, world, True)


@action
def checkpoint_that_is_not_reentrant(life, world):
    """It computes what its forward did, or notices that something differs."""
    try:
        checkpointed(life, world, False)
    except torch.utils.checkpoint.CheckpointError:
        assert "forward" in life.done[-1] or "backward" in life.done[-1]


@action
def changes_inside_a_forward(life, world):
    """Of a copy: what is changed before a layer's turn counts, also where others are done."""
    for _ in range(1 if life.backend == "triton" else 4):
        copied = copy_of_alike_layers(life, world)
        mode = life.choose("no gradients", "gradients", "backward")
        changes = GENTLE if mode == "backward" else QUICK
        call = Call(copied, life.input(mode == "backward"))
        life.worlds.insert(0, copied)

        def then(name, outputs, call=call, copied=copied, changes=changes):
            if outputs and life.rng.random() < 0.5:
                change = life.rng.choice(changes)
                life.note(change.__name__)
                life.inside, life.next = True, name if life.rng.random() < 0.7 else None
                # The seeds of layers with dropout stay those that are expected.
                with torch.random.fork_rng([]):
                    change(life, copied)
                life.inside, life.next, call.off = False, None, copied.off

        try:
            with torch.set_grad_enabled(mode != "no gradients"):
                call.run(then=then)
            if mode == "backward":
                call.check_gradients(life.used())
        finally:
            life.worlds.pop(0)
            copied.leave()


def copy_of_alike_layers(life, world):
    """A copy whose layers have what they must have in common to be computed together."""
    copied = world.copied(copy.deepcopy(world.model))
    pk.unmerge(copied.model)
    for name in copied.adapted:
        layer, truth = copied.layer(name), copied.truths[name]
        truth.unmerge(layer)
        layer.alpha = truth.alpha = 1.0
        layer.dropout = truth.dropout = 0.0
        layer.plan = "factored"
        if truth.doubled:
            add_or_remove_a_hook(life, copied, name)
    return copied


@action
def outputs_changed_in_place(life, world):
    """After the forward or while other layers still wait for theirs."""
    call, later = Call(world, life.input(life.rng.random() < 0.8)), life.rng.random() < 0.5

    def then(name, outputs):
        # Twice the negative, and back before it is compared.
        if outputs and not later:
            outputs[-1].mul_(-2.0).mul_(-0.5)

    call.run(then=then)
    for y in call.results:
        y.mul_(3.0)
    call.check_gradients(life.used(), factor=3.0)


@action
def exception_inside_a_forward(life, world):
    x, at = life.input(), life.rng.choice(NAMES)
    copied = copy_of_alike_layers(life, world)

    def interrupted(own, kind):
        def then(name, outputs):
            if name == at:
                raise kind("inside")

        with pytest.raises(kind, match="inside"):
            Call(own, x).run(then=then)

    interrupted(world, life.rng.choice([RuntimeError, KeyboardInterrupt]))
    interrupted(copied, RuntimeError)
    # What was computed for others is gone: a write that is not counted is seen.
    for name in copied.adapted:
        truth = copied.truths[name]
        truth.B = random_values(truth.B)
        copied.layer(name).pera_B.data.copy_(truth.B)
        check_alone(copied, name, x)


@action
def another_input_for_some_layers(life, world):
    x = life.input(False)
    call = Call(copy_of_alike_layers(life, world), x)
    call.others = {name: torch.randn(x.shape).to(x.dtype) for name in life.rng.sample(NAMES, 3)}
    call.run()


@action
def autocast_around_the_forward(life, world):
    with torch.autocast("cpu", torch.bfloat16):
        call = Call(world, life.input(), dtype=torch.bfloat16).run()
    call.check_gradients(life.used())


@action
def autocast_around_the_backward(life, world):
    """PyTorch's own layers and operators round then; the fast backends do not."""
    call = Call(world, life.input()).run()
    plain = {"called", *(name for name in LAYERS if not world.truths[name].adapted), *world.off}
    plain |= {name for name in world.adapted if world.truths[name].merged is not None}
    plain |= {"again"} if "o_proj" in plain else set()
    used = set(NAMES) - plain if life.backend != "reference" else set()
    with torch.autocast("cpu", torch.bfloat16):
        if used:
            call.check_gradients(used)
        else:
            call.check_gradients(life.used(), precise=torch.bfloat16)


@action
def another_default_dtype(life, world):
    torch.set_default_dtype(life.rng.choice([torch.float64, torch.bfloat16]))
    try:
        call = Call(world, life.input()).run()
        call.check_gradients(life.used())
        life.rng.choice([merge_layer, unmerge_layer, reset_adapter])(life, world)
    finally:
        torch.set_default_dtype(torch.float32)


@action
def another_default_device(life, world):
    def on_meta(x, before):
        with torch.device("meta"):
            return world.model(x, before)

    call = Call(world, life.input()).run(on_meta)
    call.check_gradients(life.used())


@action
def saved_tensors_elsewhere(life, world):
    with torch.autograd.graph.save_on_cpu():
        call = Call(world, life.input()).run()
    call.check_gradients(life.used())


@action
def backward_twice(life, world):
    call = Call(world, life.input()).run()

    def run_backward(*pairs):
        torch.autograd.backward(*pairs, retain_graph=True)
        torch.autograd.backward(*pairs)

    call.check_gradients(life.used(), run_backward, factor=2.0)


@action
def rows_by_vmap(life, world):
    names = [n for n in world.adapted if not world.truths[n].dropout]
    if not names:
        return False
    name, layer, _ = life.pick(names)
    x = torch.randn(3, 2, WIDTH).to(world.dtype)
    if life.backend == "triton" and name in life.adapting():
        with pytest.raises(ValueError, match="torch.func"):
            torch.func.vmap(layer)(x)
        return True
    check_alone(world, name, x, torch.func.vmap(layer))


@action
def weight_that_trains(life, world):
    """Refused where the adapter counts."""
    names = life.adapting("called", "head")
    if not names:
        return False
    _, layer, _ = life.pick(names)
    layer.weight.requires_grad_(True)
    world.refused(ValueError, "must not require grad", lambda: world.model(life.input()))
    layer.weight.requires_grad_(False)


@action
def functional_call(life, world):
    name, _, truth, part = life.pick_part()
    if name == "o_proj":
        # PyTorch leaves the given tensor in a module that stands under two names.
        return False
    values, kept = random_values(getattr(truth, part)), getattr(truth, part)
    setattr(truth, part, values)
    given = {f"{name}.pera_{part}": values}
    Call(world, life.input(False)).run(
        lambda x, before: torch.func.functional_call(world.model, given, (x, before))
    )
    setattr(truth, part, kept)


@action
def forward_mode(life, world):
    """The derivative in one direction of one layer's parameter."""
    names = [n for n in world.adapted if not world.truths[n].dropout + world.truths[n].doubled]
    if not names:
        return False
    name, layer, truth, part = life.pick_part(names)
    x, values = life.input(False), getattr(truth, part)
    tangent = random_values(values, 1.0)
    adapting = name in life.adapting()

    def call(own):
        return torch.func.functional_call(layer, {f"pera_{part}": own}, (x,))

    if life.backend == "triton" and adapting:
        with pytest.raises(ValueError, match="torch.func"):
            torch.func.jvp(call, (values,), (tangent,))
        return False
    if not adapting:
        _, got = torch.func.jvp(call, (values,), (tangent,))
        assert not got.any()
        return False
    found = []
    for change in (lambda t: t, torch.abs):
        tape = Tape(x, change)
        tape.output(name, truth, False, False, None)

        def formula(own, tape=tape):
            tape.leaves[name, part] = values, own
            return tape.output(name, truth, False, False, None)

        pair = change(values.double()), change(tangent.double())
        found.append(torch.func.jvp(formula, pair[:1], pair[1:])[1])
    _, got = torch.func.jvp(call, (values,), (tangent,))
    assert_near("tangent", got, *found, rounding(x.dtype, values.dtype))


@action
def second_backward(life, world):
    """The fast backends refuse it, the reference's plain operators have it."""
    names = [name for name in life.adapting("called") if world.truths[name].trains]
    if not names:
        return False
    _, layer, _ = life.pick(names)
    x = life.input()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    if life.backend == "reference":
        return torch.autograd.grad(dx.square().sum(), x)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.square().sum().backward()


@action
def inputs_that_do_not_fit(life, world):
    if not life.adapting():
        return False
    _, layer, _ = life.pick(life.adapting())
    x = life.input()
    world.refused((ValueError, RuntimeError), ".", lambda: layer(x[..., :-1]))
    other = torch.float64 if x.dtype == torch.float32 else torch.float32
    world.refused((TypeError, RuntimeError), ".", lambda: layer(x.detach().to(other)))


@action
def add_or_remove_a_hook(life, world, name=None):
    names = [n for n in world.adapted if n != "called"] if name is None else [name]
    name, layer, truth = life.pick(names)
    if truth.doubled:
        (key,) = [key for key, hook in layer._forward_hooks.items() if hook is double]
        del layer._forward_hooks[key]
    else:
        layer.register_forward_hook(double)
    truth.doubled = not truth.doubled


@action
def say_what_shares_an_input(life, world):
    groups = [(), [("q_proj", "k_proj", "v_proj")], [("k_proj", "o_proj"), ("q_proj", "v_proj")]]
    pk.shared_inputs(world.model, life.rng.choice([*groups, [LAYERS]]))


# Other models.


@action
def inject_further_layers(life, world):
    plain = [name for name in LAYERS[:-1] if not world.truths[name].adapted]
    options = {"terms": life.rng.choice(TERMS), "r": life.rng.choice([2, 3])}
    options |= {"alpha": life.rng.choice([1.0, 4.0]), "backend": life.backend}
    if world.adapted:
        for wrong in ([world.adapted[0]], ["missing"], ["q_proj", "missing"]):
            world.refused(ValueError, ".", lambda wrong=wrong: pk.inject(world.model, wrong))
        if not plain or life.rng.random() < 0.5:
            return False
        names = life.rng.sample(plain, 1)
    else:
        names = life.rng.sample(plain, 3)
        if life.rng.random() < 0.7:
            names = ["q_proj", "k_proj", "v_proj"]
            options["terms"] = life.rng.choice(["full", "full", "square"])
    pk.inject(world.model, names, modules_to_save=["score"], **options)
    for name in names:
        layer, truth = world.layer(name), world.truths[name]
        truth.adapt(layer)
        layer.train(world.model.training)
        for part in truth.trains:
            values = random_values(getattr(truth, part))
            getattr(layer, f"pera_{part}").data.copy_(values)
            setattr(truth, part, values)


def plain_model(world):
    """A fresh model without adapters that holds each W0, and a head that did not train."""
    model = Model().to(world.dtype)
    for name in LAYERS[:-1]:
        layer, plain = getattr(model, name), world.truths[name].plain()
        with torch.no_grad():
            layer.weight.copy_(plain.weight)
            if layer.bias is not None:
                layer.bias.copy_(plain.bias)
    return model


def fresh_world(world, model):
    """What is true of a fresh model that has got the adapters of ``world``."""
    truths = {name: world.truths[name].fresh(getattr(model, name)) for name in LAYERS}
    return World(model, truths)


@action
def copy_of_the_model(life, world):
    way = life.choose("deepcopy", "pickle", "save")
    if way == "deepcopy":
        model = copy.deepcopy(world.model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(world.model))
    else:
        file = io.BytesIO()
        torch.save(world.model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    life.goes_on_as(world.copied(model))


@action
def back_to_the_other_model(life, world):
    life.worlds.reverse()


@action
def state_dict(life, world):
    """Into a fresh model of the same layers."""
    merged = any(world.truths[name].merged is not None for name in world.adapted)
    with expected_warning("of a merged PeraLinear", merged):
        saved = world.model.state_dict()
    model = Model().to(world.dtype)
    for name in world.adapted:
        truth = world.truths[name]
        own = {"terms": truth.terms, "alpha": truth.alpha, "backend": life.backend}
        pk.inject(model, [name], truth.A.shape[0], modules_to_save=["score"], **own)
    model.load_state_dict(saved)
    for name, truth in world.truths.items():
        key = "called.base_layer.weight" if name == "called" and truth.adapted else f"{name}.weight"
        magnitude = truth.base().abs()
        if truth.added is not None:
            magnitude = truth.merged.double().abs() + truth.added_magnitude
        assert_near(key, saved[key], truth.base(), magnitude, rounding(truth.weight.dtype))
        for part in PARTS if truth.adapted and truth.added is None else ():
            if (tensor := getattr(truth, part)) is not None:
                assert torch.equal(saved[f"{name}.pera_{part}"], tensor)
    life.goes_on_as(fresh_world(world, model))
    for name, truth in life.world.truths.items():
        plain = getattr(model, name)
        plain = plain.base_layer if hasattr(plain, "base_layer") else plain
        assert_near(name, plain.weight, truth.base(), truth.base().abs() + 1.0, 1e-2)
        truth.weight = plain.weight.detach().clone()


@action
def load_state_dict(life, world):
    """Its own, also into merged layers: they are unmerged."""
    merged = any(world.truths[name].merged is not None for name in world.adapted)
    with expected_warning("of a merged PeraLinear", merged):
        saved = copy.deepcopy(world.model.state_dict())
    world.model.load_state_dict(saved)
    for name in world.adapted:
        assert not world.layer(name).merged
        world.truths[name].unmerge(world.layer(name))


@action
def save_and_load_adapter(life, world):
    """Into a plain model with the same W0."""
    pk.save_adapter(world.model, life.folder)
    model = plain_model(world)
    pk.load_adapter(model, life.folder, backend=life.backend)
    assert set(pk.adapted_modules(model)) == set(world.adapted)
    fresh = fresh_world(world, model)
    for name in world.adapted:
        fresh.truths[name].dropout = world.truths[name].dropout
    life.goes_on_as(fresh)


@action
def load_adapter_over_another(life, world):
    """Into this model, which holds other values by now."""
    pk.save_adapter(world.model, life.folder)
    saved = copy.deepcopy(world.truths)
    for _ in range(3):
        write_a_parameter(life, world)
    change_alpha(life, world)
    if any(world.truths[name].B.any() for name in world.adapted):
        call = lambda: pk.load_adapter(world.model, life.folder)  # noqa: E731
        world.refused(ValueError, "hold something already", call)
    found = pk.load_adapter(world.model, life.folder, overwrite=True)
    assert found == ([], [])
    for name in world.adapted:
        truth = world.truths[name]
        truth.unmerge(world.layer(name))
        for part in (*PARTS, "alpha"):
            setattr(truth, part, getattr(saved[name], part))


@action
def adapter_state_dict(life, world):
    saved = pk.adapter_state_dict(world.model)
    expected = {
        f"{name}.pera_{part}": tensor
        for name in world.adapted
        for part in PARTS
        if (tensor := getattr(world.truths[name], part)) is not None
    }
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


@action
def unload(life, world):
    """A copy becomes a plain model, with the updates in its weights or as it was before."""
    merge = life.rng.random() < 0.5
    life.note(f"{merge=}")
    copied = world.copied(copy.deepcopy(world.model))
    if merge and {"called", "head"} & set(world.adapted):
        errors = (TypeError, ValueError)
        copied.refused(errors, "plain nn.Linear|shared", lambda: pk.unload(copied.model))
        return False
    pk.unload(copied.model, merge=merge)
    assert not pk.adapted_modules(copied.model)
    assert copied.model.again is copied.model.o_proj
    assert copied.model.head.weight is copied.model.embed.weight
    for truth in copied.truths.values():
        truth.doubled, truth.dropout = False, 0.0
    off = set() if merge else set(copied.adapted)
    Call(copied, life.input(False), off=off).run()


@action
def convert(life, world):
    """To another dtype, in place or with new parameters in the place of the old."""
    dtype, swap = life.choose(*life.dtypes), life.choose(False, True)
    # PyTorch swaps no tensor that a graph still holds.
    gc.collect()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        world.model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for truth in world.truths.values():
        truth.convert(dtype)


@action
def without_values(life, world):
    """On the meta device a copy has shapes alone."""
    model = copy.deepcopy(world.model).to("meta")
    x = life.input()
    outputs = model(x.detach().to("meta"))
    for y, expected in zip(outputs, world.model(x), strict=True):
        assert y.is_meta and y.shape == expected.shape and y.dtype == expected.dtype
    pk.unmerge(model)


@action
def computed_weight(life, world):
    """A copy whose weight is computed from others: the same outputs, and it is not merged into."""
    copied = world.copied(copy.deepcopy(world.model))
    names = [n for n in world.mergeable if world.truths[n].merged is None]
    if not names:
        return False
    name = life.rng.choice(names)
    layer = copied.layer(name)
    weight_norm(layer)
    layer.parametrizations.weight.requires_grad_(False)
    copied.refused(TypeError, "computed", layer.merge)
    Call(copied, life.input(False), off=set()).run()


# What changes a layer at once: some come before each action of the table, and inside a forward,
# where the gentle ones leave what was computed a backward.
GENTLE = [change_alpha, change_dropout, train_or_evaluate, disable, enable, add_or_remove_a_hook]
QUICK = [*GENTLE, merge_layer, merge_layer, unmerge_layer, write_a_parameter, freeze_a_factor]

# After any other, an optimizer holds the parameters that it held.
REPLACING = ("write_a_parameter", "load_adapter_over_another")


def live(seed, backend, steps, folder):
    """One life; returns how often each action was taken."""
    life = Life(seed, backend, folder)
    counts, deck = collections.Counter(), []
    try:
        for _ in range(steps):
            deck = deck or life.rng.sample(sorted(ACTIONS), len(ACTIONS))
            quick = life.rng.sample(QUICK, life.rng.choice([0, 1, 2]))
            for name in (*(change.__name__ for change in quick), deck.pop()):
                life.done.append(name)
                world, held = life.world, {id(p) for p in life.world.model.parameters()}
                counts[name] += ACTIONS[name](life, world) is not False
                if name not in REPLACING:
                    assert held <= {id(p) for p in world.model.parameters()}
                life.compare()
        for world in life.worlds:
            world.leave()
            Call(world, life.input(dtype=world.dtype)).run().check_gradients(set(NAMES))
    except BaseException as error:
        lines = "\n  ".join([f"{type(error).__name__}: {error}", *life.done])
        raise AssertionError(f"live({seed}, {backend!r}, {steps}, folder): {lines}") from error
    finally:
        for world in life.worlds:
            world.leave()
    return counts


def run_lives(backend, seeds, steps, folder):
    counts = collections.Counter()
    for seed in seeds:
        counts += live(seed, backend, steps, folder)
    return counts


@pytest.mark.parametrize(
    "backend, lives, steps", [("torch", 6, 36), ("reference", 4, 36), ("triton", 2, 7)]
)
def test_every_layer_computes_what_is_true_after_every_action(
    backend, lives, steps, tmp_path, together
):
    """The same lives each time; they take every action."""
    if backend == "triton" and (reason := unavailable(backend, torch.device("cpu"))):
        pytest.skip(reason)
    counts = run_lives(backend, range(lives), steps, tmp_path)
    if backend != "triton":
        assert not ACTIONS.keys() - counts.keys()
    assert (backend == "reference") == (3 not in together)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, lives, steps", [("torch", 600, 60), ("reference", 300, 60), ("triton", 40, 40)]
)
def test_many_lives(backend, lives, steps, tmp_path):
    """New ones each time."""
    if backend == "triton" and (reason := unavailable(backend, torch.device("cpu"))):
        pytest.skip(reason)
    first = random.SystemRandom().randrange(1000, 2**30)
    run_lives(backend, range(first, first + lives), steps, tmp_path)
