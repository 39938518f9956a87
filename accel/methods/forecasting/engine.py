"""What whole-step forecasts do at every step of one denoiser; their settings are in `config`."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import Tensor

from accel.core.clock import Readback
from accel.core.guidance import Guidance
from accel.core.history import History, growth, memory
from accel.core.run import Run, StepMethod, Target
from accel.core.schedule import Phase
from accel.errors import AccelWarning
from accel.stats import Stats, StepStats

from .config import ForecastConfig
from .correction import Correction


class Forecasting(StepMethod):
    """Whole-step forecasts at work on one denoiser."""

    name = "forecast"

    def __init__(self, target: Target, config: ForecastConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        self._blocks = len(target.adapter.sites(target.denoiser))
        self.run = Run(target, config.schedule(), self, stats, span=False)
        self.run.keep_outputs = True
        self.guidance = Guidance(self.run, min(config.order, 1), halves=True)
        self.correction = Correction()
        self.forget()

    def attach(self, stack: ExitStack) -> None:
        self.run.attach(stack)

    # Between steps (see StepMethod).

    def forget(self) -> None:
        self.history: History | None = None
        self._age = 0
        self._error: Tensor | None = None  # relative error per growth of the last forecast that was checked
        self._made: tuple[Tensor, ...] = ()  # predictions of a corrected step as the model made them
        self._last = 0.0  # time of the last computed step
        self._corrects = False
        self.guidance.forget()
        self.correction.forget()

    def prepare(self, run: Run) -> None:
        run.correct, self._made = None, ()
        if run.clock.step == 0:
            run.check_times()
            self._corrects = self._can_correct(run)
        if not run.phase.dense and self._too_far(run):
            run.phase = Phase(1.0)
        if run.phase.dense:
            self.guidance.prepare()
            if self.correction.due:
                assert run.clock.lengths is not None
                self.correction.prepare(run.time - self._last, run.clock.lengths[run.clock.step])
            if self.correction.due:
                run.correct = self._correct
            return
        assert self.history is not None
        forecasts = self.history.forecasts(run.time)
        if self._corrects:
            assert run.clock.lengths is not None
            latest = [values[0] for values in self.history.values]
            age, length = run.time - self._last, run.clock.lengths[run.clock.step]
            self.correction.add(forecasts, latest, age, length)
        run.answer(forecasts)

    def _can_correct(self, run: Run) -> bool:
        """Whether what this run's forecasts miss is made up for; a note in the stats if that was wanted in vain."""
        run.stats.notes.clear()
        if not self.config.correct:
            return False
        if self.config.guidance_every > 1:
            reason = f"guidance_every={self.config.guidance_every} leaves out branches of computed steps"
        elif run.clock.lengths is None:
            reason = (
                f"how far {type(self.target.scheduler).__name__} steps along a prediction is not known (it is for "
                "Euler steps without noise)"
            )
        else:
            return True
        note = f"correct={self.config.correct} has no effect: {reason}"
        run.stats.notes.append(note)
        if self.config.correct is True:
            warnings.warn(f"{note}. correct=False or 'auto' is silent.", AccelWarning, stacklevel=2)
        return False

    def _too_far(self, run: Run) -> bool:
        """Whether a forecast of this step is expected to miss the tolerance."""
        if self.config.tolerance is None:
            return False
        if self._error is None:  # nothing measured yet
            return True
        assert self.history is not None
        age = self.history.age(run.time)
        error = Readback(self._error * growth(age, self.config.order)).read()
        return not error <= self.config.tolerance  # NaN, where nothing can be said, is too far

    def account(self, run: Run) -> StepStats:
        assert run.grid is not None
        tokens = self._blocks * run.grid[0] * run.grid[1]
        if run.phase.dense:
            self.guidance.account()
            self._observe(run)
        self._age = 0 if run.phase.dense else self._age + 1
        assert self.history is not None
        held = memory(self.history, self.guidance.history, *self.correction.tensors)
        return StepStats(tokens, tokens, cache_bytes=held, oldest_age=self._age)

    def _observe(self, run: Run) -> None:
        self._last = run.time
        outputs = self._made if run.correct is not None else run.outputs
        self.correction.forget()
        if self.history is None:
            self.history = History(self.config.order, trend=self.config.trend)
            self.history.start(outputs, run.time)
            return
        run.check_calls(len(outputs), len(self.history.values))
        if self.config.tolerance is not None:
            age = self.history.age(run.time)
            pairs = zip(outputs, self.history.forecasts(run.time), strict=True)
            errors = [(v - f).float().norm() / v.float().norm() for v, f in pairs]
            self._error = torch.stack(errors).max() / growth(age, self.config.order)
        self.history.add(outputs, run.time)

    # Inside the denoiser, possibly traced.

    def _correct(self, prediction: Tensor) -> Tensor:
        call = len(self.run.outputs)
        assert self.history is not None
        self.run.check_calls(max(call + 1, len(self.history.values)), len(self.history.values))
        self._made = (*self._made, prediction)
        return self.correction.apply(call, prediction, self.history.values[call][0])
