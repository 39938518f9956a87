"""Classifier-free guidance with the unconditional branch evaluated at some of the steps only.

The two branches differ by little that changes slowly: FasterCache (arXiv:2410.19355) reuses their difference,
Adaptive Guidance (arXiv:2312.12487, LinearAG) predicts the unconditional branch linearly from earlier steps.
Here the difference is continued by the forecast that whole steps use, from the steps at which both branches were
computed: unconditional = conditional - forecast difference.

Shapes: B images, 2B the batch of a call that takes both branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelWarning, UnsupportedError

from .capability import Branches
from .history import History
from .prediction import prediction_of
from .run import Run


class Guidance:
    """The branches of guidance of one run: which are computed, and the history that continues their difference.

    Two calls a step: the first is computed, the second one answered. One call with both: it gets the conditional
    half of the batch. Which is which is declared by the family (`Branches`).

    Args:
        run: whose steps it follows; its phases say at which of them one branch is enough.
        order: of the forecast.
        halves: whether the method can do with half of the batch.
    """

    def __init__(self, run: Run, order: int, *, halves: bool) -> None:
        self.run, self.order, self._halves = run, order, halves
        self.forget()

    def forget(self) -> None:
        self.history: History | None = None  # of conditional and unconditional prediction
        self._batched = False
        self._conditional: Tensor | None = None
        self._forecasts: list[Tensor] = []

    @property
    def used(self) -> bool:
        return self.run.schedule.guidance_every > 1

    def prepare(self) -> None:
        """Before a step that is not forecast as a whole."""
        run = self.run
        self._conditional = None
        if run.phase.guided or self.history is None:
            return
        self._forecasts = self.history.forecasts(run.time)
        run.divert(self._half_batch if self._batched else self._first_call)

    def account(self) -> None:
        """After a step that was not forecast as a whole: learn from it if it computed both branches."""
        run = self.run
        if not self.used:
            return
        if run.clock.step == 0:
            self._recognise()  # which starts the history with this step
            return
        if self.history is None:
            return
        run.check_calls(len(run.outputs), 1 if self._batched else 2)
        if run.changed:
            self._again()
        elif not run.branch_skipped:
            self.history.add(self._branches(), run.time)

    def _again(self) -> None:
        """The history is about other calls. It begins again, unless guidance was turned off or on."""
        outputs, samples = self.run.outputs, self.run.clock.samples or 0
        whole = len(outputs[0]) == 2 * samples if self._batched else len(outputs) == 2
        self.history = History(self.order) if whole else None
        if self.history is not None:
            self.history.start(self._branches(), self.run.time)

    @property
    def _declared(self) -> Branches:
        return self.run.target.adapter.branches

    def _branches(self) -> tuple[Tensor, ...]:
        """(conditional, unconditional)"""
        outputs = self.run.outputs
        if not self._batched:
            return outputs
        halves = outputs[0].chunk(2)
        return halves if self._declared.batched == "first" else halves[::-1]

    def _recognise(self) -> None:
        """After the first step: how this pipeline runs guidance.

        Raises:
            UnsupportedError: more than two calls a step; another method that needs what layers make in the
                calls answered here; token plans of a whole batch, and guidance in one call.
        """
        run, every = self.run, self.run.schedule.guidance_every
        calls, others = len(run.outputs), [r for r in run.alongside() if r is not run]
        if calls > 2:
            raise UnsupportedError(
                f"guidance_every={every}: the model is called {calls} times a step; it takes one call with both "
                "branches of guidance, or one for each."
            )
        samples, name = run.clock.samples, type(run.target.denoiser).__name__
        copies = len(run.outputs[0]) // samples if calls == 1 and samples else 1
        if copies > 2:
            raise UnsupportedError(
                f"guidance_every={every}: {name} runs {copies} branches of guidance in one batch; it takes two. Use "
                "guidance_every=1."
            )
        if copies == 2 and _perturbed(run.target.denoiser):
            raise UnsupportedError(
                f"guidance_every={every}: {name} runs perturbed-attention guidance, whose two halves are no branches of "
                "guidance by a prompt. Use guidance_every=1."
            )
        self._batched = copies == 2
        known = self._declared.batched if self._batched else self._declared.calls
        if (self._batched or calls == 2) and known is None:
            raise UnsupportedError(
                f"guidance_every={every}: which of the branches of guidance is the conditional one is not known of "
                f"{name} (Adapter.branches). Use guidance_every=1."
            )
        if calls == 1 and not self._batched:
            warnings.warn(
                f"guidance_every={every} has nothing to save: the model is called for one branch only (guidance "
                "is off, or distilled into the model).",
                AccelWarning,
                stacklevel=2,
            )
            return
        if self._batched and (others or not self._halves):
            raise UnsupportedError(
                f"guidance_every={every}: this pipeline computes both branches of guidance in one batch, and "
                "token plans hold for the whole batch. Here guidance_every works in a ForecastConfig that is "
                "alone on the model; with token pruning or merging use guidance_every=1."
            )
        self.history = History(self.order)
        self.history.start(self._branches(), run.time)

    # Around the denoiser, never traced.

    def _first_call(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        run = self.run
        if self._conditional is None:
            output = call(*args, **kwargs)
            self._conditional = prediction_of(output)
            return output
        run.check_calls(max(run.seen, 2), 2)
        if run.changed:
            return call(*args, **kwargs)
        unconditional = self._continued(self._conditional)
        for other in run.alongside():  # the call never goes into the module
            other.branch_skipped = True
            if other.keep_outputs:
                other.outputs = (*other.outputs, unconditional)
        return run.like_output(unconditional)

    def _half_batch(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        run = self.run
        run.check_calls(run.seen, 1)
        if run.changed:
            return call(*args, **kwargs)
        assert run.samples is not None
        first = self._declared.batched == "first"
        batch, layered = 2 * run.samples, self._declared.layers
        layers = {name: _half_of_each(kwargs[name], batch, first) for name in layered if name in kwargs}
        args, kwargs = _half((args, kwargs), batch, first=first)
        kwargs = {**kwargs, **layers}
        conditional = prediction_of(call(*args, **kwargs))
        branches = [conditional, self._continued(conditional)]
        both = torch.cat(branches if first else branches[::-1])
        run.branch_skipped, run.outputs = True, (both,)
        return run.like_output(both)

    def _continued(self, conditional: Tensor) -> Tensor:
        """The unconditional prediction: conditional minus the forecast difference, summed so that it is exactly
        the forecast where the conditional branch is."""
        was, unconditional = (f.float() for f in self._forecasts)
        return (unconditional + (conditional.float() - was)).to(conditional.dtype)


def _half_of_each(layers: Any, batch: int, first: bool) -> Any:
    """The conditional half of every layer's value: there may be as many layers as images."""
    halves = [_half(layer, batch, first=first) for layer in layers]
    return torch.stack(halves) if isinstance(layers, Tensor) else halves


def _half(value: Any, batch: int, *, first: bool) -> Any:
    """The conditional half of whatever is given per image."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value[: batch // 2] if first else value[batch // 2 :]
    if isinstance(value, list) and len(value) == batch:
        return value[: batch // 2] if first else value[batch // 2 :]
    if isinstance(value, (list, tuple)):
        return type(value)(_half(item, batch, first=first) for item in value)
    if isinstance(value, Mapping):
        return {name: _half(item, batch, first=first) for name, item in value.items()}
    return value


def _perturbed(denoiser: nn.Module) -> bool:
    return any(
        type(getattr(module, "processor", None)).__name__.startswith("PAG") for module in denoiser.modules()
    )
