"""Layers whose weight is read by code that does not call them: it would leave the adapter out."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..checks import some
from .hooks import OwnHook, remove_hooks

__all__ = ["FirstForward", "SlowPath", "refuse_read_weights", "watch"]

# Modules that read the weights of their linear layers in evaluation only, and not where a hook is
# registered.
FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)

# What may be asked of a weight without computing with it, and functions that ask for no more.
DESCRIPTIONS = {
    *("dtype", "device", "shape", "size", "ndim", "dim", "is_cuda", "is_meta", "requires_grad"),
    *("is_contiguous", "stride", "grad", "is_quantized", "element_size", "nbytes", "device_mesh"),
    *("new_empty", "new_zeros", "new_ones", "new_tensor", "new_full", "data_ptr", "numel"),
}
DESCRIBING = {
    *("isinstance", "is_tensor", "hasattr", "type", "len"),
    *("to", "type_as", "zeros_like", "empty_like"),
}


def refuse_read_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise for a layer that a module around it never calls and whose weight its forward reads;
    warn for one that it calls as well.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    never: list[str] = []
    sometimes: list[str] = []
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            around = modules[".".join(parts[:depth])]
            reads, calls = _forward_of(around)
            path = ".".join(parts[depth:])
            if path in reads:
                told = f"{name} (by {type(around).__name__})"
                (sometimes if path in calls else never).append(told)
    if never:
        raise ValueError(
            f"the weight is read without calling the layer, so that an adapter would be left out: "
            f"{', '.join(never)}; leave it out of target_modules"
        )
    if sometimes:
        warnings.warn(
            "on some paths the weight is read without calling the layer, and the adapter is left "
            f"out there: {', '.join(sometimes)}",
            stacklevel=4,
        )


def _forward_of(module: nn.Module) -> tuple[set[str], set[str]]:
    """Paths of children whose ``weight`` the module's forward, or a method it calls, reads; and
    paths of what it calls.
    """
    reads: set[str] = set()
    calls: set[str] = set()
    waiting = ["forward"]
    while waiting:
        for place, method in _definitions(module, waiting.pop()):
            own_reads, own_calls, goes_on = _read(method)
            waiting += own_calls - calls
            # These are kept off the path on which they read: see SlowPath.
            reads |= own_reads if place not in FAST_PATHS else frozenset()
            calls |= own_calls
            if not goes_on:
                break
    return reads, calls


def _definitions(module: nn.Module, name: str) -> Iterator[tuple[object, FunctionType]]:
    """The functions that a method of a module may run, its own and those that it overrides, and
    where each stands.
    """
    for place in (module, *type(module).__mro__):
        if place in (nn.Module, object):
            return
        method = inspect.unwrap(place.__dict__.get(name))  # type: ignore[arg-type]
        method = getattr(method, "__func__", method)
        if isinstance(method, FunctionType):
            yield place, method


@functools.lru_cache(maxsize=4096)
def _read(function: FunctionType) -> tuple[frozenset[str], frozenset[str], bool]:
    """Of a method's source: paths P with ``self.P.weight`` where more is asked for than its
    description; paths of ``self`` that are called or handed on; whether it calls what it overrides.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # There is no source. What is read then is noticed in the first forward.
        return frozenset(), frozenset(), True
    nodes = list(ast.walk(tree))
    described: set[ast.AST] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in DESCRIPTIONS:
            described.add(node.value)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            described.add(node.left)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in DESCRIBING:
                described.update(node.args)
    reads = {
        path
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in described
        if isinstance(node.ctx, ast.Load) and (path := _path(node.value)) is not None
    }
    # What is handed on, as by ``checkpoint(self.fc, x)``, may be called as by ``self.fc(x)``.
    inner = {
        node.value
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr not in ("forward", "__call__")
    }
    calls = {
        path
        for node in nodes
        if isinstance(node, ast.Attribute) and node not in inner
        if isinstance(node.ctx, ast.Load) and (path := _path(node)) is not None
    }
    goes_on = any(isinstance(node, ast.Name) and node.id == "super" for node in nodes)
    return frozenset(reads), frozenset(calls), goes_on


def _path(node: ast.expr) -> str | None:
    """``a.b`` for the expression ``self.a.b``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if parts and isinstance(node, ast.Name) and node.id == "self" else None


class SlowPath(OwnHook):
    """On a module of ``FAST_PATHS``: where it has a hook it calls its layers."""

    def __init__(self, module: nn.Module) -> None:
        # An encoder gives its layers nested tensors on that path.
        self.use_nested_tensor = getattr(module, "use_nested_tensor", None)
        if self.use_nested_tensor:
            module.use_nested_tensor = False  # type: ignore[assignment]
        self.register(module.register_forward_pre_hook)

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Its presence is enough."""

    def removed(self, module: nn.Module) -> None:
        if self.use_nested_tensor:
            module.use_nested_tensor = self.use_nested_tensor


class FirstForward(OwnHook):
    """On a model with new adapters: after its first whole forward it says which were not called."""

    def __init__(self, model: nn.Module) -> None:
        self.register(model.register_forward_hook)

    def __call__(self, model: nn.Module, _: Any, __: Any) -> None:
        if torch.compiler.is_compiling():
            return
        remove_hooks(model, FirstForward)
        # What is compiled does not note its calls.
        compiled = {
            inner
            for module in model.modules()
            if getattr(module, "_compiled_call_impl", None) or "_orig_mod" in module._modules
            for inner in module.modules()
        }
        names = [
            name
            for name, module in model.named_modules()
            if getattr(module, "was_called", True) is False and module not in compiled
        ]
        if names:
            warnings.warn(
                f"{len(names)} adapted layers were not called in the first forward of "
                f"{type(model).__name__}: {some(names)}. Code "
                "that reads the weight of a layer without calling it leaves the adapter out, and "
                "the adapter does not train. (An expert that got no token is called later.)",
                stacklevel=2,
            )


def watch(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Keep the modules around ``layers`` on paths that call them, and look at the model's first
    forward.
    """
    inside = set(layers)
    for module in model.modules():
        if isinstance(module, FAST_PATHS) and not inside.isdisjoint(module.modules()):
            remove_hooks(module, SlowPath)
            SlowPath(module)
    remove_hooks(model, FirstForward)
    FirstForward(model)
