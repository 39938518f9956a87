"""One method at work on one denoiser: what is common to all methods that reduce tokens.

The rule that keeps torch.compile happy and the device busy: hooks, which may be traced, only read plain flags
and store tensors. Everything that counts, decides or reads a value happens in the clock's callbacks, between
two steps.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelWarning, UnsupportedError
from accel.stats import Stats, StepStats

from .bypass import Bypass, bypassed, occupied
from .capability import Adapter, denoiser_of
from .clock import Clock, Listener
from .method import Method
from .schedule import Phase, Schedule


@dataclass(frozen=True)
class Target:
    """A pipeline taken apart. The pipeline itself is only referred to weakly."""

    pipe: weakref.ref
    outer: nn.Module  # what the pipeline calls: the denoiser, or torch.compile's wrapper around it
    denoiser: nn.Module
    adapter: Adapter
    scheduler: Any

    @property
    def subject(self) -> nn.Module:
        return self.denoiser


class StepMethod(Method):
    """A method that follows a denoising loop step by step. Called between steps, never inside the denoiser."""

    @classmethod
    def take_apart(cls, pipe: Any, find: Callable[[nn.Module], Adapter]) -> Target:
        outer, denoiser = denoiser_of(pipe)
        return Target(weakref.ref(pipe), outer, denoiser, find(denoiser), pipe.scheduler)

    @abstractmethod
    def forget(self) -> None:
        """Drop all state: a run starts, has ended or has failed."""

    @abstractmethod
    def prepare(self, run: Run) -> None:
        """The step `run.phase` describes is about to start."""

    @abstractmethod
    def account(self, run: Run) -> StepStats:
        """After a step: what it did (the calls are counted by the run)."""


class Run(Listener):
    """Follows the clock for one method and keeps what a method needs to know about the loop.

    Attributes:
        phase: what the running step does; dense while no loop is running.
        grid: (rows, columns) of the image tokens, known from the first call of a run; None before.
        phases: the phases of all steps of this run.
        time: of the running step, as forecasts count it (see `Clock.times`).
        outputs: the predictions of this step's calls as the pipeline got them, kept if the method asked for
            them (`keep_outputs`). Their number is the index of the running call.
        correct: set by the method between steps: prediction -> the prediction that the pipeline gets.
            Possibly traced.
        samples: images per step, known after the first step; None before.
        branch_skipped: at this step, one of the two branches of guidance was not computed.
    """

    def __init__(
        self, target: Target, schedule: Schedule, method: StepMethod, stats: Stats, *, span: bool
    ) -> None:
        self.target, self.schedule, self.method, self.stats, self.span = target, schedule, method, stats, span
        self.keep_outputs = False
        self.clock = Clock.of(target.scheduler)
        signature = inspect.signature(type(target.denoiser).forward)
        self._names = list(signature.parameters)[1:]
        self.correct: Callable[[Tensor], Tensor] | None = None
        self._bypass = Bypass(target.outer)
        self._output_class: type | None = None
        self.phases: tuple[Phase, ...]
        self.phase: Phase
        self.time: float
        self.grid: tuple[int, int] | None
        self.grid_source: Tensor | None
        self.outputs: tuple[Tensor, ...]
        self.samples: int | None
        self.branch_skipped: bool
        self._idle()

    def attach(self, stack: ExitStack) -> None:
        denoiser, outer = self.target.denoiser, self.target.outer
        stack.callback(outer.register_forward_pre_hook(self._call_starts, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(self._leave, always_call=True).remove)
        stack.callback(outer.register_forward_hook(self._call_ends).remove)
        stack.callback(self.clock.add(self, self.target.pipe()))
        stack.callback(self._drop)

    # The clock's side: eager, between steps.

    def begin(self, clock: Clock) -> None:
        self._drop()
        self.phases = self.schedule.phases(clock.total)
        self._partial = any(0 < phase.budget < 1 for phase in self.phases)
        if self.schedule.reduces and all(phase.dense and phase.guided for phase in self.phases):
            warnings.warn(
                f"all {clock.total} steps are dense: the schedule's dense first and last steps leave none to "
                "reduce, so this run is not accelerated.",
                AccelWarning,
                stacklevel=2,
            )

    def before(self, clock: Clock) -> None:
        self._bypass.stop()
        self.phase, self.time = self.phases[clock.step], clock.times[clock.step]
        self.samples = clock.samples
        self.branch_skipped = False
        self.method.prepare(self)
        self.outputs = ()
        self._calls = 0

    def check_calls(self, calls: int, expected: int) -> None:
        """Refuse a step that calls the denoiser another number of times than the steps before it: a forecast
        would continue another branch of guidance."""
        if calls != expected:
            raise UnsupportedError(
                f"the model was called {calls} times at step {self.clock.step}, but {expected} times at the steps "
                "before it (guidance over a part of the steps, or a scheduler that calls it a varying number "
                "of times). Forecasts need the same number at every step."
            )

    def check_times(self) -> None:
        """Refuse a scheduler that does not go from one time to the next, with one call at each: there is no slope
        to forecast along.

        Raises:
            UnsupportedError: second-order schedulers (Heun, KDPM2, ...), times that repeat (PNDM, ...) or go back.
        """
        scheduler, times = self.target.scheduler, self.clock.times
        # Not timesteps: many steps close to the end round to the same one, at noise levels of their own.
        rises = [(b > a) - (b < a) for a, b in pairwise(times)]
        order = getattr(scheduler, "order", 1)
        other = "Use a first-order or multistep scheduler (Euler, DDIM, DPM-Solver++ 2M, UniPC)."
        if order > 1:
            reason = (
                f"calls the model {order} times for every step (like Heun and KDPM2): at the same timestep as "
                f"another call, or at one in between. {other}"
            )
        elif all(rise == 1 for rise in rises) or all(rise == -1 for rise in rises):  # -1: inversion
            return
        elif hasattr(scheduler, "prk_timesteps"):
            reason = f"calls the model more than once at the same timestep in its first steps (PNDM). {other}"
        elif 0 in rises:
            step = rises.index(0)
            reason = (
                f"repeats a time: steps {step} and {step + 1} are at the same noise level (timesteps "
                f"{self.clock.timesteps[step]:g} and {self.clock.timesteps[step + 1]:g}). Give it timesteps or "
                "sigmas that differ from step to step."
            )
        else:
            reason = f"goes back and forth between noise levels. {other}"
        raise UnsupportedError(
            f"{type(scheduler).__name__} {reason} Forecasts need one call of the model at each time."
        )

    def answer(self, predictions: Sequence[Tensor]) -> None:
        """Do not run the denoiser at the step that is about to start, but give these `predictions` to its
        calls."""
        self._refuse_second()
        calls = count(1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls)
            self.check_calls(max(call, len(predictions)), len(predictions))
            return self.like_output(predictions[call - 1])

        self._bypass.start(forward)

    def divert(self, detour: Callable[..., Any]) -> None:
        """Send the calls of the step that is about to start through `detour` (see `Bypass.divert`)."""
        self._refuse_second()
        self._bypass.divert(detour)

    def _refuse_second(self) -> None:
        if occupied(self.target.outer):
            raise UnsupportedError(
                f"two methods forecast step {self.clock.step} of the same model. Put both into one schedule: "
                "TokenPruningConfig takes forecast steps (0 in cycle=...), partial steps and guidance_every."
            )

    def beside(self) -> list[Run]:
        """The runs on the same denoiser, this one among them."""
        runs = [run for run in self.clock.listeners if isinstance(run, Run)]
        return [run for run in runs if run.target.denoiser is self.target.denoiser]

    def after(self, clock: Clock) -> None:
        if self.grid is None and self.grid_source is not None:
            self.grid = self.target.adapter.grid(self.target.denoiser, self.grid_source)
        self.grid_source = None
        if clock.step == 0:  # not in `begin`, which image-to-image brings about twice
            self.stats.runs += 1
            self.stats.steps.clear()
        done = replace(self.method.account(self), calls=self._calls or None)
        if bypassed(self.target.outer):  # by this method or by another one on the same denoiser
            done = replace(done, computed=0, built=0, reused=0, forecast=done.total)
        elif self.branch_skipped:
            saved = done.computed - done.computed // 2
            done = replace(
                done, computed=done.computed - saved, forecast=done.forecast + saved, branch_skipped=True
            )
        self.stats.record(done)

    def end(self, clock: Clock) -> None:
        self._drop()

    def _drop(self) -> None:
        self._idle()
        self.method.forget()

    def _idle(self) -> None:
        self._bypass.stop()
        self.phase, self.phases, self.time, self._partial = Phase(1.0), (), 0.0, False
        self.correct = None
        self.grid = self.grid_source = self.samples = None
        self.branch_skipped = False
        self.outputs = ()
        self._calls = 0

    # The denoiser's side: possibly traced.

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._partial:  # at the first step, not after minutes of dense ones
            self.target.adapter.refuse(arguments, self.span)
        if self.grid is None:
            self.grid_source = self.target.adapter.grid_source(arguments)
        if torch.compiler.is_compiling():
            return
        pipe = self.target.pipe()
        if pipe is not None and not self.clock.follows(pipe.scheduler):
            raise UnsupportedError(
                "the pipeline's scheduler was replaced after accelerate(), so its steps cannot be followed. "
                "Call handle.remove() (or accelerate(..., replace=True)) after setting the scheduler."
            )
        if not self.clock.running:
            warnings.warn(
                "the denoiser was called outside of a denoising loop (no scheduler.set_timesteps before it, "
                "or all steps done): it computes all tokens.",
                AccelWarning,
                stacklevel=2,
            )
        if self.grid is None and self.grid_source is not None:
            self.grid = self.target.adapter.grid(module, self.grid_source)
            self.grid_source = None

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if output is None:  # always_call: the denoiser raised
            self.clock.abort()
            return None
        prediction = prediction_of(output)
        self._output_class = type(output)
        if self.correct is not None:
            prediction = self.correct(prediction)
            output = self.like_output(prediction)
        if self.keep_outputs:
            self.outputs = (*self.outputs, prediction)
        return output

    def like_output(self, prediction: Tensor) -> Any:
        """The prediction in what the denoiser's calls return."""
        cls: Any = self._output_class
        assert cls is not None
        return (prediction,) if issubclass(cls, tuple) else cls(sample=prediction)

    # Around the denoiser: not traced, unless it was compiled in place (`module.compile()`).

    def _call_starts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.compiler.is_compiling():
            self.stats.call_starts(next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))

    def _call_ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls += 1
            self.stats.call_ends(prediction_of(output).device)


def prediction_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
