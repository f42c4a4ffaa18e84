"""Projections that share one input: which they are, and how they are evaluated together.

Which they are is proved from the source of the parent's ``forward``. Whether a call really brings
the same tensor is checked at every call, by identity and version, so that a wrong proof could cost
time but never a wrong result.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import functional
from .module import PeraLinear

__all__ = ["InputGroup", "group_projections", "shared_inputs"]


class _Call:
    """``self.<name>(<argument>)`` in statement number ``statement`` of a block of a function."""

    def __init__(self, name: str, argument: str, block: int, statement: int) -> None:
        self.name, self.argument = name, argument
        self.block, self.statement = block, statement


# What is evaluated perhaps, later, or more than once.
_UNSURE = (
    ast.IfExp,
    ast.BoolOp,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
)


def _blocks(body: Sequence[ast.stmt]) -> Iterator[Sequence[ast.stmt]]:
    """A list of statements and every list nested in it; not those of inner functions."""
    yield body
    for statement in body:
        if isinstance(statement, _UNSURE):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _blocks(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from _blocks(handler.body)


def _walk(node: ast.AST, blocks: bool) -> Iterator[ast.AST]:
    """The nodes under a statement that are surely evaluated once; with ``blocks``, all of them."""
    yield node
    for name, value in ast.iter_fields(node):
        if not blocks and (
            isinstance(node, _UNSURE) or name in ("body", "orelse", "finalbody", "handlers")
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, blocks)


def _called(node: ast.AST, receiver: str) -> tuple[str, str] | None:
    """(name, argument) of a call ``receiver.name(argument)`` of one plain variable."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == receiver
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Name)
        and not node.keywords
    ):
        return node.func.attr, node.args[0].id
    return None


def _rebinds(statement: ast.stmt, variable: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == variable and not isinstance(node.ctx, ast.Load)
        for node in _walk(statement, blocks=True)
    )


def _forward_source(module: nn.Module) -> ast.FunctionDef | None:
    """The syntax tree of the module's ``forward``; None where there is none, or it is replaced."""
    if "forward" in module.__dict__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, ast.FunctionDef) and found.args.args else None


