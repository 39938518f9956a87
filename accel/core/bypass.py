"""Answer the calls of a module for the length of one step, all or some of them without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: What decides where a module's call goes: its own `forward` (accelerate and diffusers put theirs there too)
#: and what `module.compile()` leaves behind.
_NAMES = ("forward", "_compiled_call_impl")


class _Answer:
    """A bypass's forward or detour; a class of its own so that it can be told."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def bypassed(module: nn.Module) -> bool:
    """Whether the step that is running, or about to, leaves this module alone."""
    return isinstance(vars(module).get("forward"), _Answer)


def occupied(module: nn.Module) -> bool:
    """Whether calls of this module are answered or go a detour at the step that is running, or about to."""
    return any(isinstance(vars(module).get(name), _Answer) for name in _NAMES)


class Bypass:
    """Puts another `forward` onto a module *instance* between `start` and `stop`.

    No hook can skip a module: a pre-hook may only change arguments, and reducing all blocks to zero image
    tokens would still compute the text (11 % of FLUX). So `forward` itself is replaced, but only from just
    before a step that is not computed until just after it. In between nobody attaches anything, and outside
    of such steps the module is untouched: wrappers of accelerate's offloading and diffusers' hooks, set
    before or after, are found as they were left and may come and go in any order. A step that is bypassed
    never reaches torch.compile, whichever way the module was compiled; hooks on the module still run.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: dict[str, Any] | None = None

    def start(self, forward: Callable[..., Any]) -> None:
        """Calls run `forward` in place of the module's, inside of its hooks."""
        self._put(forward=_Answer(forward), _compiled_call_impl=None)

    def divert(self, detour: Callable[..., Any]) -> None:
        """Calls run `detour(call, args, kwargs)`, outside of the module's hooks and never traced. `call` is
        what would have run, hooks and compiled code included: the detour may call it or not, with other
        arguments, and return something else."""
        call = vars(self._module).get("_compiled_call_impl") or self._module._call_impl
        self._put(_compiled_call_impl=_Answer(lambda *args, **kwargs: detour(call, args, kwargs)))

    def _put(self, **new: Any) -> None:
        assert not occupied(self._module)
        # vars(): torch.compile's wrapper sends setattr on to the module it wraps.
        attributes = vars(self._module)
        self._own = {name: attributes[name] for name in _NAMES if name in attributes}
        attributes.update(new)

    def stop(self) -> None:
        if self._own is None:
            return
        attributes = vars(self._module)
        for name in _NAMES:
            attributes.pop(name, None)
        attributes.update(self._own)
        self._own = None
