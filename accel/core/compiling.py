"""`accelerate(..., compile=...)`: torch.compile and CUDA graphs in one word, undone with the acceleration.

Repeated blocks are compiled one by one where the model names them (diffusers' `_repeated_blocks`): the code of one
serves all of its class. Where a model cannot be compiled, it is said which line is the reason, and it runs as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from accel.errors import AccelWarning, ConfigError, UnsupportedError

from .around import compile_in_place, compiled
from .graphs import Cuda, Graphs, Held

#: What `compile` may be, beside True and False.
WAYS = ("blocks", "whole", "graphs", "blocks+graphs", "whole+graphs")
#: Of torch.compile: one code for each size, which is faster than one for all.
OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
#: Codes of one function. A method has up to six kinds of a block (first, inner, last; dense, reduced ...), each of them
#: anew for every size; torch's own limit of 8 ends the second size.
CODES = 64


def check(compile: bool | str) -> None:
    """
    Raises:
        ConfigError: no such way.
    """
    if not isinstance(compile, bool) and compile not in WAYS:
        raise ConfigError(f"compile={compile!r}: valid are True, False, {', '.join(WAYS)}")


class Compilation:
    """The compiled code and the graphs of one handle's denoisers.

    Attributes:
        graphs: None without any.
        refused: why something was not compiled.
    """

    def __init__(self, how: bool | str, modules: Sequence[nn.Module], quiet: Callable[[], bool]) -> None:
        """
        Args:
            how: True, or one of `WAYS`.
            modules: what the pipeline calls at every step.
            quiet: whether to show no progress bar.

        Raises:
            UnsupportedError: graphs are asked for where there can be none.
        """
        self._modules, self._quiet = modules, quiet
        self._ways = {"blocks", "graphs"} if how is True else set(str(how).split("+"))
        self.refused: list[str] = []
        self._compiles = False
        self._met: set[Any] = set()
        self._bar: Any = None
        reason = _no_graphs(modules) if "graphs" in self._ways else None
        if reason is not None and how is not True:
            raise UnsupportedError(f"compile={how!r}: {reason}. Use compile=True, or 'blocks'.")
        wanted = "graphs" in self._ways and reason is None
        self.graphs = (
            Graphs(Cuda(next(modules[0].parameters()).device), always=how is not True) if wanted else None
        )

    def attach(self, stack: ExitStack) -> None:
        stack.callback(self._drop)
        if not self._ways & {"blocks", "whole"}:
            return
        if any(compiled(part) for module in self._modules for part in module.modules()):
            self.refused.append("compiled already: left as it is")
            return
        self._compiles = True
        for module in self._modules:
            for part in self._parts(module):
                # Hooks along with it: they are what `_call_impl` calls.
                code = torch.compile(part._call_impl, **OPTIONS)
                compile_in_place(part, self._guarded(part, code), stack)

    def _parts(self, module: nn.Module) -> list[nn.Module]:
        names = (getattr(module, "_repeated_blocks", None) or ()) if "blocks" in self._ways else ()
        return [part for part in module.modules() if type(part).__name__ in names] or [module]

    def _guarded(self, part: nn.Module, code: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._compiles:
                return part._call_impl(*args, **kwargs)
            try:
                return code(*args, **kwargs)
            except TorchDynamoException as error:
                # First, since what is wrong with the call, and not with its compilation, shows here.
                output = part._call_impl(*args, **kwargs)
                self._give_up(part, error)
                return output

        return run

    def _give_up(self, part: nn.Module, error: Exception) -> None:
        self._compiles = False
        stack = getattr(error, "real_stack", None)
        where = f" at {stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
        what = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = f"{type(part).__name__} cannot be compiled{where} ({what}): it runs as it is"
        self.refused.append(reason)
        warnings.warn(reason, AccelWarning, stacklevel=2)

    @property
    def state(self) -> str:
        """What is in use now: one of `WAYS`, or "" for nothing."""
        ways = []
        if self._compiles:
            blocks = all(self._parts(module) != [module] for module in self._modules)
            ways.append("blocks" if blocks else "whole")
        if self.graphs is not None:
            ways.append("graphs")
        return "+".join(ways)

    @property
    def notes(self) -> list[str]:
        refused = (
            [] if self.graphs is None else [f"no CUDA graph: {reason}" for reason in self.graphs.refused]
        )
        return [f"compile: {reason}" for reason in self.refused] + refused

    def begin(self) -> None:
        """A loop starts."""
        if self.graphs is None:
            return
        reason = _no_graphs(self._modules)  # offloading may have been switched on since
        if reason is None:
            self.graphs.follow(self._modules)
            return
        self.graphs.drop()
        self.graphs = None
        self.refused.append(reason)

    def call(self, call: Callable[..., Any], args: tuple, kwargs: dict, held: Held, kinds: int) -> Any:
        """What `call(*args, **kwargs)` returns. Where it compiles for the first time, a bar shows it.

        Args:
            held: what hooks read and write in it.
            kinds: of calls that the loop will make, at least.
        """
        new = self._compiles and held.key not in self._met
        if new:
            self._show(kinds)
        output = call(*args, **kwargs) if self.graphs is None else self.graphs(call, args, kwargs, held)
        if new:
            self._met.add(held.key)
            self._bar.update()
        return output

    def _show(self, kinds: int) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            # Below the pipeline's own.
            self._bar = tqdm(desc="compiling", disable=self._quiet(), leave=False, position=1)
        self._bar.total = max(kinds, self._bar.n + 1)
        self._bar.refresh()

    def end(self) -> None:
        """It has ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _drop(self) -> None:
        self.end()
        if self.graphs is not None:
            self.graphs.drop()
        if self._compiles:
            torch.compiler.reset()


def _no_graphs(modules: Sequence[nn.Module]) -> str | None:
    """Why there can be no CUDA graphs of these."""
    for module in modules:
        devices = {p.device.type for p in module.parameters()}
        if devices != {"cuda"}:
            return f"CUDA graphs need the model on a CUDA device, it is on {', '.join(sorted(devices))}"
        if _offloaded(module):
            return "CUDA graphs need weights that stay where they are, and offloading moves them"
    return None


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate, or diffusers (group offloading), moves weights on and off the device."""
    hooks = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    groups = any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks)
    return groups or any(hasattr(part, "_hf_hook") for part in module.modules())


def room() -> AbstractContextManager[Any]:
    """Around calls of compiled code: more codes for one function than torch's own limit, at which a graph that must not
    break fails."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(CODES, config.recompile_limit))
