"""A deep copy of a module that is taken while hooks of ours are on its parts carries none of them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

#: Where torch keeps hooks that are called, and what it notes about them, by the same ids.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_NOTES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Copier:
    """What `copy.deepcopy` asks the module for."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.users = 0

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        module = self._module()
        assert module is not None
        for part in module.modules():
            ours = {i for name in _HOOKS for i, hook in vars(part)[name].items() if _is_ours(hook)}
            for name in (*_HOOKS, *_NOTES) if ours else ():
                kept = vars(part)[name]
                memo[id(kept)] = type(kept)(
                    (i, copy.deepcopy(value, memo)) for i, value in kept.items() if i not in ours
                )
        own = vars(module).pop("__deepcopy__")
        try:
            return copy.deepcopy(module, memo)
        finally:
            vars(module)["__deepcopy__"] = own


def _is_ours(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", "").startswith("accel.")


def copies_plain(module: nn.Module, stack: ExitStack) -> None:
    """From now on until `stack` is unwound; several may ask for it."""
    copier = vars(module).setdefault("__deepcopy__", _Copier(module))
    if not isinstance(copier, _Copier):  # one of somebody else's
        return
    copier.users += 1

    def undo() -> None:
        copier.users -= 1
        if not copier.users:
            del vars(module)["__deepcopy__"]

    stack.callback(undo)
