"""Where tokens enter and leave: gather once, run a stretch of modules on fewer tokens, scatter once.

The way of a token through one step:
 1. the scheduler's step ends; the clock knows which one starts           core/clock.py
 2. the schedule gives it a budget: 1 dense, 0 forecast, or between       core/schedule.py
 3. the gate tells the loop's calls of the model from anybody else's      core/gate.py
 4. at 0 it answers them from the history: done                           core/gate.py, history.py
 5. else the method makes a plan from the tokens at the entry             methods/*/engine.py -> core/plan.py
 6. reduce: x (B, N, C) -> (B, K, C), the mean (or one) of each slot      Span._enter
 7. what travels along follows plan.dst: rotary rows, masks               core/site.py
 8. the blocks in between run as they are, on K tokens                    Span._carry
 9. expand: y = x + expand(blocks(reduce x) - reduce x)                   Span._leave
10. the prediction is corrected, kept for forecasts, and returned         core/run.py

A block scope is a span of one module. Everything here may be traced by torch.compile: it reads plain flags, never
counts, never asks the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import UnsupportedError

from .plan import TokenPlan
from .site import Made, Port, Site
from .weighted_attention import SizedKeys


class Span:
    """y = x + expand(span(reduce(x)) - reduce(x)): full-resolution detail survives the span.

    Args:
        plan_for: (B, N, C) tokens at the entry -> the plan for this call, or None to run dense.
        pick: reduce by taking each slot's own token instead of the mean of its tokens.
        tokens: how many image tokens there are, for modules that take text in the same tensor; None: not known yet.
        serves: whether the running call is one to reduce; others go through untouched, and touch nothing.
        observe: called with (x, reduced x, plan) at the entry; used to measure how well a cached plan fits.
    """

    def __init__(
        self,
        plan_for: Callable[[Tensor], TokenPlan | None],
        *,
        pick: bool = False,
        observe: Callable[[Tensor, Tensor, TokenPlan], None] | None = None,
        tokens: Callable[[], int | None] = lambda: None,
        serves: Callable[[], bool] = lambda: True,
    ) -> None:
        self.plan_for, self.pick, self.observe = plan_for, pick, observe
        self.tokens, self.serves = tokens, serves
        self.plan: TokenPlan | None = None
        self.full: Tensor | None = None
        self.reduced: Tensor | None = None
        self.order: Tensor | None = None  # see Port.order
        self.made: Made = {}  # see Port.follow

    def clear(self) -> None:
        """Forget the tokens of a call that did not reach the end of the span."""
        self.plan = self.full = self.reduced = self.order = None
        if not torch.compiler.is_compiling():
            self.made.clear()

    def _made(self) -> Made | None:
        """Not while compiling, which finds by itself what is computed twice."""
        return None if torch.compiler.is_compiling() else self.made

    def attach(self, denoiser: nn.Module, sites: Sequence[Site], stack: ExitStack, *, bias: bool) -> None:
        """Hook the modules of `sites`, in order; the undo actions go onto `stack`.

        Raises:
            UnsupportedError: reduced tokens would leave the span through a skip connection.
        """
        paths = {site.path for site in sites}
        # The last module's output is whole again.
        for site in sites[:-1]:
            if site.read_by is not None and site.read_by not in paths:
                raise UnsupportedError(
                    f"{site.path} feeds {site.read_by} through a skip connection, so that both must be among the "
                    "blocks that share a plan: keep dense_blocks_last <= dense_blocks_first and refresh_layers empty, "
                    "or use scope='block'."
                )
        # Blocks of one class share one hook object: with regional compilation every block is guarded on its
        # hooks, and one object per block would recompile the same graph once per block.
        ports: dict[tuple, Port] = {}
        carry: dict[tuple, Callable] = {}
        pad: dict[tuple, Callable] = {}
        weighers: dict[bool, Callable] = {}
        modules = [denoiser.get_submodule(site.path) for site in sites]
        for i, (site, module) in enumerate(zip(sites, modules, strict=True)):
            key = (type(module), replace(site, path="", read_by=None, stretch=""))
            port = ports.setdefault(key, Port(site, module, bias=bias))
            if bias and site.bias is None and site.keys is not None:
                weigh = weighers.setdefault(site.keys.first, self._weigh(site.keys.first))
                for part in site.keys.parts(module):
                    stack.callback(part.register_forward_hook(weigh).remove)
            hook = self._enter(port) if i == 0 else carry.setdefault(key, self._carry(port))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if i == len(sites) - 1:
                stack.callback(module.register_forward_hook(self._leave(port)).remove)
            elif site.padded:
                stack.callback(module.register_forward_hook(pad.setdefault(key, self._pad(port))).remove)

    def _enter(self, port: Port) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.serves():
                return None
            x, tokens = port.get(port.site.tokens, args, kwargs), self.tokens()
            if port.site.image != "all" and tokens is None:
                return None
            order_BL = port.order(tokens or 0, args, kwargs)
            others, x_BNC = port.split(x, tokens or 0, order_BL)
            plan = self.plan_for(x_BNC)
            self.plan = plan
            if plan is None:
                return None
            reduced_BKC = plan.take(x_BNC) if self.pick else plan.reduce(x_BNC)
            self.full, self.reduced, self.order = x_BNC, reduced_BKC, order_BL
            if self.observe is not None:
                self.observe(x_BNC, reduced_BKC, plan)
            args, kwargs = port.follow(plan, args, kwargs, self._made())
            return port.put(port.site.tokens, port.join(others, reduced_BKC), args, kwargs)

        return enter

    def _carry(self, port: Port) -> Callable:
        def carry(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            plan = self.plan
            if plan is None or not self.serves():
                return None
            new_args, new_kwargs = port.follow(plan, args, kwargs, self._made())
            if not port.site.padded:
                return new_args, new_kwargs
            others, x_BNC = port.split(port.get(port.site.tokens, args, kwargs), plan.tokens)
            return port.put(port.site.tokens, port.join(others, x_BNC[:, : plan.slots]), new_args, new_kwargs)

        return carry

    def _weigh(self, first: bool) -> Callable:
        def weigh(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            plan = self.plan
            if plan is None or not self.serves():
                return None
            # Perturbed-attention guidance gives attention the first two of three parts of the batch.
            size_PK = plan.size if len(plan.size) == 1 else plan.size[: output.shape[0]]
            return SizedKeys.of(output, size_PK, plan.classes, first)

        return weigh

    def _pad(self, port: Port) -> Callable:
        def pad(module: nn.Module, args: tuple, output: Any) -> Any:
            plan = self.plan
            if plan is None or not self.serves():
                return None
            others, y_BKC = port.split(port.read(output), plan.slots)
            y_BNC = F.pad(y_BKC, (0, 0, 0, plan.tokens - plan.slots))
            return port.write(output, port.join(others, y_BNC))

        return pad

    def _leave(self, port: Port) -> Callable:
        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            plan, full, reduced, order_BL = self.plan, self.full, self.reduced, self.order
            if plan is None or not self.serves():
                return None
            assert full is not None
            assert reduced is not None
            self.clear()
            others, y_BKC = port.split(port.read(output), plan.slots)
            y_BNC = plan.change(full, y_BKC, reduced) if port.site.residual else plan.expand(y_BKC)
            return port.write(output, port.join(others, y_BNC, order_BL))

        return leave
