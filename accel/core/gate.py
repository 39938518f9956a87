"""The one way into a denoiser while loops are followed: whose call it is, and what is done about it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import caller
from .around import Around, answered, chain, compiled
from .clock import Clock
from .compiling import Compilation, room
from .graphs import Held


class Follower(Protocol):
    """What a gate asks of those who follow loops (`accel.core.run.Run`)."""

    active: bool
    clock: Clock
    detour: Callable[..., Any] | None
    compilation: Compilation | None
    seen: int

    @property
    def kinds(self) -> int: ...

    def arrives(self, args: tuple, kwargs: dict[str, Any]) -> None: ...

    def enters(self, args: tuple, kwargs: dict[str, Any], *, traced: bool) -> None: ...

    def answer_now(self) -> Tensor | None: ...

    def held(self) -> Held: ...

    def leaves(self, output: Any) -> Any: ...

    def like_output(self, prediction: Tensor) -> Any: ...


class Gate(Around):
    """Stands around a module's calls while something is attached to it; one for all runs, loops and threads.

    A call is some loop's, and then that loop's runs take part in it, or nobody's we follow, and then it is the plain
    module's: hooks on its parts look at `Run.active`, which is false. One call runs at a time, since hooks keep what
    they take from one block to the next: threads that share a module wait for each other.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._lock = threading.RLock()
        self._runs: tuple[Follower, ...] = ()
        self._compiled = False  # the module or parts of it, when the loop started

    @staticmethod
    def of(module: nn.Module) -> Gate:
        """The one that stands there, or a new one. Not in a table of gates: it would keep the modules alive."""
        return next((link for link in chain(module) if isinstance(link, Gate)), None) or Gate(module)

    def open(self, run: Follower) -> None:
        """From now on calls may be `run`'s. Not only while its loop runs: a call of another thread that is on its
        way through the module when the loop starts must hold the lock."""
        if run not in self._runs:
            self._runs = (*self._runs, run)
        # Inside of whoever measures the module's time.
        self.install(innermost=True)
        self._compiled = any(compiled(part) for part in self._module.modules())

    def close(self, run: Follower) -> None:
        """None is any more."""
        self._runs = tuple(r for r in self._runs if r is not run)
        if not self._runs:
            self.remove()

    def around(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        where = caller.here()
        with self._lock:
            nested = any(run.active for run in self._runs)
            runs = [] if nested else [run for run in self._runs if run.clock.calls(*where)]
            before = [(run, run.active) for run in self._runs]  # true only for a call within a call
            for run, _ in before:
                run.active = run in runs
            try:
                return self._ours(runs, args, kwargs) if runs else self.call(*args, **kwargs)
            except BaseException:
                for run in runs:
                    run.clock.abort()
                raise
            finally:
                for run, active in before:
                    run.active = active

    def _ours(self, runs: list[Follower], args: tuple, kwargs: dict[str, Any]) -> Any:
        for run in runs:
            run.arrives(args, kwargs)
        through = partial(self._through, runs)
        detour = next((run.detour for run in runs if run.detour is not None), None)
        return through(*args, **kwargs) if detour is None else detour(through, args, kwargs)

    def _through(self, runs: list[Follower], *args: Any, **kwargs: Any) -> Any:
        traced = compiled(self._module)
        for run in runs:
            run.enters(args, kwargs, traced=traced or run.compilation is not None)
        answers = ((run, run.answer_now()) for run in runs)
        if (found := next(((r, a) for r, a in answers if a is not None), None)) is not None:
            with answered(self._module, found[0].like_output(found[1])):
                output = self._module._call_impl(*args, **kwargs)
        else:
            if self.overwrites and runs[0].seen == 1:
                torch.compiler.cudagraph_mark_step_begin()
            with room() if self._compiled else nullcontext():
                output = self._computed(runs, args, kwargs)
        for run in runs:
            output = run.leaves(output)
        return output

    def _computed(self, runs: list[Follower], args: tuple, kwargs: dict[str, Any]) -> Any:
        compilation = next((run.compilation for run in runs if run.compilation is not None), None)
        if compilation is None:
            return self.call(*args, **kwargs)
        held = Held.together([Held((id(self),)), *(run.held() for run in runs)])
        return compilation.call(self.call, args, kwargs, held, max(run.kinds for run in runs))

    @property
    def overwrites(self) -> bool:
        """What the module makes may be overwritten at the next step (CUDA graphs), unless it is cloned."""
        return self._compiled and torch.cuda.is_available()
