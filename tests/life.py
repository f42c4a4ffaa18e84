"""A small model that lives through many changes, and what each of its layers has to compute.

``Truth`` knows of one layer what was done to it and evaluates the paper's formula in float64; it
never looks at how the package keeps its state. ``test_module_life.py`` does things to both.
"""

import contextlib
import copy
import warnings
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.dropout import draw_seed

WIDTH = 8
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "again", "called", "head", "score")
LAYERS = tuple(name for name in NAMES if name != "again")
PARTS = ("A", "B", "h")


def add_one(module, inputs, output):
    return output + 1.0


def double(module, inputs, output):
    return output * 2.0


class Model(nn.Module):
    """Every layer is called on the same x; ``before`` is told which one is next, and may return
    another x for it.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, WIDTH)
        self.q_proj = nn.Linear(WIDTH, 10)
        self.k_proj = nn.Linear(WIDTH, 4, bias=False)
        self.v_proj = nn.Linear(WIDTH, 4)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.again = self.o_proj
        self.called = nn.Linear(WIDTH, 5)
        self.called.register_forward_hook(add_one)
        self.head = nn.Linear(WIDTH, 6, bias=False)
        self.head.weight = self.embed.weight
        self.score = nn.Linear(WIDTH, 3)

    def forward(self, x, before=None):
        outputs = []
        for name in NAMES:
            other = None if before is None else before(name, outputs)
            outputs.append(getattr(self, name)(x if other is None else other))
        return tuple(outputs)


def random_values(like, size=0.4):
    return (torch.randn(like.shape, dtype=torch.float64) * size).to(like.dtype)


def rounding(*dtypes):
    """How much an output may be off, as a share of the sum of the absolute values of its terms."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 12 * eps + 64 * min(eps, torch.finfo(torch.float32).eps)


def assert_near(what, got, expected, magnitude, allowed):
    assert got.shape == expected.shape, f"{what}: shape {got.shape} for {expected.shape}"
    error = (got.detach().double() - expected.detach()).abs()
    wrong = ~(error <= allowed * magnitude.detach() + 1e-30)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values are wrong, by up to "
        f"{float((error / magnitude.detach()).max()):.1e} of what is summed"
    )


@dataclass
class Truth:
    """What one layer has to compute. Tensors are copies with the values that the layer holds."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shift: float = 0.0
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    h: torch.Tensor | None = None
    alpha: float = 1.0
    terms: str = "full"
    dropout: float = 0.0
    trains: set[str] = field(default_factory=set)
    # While merged: the weight that is used, and what unmerging takes away if W0 is not kept.
    merged: torch.Tensor | None = None
    added: torch.Tensor | None = None
    added_magnitude: torch.Tensor | None = None
    doubled: bool = False

    @property
    def adapted(self):
        return self.A is not None

    def adapt(self, layer):
        """Take over a new adapter."""
        assert not layer.pera_B.any() and (layer.pera_h is None or not layer.pera_h.any())
        self.alpha, self.terms, self.dropout = layer.alpha, layer.terms, layer.dropout
        self.trains = {part for part in PARTS if getattr(layer, f"pera_{part}") is not None}
        self.read(layer)

    def read(self, layer):
        """Take over the values of A, B and h."""
        for part in PARTS:
            tensor = getattr(layer, f"pera_{part}")
            setattr(self, part, None if tensor is None else tensor.detach().clone())

    def base(self):
        """W0 in float64."""
        return self.weight.double() if self.added is None else self.merged.double() - self.added

    def delta(self, change=lambda t: t):
        factors = [None if t is None else change(t.double()) for t in (self.A, self.B, self.h)]
        scale = self.alpha / self.A.shape[0]
        return pk.reference.delta_weight(*factors, scale=scale, terms=self.terms)

    def merge(self, layer, keep_base):
        """Check the sum that the layer has formed, and take over its bits."""
        sizes = self.delta(torch.abs)
        allowed = rounding(self.weight.dtype, self.A.dtype)
        magnitude = self.base().abs() + sizes
        assert_near("merged", layer.weight, self.base() + self.delta(), magnitude, allowed)
        self.merged = layer.weight.detach().clone()
        if not keep_base:
            self.added, self.added_magnitude = self.delta(), sizes

    def unmerge(self, layer):
        if self.merged is None:
            assert torch.equal(layer.weight, self.weight)
            return
        if self.added is None:
            assert torch.equal(layer.weight, self.weight), "W0 has not its bits again"
        else:
            magnitude = self.merged.double().abs() + self.added_magnitude
            allowed = rounding(self.merged.dtype)
            assert_near("unmerged", layer.weight, self.base(), magnitude, allowed)
            self.weight = layer.weight.detach().clone()
        self.merged = self.added = self.added_magnitude = None

    def convert(self, dtype):
        for name in ("weight", "bias", "A", "B", "h", "merged"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(dtype))

    def plain(self):
        """The layer without its adapter, as a checkpoint of the base model has it."""
        base = self.base().to(self.weight.dtype)
        return Truth(base, self.bias, self.shift, trains=self.trains - set(PARTS))

    def fresh(self, layer):
        """A layer of its own with the same W0 and adapter, whose dtypes are ``layer``'s."""
        own = replace(self.plain(), alpha=self.alpha, terms=self.terms)
        for part in PARTS if self.adapted else ():
            tensor, there = getattr(self, part), getattr(layer, f"pera_{part}")
            setattr(own, part, None if tensor is None else tensor.to(there.dtype))
            own.trains |= set() if tensor is None else {part}
        return own


