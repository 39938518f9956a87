"""Stand around the calls of a module *instance*: outside of its hooks and of compiled code, and never traced.

No hook can skip a module (a pre-hook may only change arguments), and a hook is traced along when the module is
compiled in place. What `module.compile()` leaves behind, an attribute of the instance that `nn.Module.__call__`
prefers, is the one place in front of both; torch leaves it out of copies and pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_PLACE = "_compiled_call_impl"


class Around:
    """Gets the calls of `module` from `install` to `remove`. Several may stand around one module, and come and go
    in any order; what was compiled before or between is called as it would have been.

    Subclasses override `around`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._inner: Callable[..., Any] | None = None

    def install(self, *, innermost: bool = False) -> None:
        """Stand outside of, or inside of all others; where it stands already, nothing happens."""
        links = list(chain(self._module))
        if self in links:
            return
        # vars(): torch.compile's wrapper sends setattr on to the module it wraps.
        if innermost and links:
            self._inner, links[-1]._inner = links[-1]._inner, self
        else:
            self._inner, vars(self._module)[_PLACE] = vars(self._module).get(_PLACE), self

    def remove(self) -> None:
        """Leave; where it does not stand (any more), nothing happens."""
        outside = None
        for link in chain(self._module):
            if link is not self:
                outside = link
                continue
            if outside is not None:
                outside._inner = self._inner
            elif self._inner is not None:
                vars(self._module)[_PLACE] = self._inner
            else:
                del vars(self._module)[_PLACE]
            self._inner = None
            return

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What would have run: hooks and compiled code."""
        return (self._inner or self._module._call_impl)(*args, **kwargs)

    def around(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.call(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a wrapper that nobody told us of
            return self.call(*args, **kwargs)
        return self.around(args, kwargs)


def chain(module: nn.Module) -> Iterator[Around]:
    """Those who stand around a module, the outermost first."""
    link = vars(module).get(_PLACE)
    while isinstance(link, Around):
        yield link
        link = link._inner


def compiled(module: nn.Module) -> bool:
    """Whether calls of this module run compiled: in place, or through torch.compile's wrapper."""
    link = vars(module).get(_PLACE)
    while isinstance(link, Around):
        link = link._inner
    return link is not None or hasattr(module, "_orig_mod")


def compile_in_place(module: nn.Module, code: Callable[..., Any], stack: ExitStack) -> None:
    """Until `stack` is unwound, `code` runs in place of the module's hooks and `forward`, inside of all who stand around
    it; nothing else may run there."""
    links = list(chain(module))
    if links:
        links[-1]._inner = code
    else:
        vars(module)[_PLACE] = code

    def undo() -> None:
        for link in chain(module):
            if link._inner is code:
                link._inner = None
        if vars(module).get(_PLACE) is code:
            del vars(module)[_PLACE]

    stack.callback(undo)


@contextmanager
def answered(module: nn.Module, answer: Any) -> Iterator[None]:
    """Calls of the module return `answer` in place of what its `forward` would, inside of its hooks.

    `forward` is replaced for the length of one call. In between nobody attaches anything: wrappers of accelerate's
    offloading and diffusers' hooks, which stand there too, are found as they were left. Compiled code is passed by.
    """
    attributes = vars(module)
    own = {name: attributes[name] for name in ("forward", _PLACE) if name in attributes}
    attributes.update({"forward": lambda *args, **kwargs: answer, _PLACE: None})
    try:
        yield
    finally:
        for name in ("forward", _PLACE):
            attributes.pop(name, None)
        attributes.update(own)
