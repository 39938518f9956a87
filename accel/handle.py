"""What `accelerate` returns."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .errors import AlreadyAcceleratedError, ConfigError

#: The handles attached to each denoiser (or whatever else a method changes), by method. Weak on both sides: a
#: pipeline that nobody uses must go.
_ATTACHED: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[str, Handle]]
_ATTACHED = weakref.WeakKeyDictionary()

#: Methods that learn from what the model computed for every token, step by step: with another method on the same
#: model they would take its merged or forecast predictions for computed ones.
_ALONE = frozenset({"token_pruning"})


class Handle:
    """An acceleration that is attached to a pipeline; `remove()` gives the exact original back.

    Also a context manager: `with accel.accelerate(pipe, config) as handle: ...` removes on exit.

    Attributes:
        config: the configuration in use.
        stats: what was computed, skipped, rebuilt, and how long it took.
    """

    def __init__(self, method: str, config: Any, denoiser: Any, stats: Any, undo: ExitStack) -> None:
        self.method, self.config, self.stats = method, config, stats
        self._undo = undo
        self._denoiser = weakref.ref(denoiser)
        _ATTACHED.setdefault(denoiser, weakref.WeakValueDictionary())[method] = self
        _forget_compiled(denoiser)

    @property
    def attached(self) -> bool:
        denoiser = self._denoiser()
        return denoiser is not None and _attached(denoiser, self.method) is self

    def remove(self) -> None:
        """Detach. The pipeline is bit-exactly what it was. Calling it twice is fine."""
        denoiser = self._denoiser()
        if denoiser is None or not self.attached:
            return
        del _ATTACHED[denoiser][self.method]
        self._undo.close()
        _forget_compiled(denoiser)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<accel.Handle {self.config!r}, {'attached' if self.attached else 'removed'}>"


def _forget_compiled(changed: Any) -> None:
    """A hook attached after a module was compiled and has run would silently be ignored. What is no module has
    no hooks, and its compiled code stays."""
    if isinstance(changed, nn.Module):
        torch.compiler.reset()


def make_room(denoiser: Any, method: str, *, replace: bool) -> None:
    """Refuse a second handle of one method on one denoiser, or remove the first if asked to replace it; refuse
    methods that do not go together."""
    for other in _ATTACHED.get(denoiser, {}):
        if other != method and _ALONE & {method, other}:
            raise ConfigError(
                f"{method} and {other} do not go together on one model. Put both into one schedule: the cycle of a "
                "TokenPruningConfig takes shares of the tokens, and 0 for steps that are forecast; it also has "
                f"guidance_every. Or remove the handle of {other} first."
            )
    handle = _attached(denoiser, method)
    if handle is None:
        return
    if not replace:
        raise AlreadyAcceleratedError(
            f"{method} is already attached to this model ({handle.config}). Remove that handle first, or "
            "pass replace=True."
        )
    handle.remove()


def _attached(denoiser: Any, method: str) -> Handle | None:
    handles = _ATTACHED.get(denoiser)
    return None if handles is None else handles.get(method)