class Tape:
    """The formula of every layer on one x in float64, or with all its terms positive."""

    def __init__(self, x, change=lambda t: t):
        self.change, self.leaves = change, {}
        self.x = change(x.detach().double()).requires_grad_()

    def leaf(self, name, part, tensor):
        if tensor is None:
            return None
        known, leaf = self.leaves.get((name, part), (None, None))
        if known is not tensor:
            leaf = self.change(tensor.detach().double()).requires_grad_()
            self.leaves[name, part] = tensor, leaf
        return leaf

    def output(self, name, truth, off, training, seed):
        """y of one layer: disabled, merged, plain or adapted."""
        positive = self.change is torch.abs
        kept = truth.weight if truth.added is None else truth.base()
        weight, bias = self.leaf(name, "weight", kept), self.leaf(name, "bias", truth.bias)
        if positive and truth.added is not None:
            weight = truth.merged.double().abs() + truth.added_magnitude
        adapted = truth.adapted and not off
        if adapted and truth.merged is not None:
            weight, adapted = self.change(truth.merged.double()), False
        y = nn.functional.linear(self.x, weight, bias) + truth.shift
        if adapted:
            A, B, h = (self.leaf(name, part, getattr(truth, part)) for part in PARTS)
            y = y + pk.reference.update(
                self.x,
                *(A, B, h),
                scale=truth.alpha / A.shape[0],
                terms=truth.terms,
                dropout_p=truth.dropout if training else 0.0,
                seed=seed,
            )
        return y * 2.0 if truth.doubled else y