def shared_inputs(module: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Those children among ``names`` that ``module.forward`` surely calls on the same variable.

    They are called as ``self.name(variable)`` once each, in one block of statements, and the
    variable is not assigned between the first call and the last.
    """
    function = _forward_source(module)
    if function is None:
        return []
    receiver = function.args.args[0].arg
    mentions: defaultdict[str, int] = defaultdict(int)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            mentions[node.attr] += node.value.id == receiver
    calls: defaultdict[tuple[int, str], list[_Call]] = defaultdict(list)
    blocks = list(_blocks(function.body))
    for number, block in enumerate(blocks):
        for position, statement in enumerate(block):
            for node in _walk(statement, blocks=False):
                called = _called(node, receiver)
                if called and called[0] in names and mentions[called[0]] == 1:
                    calls[number, called[1]].append(_Call(*called, number, position))
    groups = []
    for (number, variable), own in calls.items():
        between = blocks[number][own[0].statement : own[-1].statement]
        if len(own) > 1 and not any(_rebinds(statement, variable) for statement in between):
            groups.append([call.name for call in own])
    return groups


class _Waiting:
    """Outputs that are computed and not yet asked for, by name, and the call they belong to."""

    def __init__(
        self, outputs: dict[str, torch.Tensor], of: torch.Tensor, key: tuple[Any, ...]
    ) -> None:
        self.outputs, self.key = outputs, key
        self.of = weakref.ref(of, self.forget)
        node = next(iter(outputs.values())).grad_fn
        if node is not None:
            # A backward, in whatever thread, frees what all of them share. The hook must not keep
            # them: they hold the node that holds the hook.
            own = weakref.ref(self)

            def forget(_: Any) -> None:
                if (waiting := own()) is not None:
                    waiting.forget()

            node.register_prehook(forget)

    def forget(self, _: Any = None) -> None:
        self.outputs.clear()

    def take(self, name: str, x: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor | None:
        return self.outputs.pop(name, None) if self.of() is x and self.key == key else None


class _PerThread(threading.local):
    waiting: _Waiting | None = None


class InputGroup:
    """Children of one module that are called on the same tensor: the first call computes all.

    The outputs of the others wait, by thread, until they are asked for with that very tensor,
    unchanged, by unchanged layers, under the same autograd and autocast modes, or until a backward
    or the end of the tensor.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self._parent = weakref.ref(parent)
        self.names = tuple(names)
        self._own = _PerThread()

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup | None:
        """The copy's own group, where the parent is copied as well."""
        parent = memo.get(id(self._parent()))
        return InputGroup(parent, self.names) if isinstance(parent, nn.Module) else None

    def __reduce__(self) -> Any:
        """Groups are not pickled: see :func:`group_projections`."""
        return _no_group, ()

    def output_of(self, layer: PeraLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output of one of the layers; None where they cannot be computed together now."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        layers = self._layers()
        if layers is None or not any(own is layer for own in layers.values()):
            return None
        name = next(name for name, own in layers.items() if own is layer)
        tensors = [
            (own.weight, own.bias, own.pera_A, own.pera_B, own.pera_h) for own in layers.values()
        ]
        device_type = x.device.type
        key = (
            x._version,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
            _kind(layer),
            *(
                (id(t), t._version, t.requires_grad)
                for own in tensors
                for t in own
                if t is not None
            ),
        )
        if self._own.waiting is not None:
            y = self._own.waiting.take(name, x, key)
            if y is not None:
                return y
        self._own.waiting = None
        outputs = functional.linear_group(
            x,
            tensors,
            layer.scale,
            layer.terms,
            layer.dropout if layer.training else 0.0,
            layer.backend,
        )
        waiting = dict(zip(layers, outputs, strict=True))
        y = waiting.pop(name)
        if waiting:
            self._own.waiting = _Waiting(waiting, x, key)
        return y

    def _layers(self) -> dict[str, PeraLinear] | None:
        """The layers by name, if all of them compute their adapters in the same way now."""
        parent = self._parent()
        if parent is None:
            return None
        layers = {}
        for name in self.names:
            layer = parent._modules.get(name)
            if type(layer) is not PeraLinear or not _plain(layer):
                return None
            layers[name] = layer
        kinds = {_kind(layer) for layer in layers.values()}
        return layers if len(kinds) == 1 else None


def _no_group() -> None:
    return None


def _plain(layer: PeraLinear) -> bool:
    """Its forward is its own, unobserved, and adds its adapter."""
    return not (
        layer.merged
        or layer._disabled_depth
        or layer.backend == "reference"
        or layer.plan == "composed"
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
    )


def _kind(layer: PeraLinear) -> tuple[Any, ...]:
    """What layers of a group have in common."""
    return (
        layer.r,
        layer.terms,
        layer.scale,
        layer.dropout,
        layer.backend,
        layer.plan,
        layer.training,
        layer.in_features,
        layer.pera_A.dtype,
        layer.pera_A.device,
        layer.weight.dtype,
    )


def group_projections(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Evaluate adapted projections that share an input together, where that can be proved.

    For every module of ``model``, adapted children that its ``forward`` surely calls on the same
    variable (``q_proj``, ``k_proj``, ``v_proj``; ``gate_proj``, ``up_proj``) become a group: x is
    read once in the forward and once in the backward, and their gradients of x are accumulated in
    one tensor. With dropout they share one mask. ``inject`` calls this; call it again after
    unpickling a model. Under ``torch.compile`` every layer computes for itself.

    Returns:
        The groups, children's names by the name of their parent.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        kinds = defaultdict(list)
        for name, child in module.named_children():
            if type(child) is PeraLinear:
                child._group = None
                kinds[_kind(child)].append(name)
        for names in kinds.values():
            for together in shared_inputs(module, names) if len(names) > 1 else []:
                group = InputGroup(module, together)
                for name in together:
                    module._modules[name]._group = group
                found[path] = (*found.get(path, ()), *together)
    return found
