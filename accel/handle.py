"""What `accelerate` returns."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .core.around import compiled
from .core.method import Method
from .errors import AlreadyAcceleratedError, ConfigError

#: A method, and the identity of the loop it follows: pipelines with schedulers of their own may share a denoiser.
_Key = tuple[type[Method], int]

#: The handles attached to each denoiser (or whatever else a method changes). Weak on both sides: a
#: pipeline that nobody uses must go.
_ATTACHED: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[_Key, Handle]]
_ATTACHED = weakref.WeakKeyDictionary()


class Handle:
    """An acceleration that is attached to a pipeline; `remove()` gives the exact original back.

    Also a context manager: `with accel.accelerate(pipe, config) as handle: ...` removes on exit. It does not keep
    the model alive.

    Attributes:
        method: its name.
        config: the configuration in use.
        stats: what was computed, skipped, rebuilt, and how long it took.
        compiled: what of `compile` is in use.
    """

    def __init__(self, method: Method, config: Any, target: Any, stats: Any, undo: ExitStack) -> None:
        subject = target.subject
        self.method, self.config, self.stats = method.name, config, stats
        self._method = weakref.ref(method)
        self._subject, self._pipe = weakref.ref(subject), target.pipe
        method.undo = undo  # the undo actions know the model
        self._key = (type(method), id(target.loop))
        _ATTACHED.setdefault(subject, weakref.WeakValueDictionary())[self._key] = self
        _forget_compiled(subject, target.pipe())

    @property
    def attached(self) -> bool:
        subject, method = self._subject(), self._method()
        return subject is not None and method is not None and _ATTACHED[subject].get(self._key) is self

    @property
    def compiled(self) -> str:
        """What of `compile` is in use now, such as "blocks+graphs"; "" for nothing."""
        method = self._method()
        return method.compiled if method is not None and self.attached else ""

    def of(self, pipe: Any) -> bool:
        """Whether it is this pipeline's."""
        return pipe is not None and self._pipe() is pipe

    def boundary_maps(self) -> list[Any]:
        """Where dynamic chunking computed what in the last run: of every step a tensor (images that have plans of their own or 1,
        rows, columns) of how many tokens were computed together with each, 1 for one of its own; None for a step that
        computed all. Inside parts of depth, of the first part.

        Raises:
            ConfigError: the method has none.
        """
        maps = getattr(self._method(), "maps", None)
        if maps is None:
            raise ConfigError(f"{self.method} has no boundary maps; DynamicChunkingConfig has")
        return list(maps)

    def remove(self) -> None:
        """Detach. The pipeline is bit-exactly what it was. Calling it twice is fine."""
        subject, method = self._subject(), self._method()
        if subject is None or method is None or not self.attached:
            return
        del _ATTACHED[subject][self._key]
        method.undo.close()
        _forget_compiled(subject, self._pipe())

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<accel.Handle {self.config!r}, {'attached' if self.attached else 'removed'}>"


def _forget_compiled(changed: Any, pipe: Any) -> None:
    """A hook attached after a module was compiled and has run would silently be ignored. What is no module has
    no hooks; what was not compiled is not worth that everything else of the process is compiled again."""
    if not isinstance(changed, nn.Module):
        return
    held = [module for module in vars(pipe).values() if isinstance(module, nn.Module)] if pipe else []
    wrapped = any(getattr(module, "_orig_mod", None) is changed for module in held)
    if wrapped or any(compiled(module) for module in changed.modules()):
        torch.compiler.reset()


def make_room(target: Any, method: type[Method], *, replace: bool) -> None:
    """Refuse a second handle of one method on one model and loop, or remove the first if asked to replace it; refuse
    methods that do not go together."""
    everywhere: dict[_Key, Handle] = dict(_ATTACHED.get(target.subject) or {})
    pipe = target.pipe()
    attached = {
        other: handle
        for (other, loop), handle in everywhere.items()
        if loop == id(target.loop) or handle.of(pipe)  # whose scheduler may have been replaced since
    }
    for other, handle in attached.items():
        if other is not method and (other.alone or method.alone):
            raise ConfigError(
                f"{method.name} and {handle.method} do not go together on one model. Put both into one schedule: "
                "the cycle of a TokenPruningConfig takes shares of the tokens, and 0 for steps that are forecast; "
                f"it also has guidance_every. Or remove the handle of {handle.method} first."
            )
    same = attached.get(method)
    if same is None:
        return
    if not replace:
        raise AlreadyAcceleratedError(
            f"{method.name} is already attached to this model ({same.config}). Remove that handle first, or "
            "pass replace=True."
        )
    same.remove()