class World:
    """A model, what is true of it, and which of its layers this thread has disabled."""

    def __init__(self, model, truths):
        self.model, self.truths = model, truths
        self.disabled = {name: [] for name in LAYERS}

    def layer(self, name):
        return getattr(self.model, name)

    @property
    def adapted(self):
        return [name for name in LAYERS if self.truths[name].adapted]

    @property
    def mergeable(self):
        return [name for name in self.adapted if name not in ("called", "head")]

    @property
    def off(self):
        return {name for name, entered in self.disabled.items() if entered}

    @property
    def dtype(self):
        return self.truths["q_proj"].weight.dtype

    def copied(self, model):
        """The world of a copy: in the same state but for what is disabled."""
        return World(model, copy.deepcopy(self.truths))

    def leave(self):
        for entered in self.disabled.values():
            while entered:
                entered.pop().__exit__(None, None, None)

    def state(self):
        """Everything that an action that is refused must leave alone."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        kinds, flags = [], ("merged", "alpha", "dropout", "plan", "backend", "training")
        for name, module in self.model.named_modules(remove_duplicate=False):
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            kinds.append((name, id(module), hooks, [getattr(module, f, None) for f in flags]))
        kept = {
            n: (id(t), t.requires_grad, t.dtype, t.detach().clone()) for n, t in tensors.items()
        }
        return kept, kinds

    def refused(self, errors, match, call):
        """``call`` raises, and nothing has changed."""
        tensors, kinds = self.state()
        with pytest.raises(errors, match=match):
            call()
        after, kinds_after = self.state()
        assert kinds_after == kinds and after.keys() == tensors.keys()
        for name, (*what, values) in tensors.items():
            *what_after, values_after = after[name]
            assert what_after == what and torch.equal(values_after, values), name


class Call:
    """One forward of a world's model: what each layer gives, beside what it has to give.

    What is true is looked up where the model calls the layer, so that it may change in between.
    """

    def __init__(self, world, x, off=None, dtype=None):
        self.world, self.x = world, x
        self.off = world.off if off is None else off
        self.dtype = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        self.tapes = Tape(x), Tape(x, torch.abs)
        # Layers that get another x.
        self.others = {}
        self.expected = {}
        self.seeds = None

    def run(self, call=None, then=lambda name, outputs: None):
        """Call the model and compare every output; ``then`` happens before each of its layers."""
        # The seeds that layers with dropout will draw, one after the other.
        start = torch.random.get_rng_state()
        self.seeds = [draw_seed(torch.device("cpu")) for _ in NAMES]
        torch.random.set_rng_state(start)

        def before(name, outputs):
            # A checkpoint calls again, with what is true then.
            if name not in self.expected:
                then(name, outputs)
                self.expected[name] = self.outputs(name)
            return self.others.get(name)

        self.results = (call or self.world.model)(self.x, before)
        assert list(self.expected) == list(NAMES)
        self.check_outputs()
        return self

    def outputs(self, name):
        own = "o_proj" if name == "again" else name
        truth, training = self.world.truths[own], self.world.layer(own).training
        off = own in self.off
        draws = truth.adapted and not off and truth.merged is None and training and truth.dropout
        seed = self.seeds.pop(0) if draws else None
        # Whoever counts what the model's layers save must not see what is saved here.
        unseen = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), unseen:
            x = self.others.get(name)
            tapes = self.tapes if x is None else (Tape(x), Tape(x, torch.abs))
            return [tape.output(own, truth, off, training, seed) for tape in tapes]

    def check_outputs(self):
        for name, y in zip(NAMES, self.results, strict=True):
            assert y.dtype == self.dtype, f"{name}: {y.dtype} for {self.dtype}"
            adapter = self.world.truths["o_proj" if name == "again" else name].A
            dtypes = [self.dtype, self.x.dtype, *([] if adapter is None else [adapter.dtype])]
            assert_near(f"y of {name}", y, *self.expected[name], rounding(*dtypes))

    def check_gradients(self, used, run_backward=torch.autograd.backward, factor=1.0, precise=None):
        """Backward of the outputs ``used``, compared with that of the formula; None for the rest.

        ``factor`` is what the outputs were multiplied by since they were compared.
        """
        parameters = {(None, "x"): self.x} if self.x.requires_grad else {}
        for name in LAYERS:
            for part in self.world.truths[name].trains:
                own = f"pera_{part}" if part in PARTS else part
                parameters[name, part] = getattr(self.world.layer(name), own)
        for tensor in (self.x, *self.world.model.parameters()):
            tensor.grad = None
        outputs = [y for name, y in zip(NAMES, self.results, strict=True) if name in used]
        dys = [random_values(y, 1.0) for y in outputs]
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
        if pairs:
            run_backward(*zip(*pairs, strict=True))
        truths, sizes = (
            self.gradients(n, used, parameters, dys, factor) for n in range(len(self.tapes))
        )
        for (name, part), p in parameters.items():
            what, truth = f"gradient of {part} of {name}", truths[name, part]
            assert (p.grad is None) == (truth is None), f"{what}: {p.grad} for {truth}"
            if truth is not None:
                assert p.grad.dtype == p.dtype, what
                allowed = rounding(precise or self.dtype, p.dtype)
                assert_near(what, p.grad, truth, sizes[name, part], allowed)
        rest = {id(p) for p in parameters.values()}
        for name, p in self.world.model.named_parameters():
            assert id(p) in rest or p.grad is None, f"{name} is frozen and has a gradient"
        # A checkpoint's graph holds what calls this: together they would live for good.
        self.results = None

    def gradients(self, n, used, parameters, dys, factor):
        """Of the formula, or with all terms positive, by what they are of; None where not used."""
        tape = self.tapes[n]
        leaves = {key: tape.leaves.get(key, (None, None))[1] for key in parameters}
        leaves |= {(None, "x"): tape.x}
        present = {key: leaf for key, leaf in leaves.items() if leaf is not None}
        ys = [self.expected[name][n] * factor for name in NAMES if name in used]
        dys = [tape.change(dy.double()) for dy in dys]
        with torch.enable_grad():
            found = torch.autograd.grad(ys, list(present.values()), dys, allow_unused=True)
        return dict.fromkeys(leaves) | dict(zip(present, found, strict=True))


def check_alone(world, name, x, call=None):
    """One layer that is called by itself, without dropout."""
    truth, off = world.truths[name], name in world.off
    expected = [
        tape.output(name, truth, off, False, None) for tape in (Tape(x), Tape(x, torch.abs))
    ]
    y = (call or world.layer(name))(x)
    assert_near(f"y of {name} alone", y, *expected, rounding(x.dtype, truth.A.dtype))


@contextlib.contextmanager
def expected_warning(match, when=True):
    """A warning that says ``match``, exactly where there must be one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught]
    assert any(match in text for text in said) == bool(when), said
