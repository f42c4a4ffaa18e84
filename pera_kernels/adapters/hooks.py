"""Hooks of this package on modules of others: they survive copies and pickles, and can be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["OwnHook", "remove_all_hooks", "remove_hooks"]

HookT = TypeVar("HookT", bound="OwnHook")


class OwnHook:
    """A forward hook, or the object whose methods are forward hooks."""

    last_hook = 0

    def register(self, where: Callable[..., RemovableHandle], *hook: Any, **options: Any) -> None:
        """Call ``where``, which is ``module.register_forward_hook`` or the like, with ``hook``, by
        default this object itself.
        """
        self.last_hook = where(*(hook or (self,)), **options).id

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # In another process hooks are numbered from 0: a new one must not take the place of ours.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.last_hook + 1)

    def removed(self, module: nn.Module) -> None:
        """What else is undone on the module."""


def remove_hooks(module: nn.Module, kind: type[HookT]) -> list[HookT]:
    """Take the hooks of a kind off a module; returns them."""
    found: dict[int, HookT] = {}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            own = getattr(hook, "__self__", hook)
            if isinstance(own, kind):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                found[id(own)] = own
    for own in found.values():
        own.removed(module)
    return list(found.values())


def remove_all_hooks(model: nn.Module) -> None:
    """Take every hook of this package off a model and its parts."""
    for module in model.modules():
        remove_hooks(module, OwnHook)
