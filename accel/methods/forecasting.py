"""Whole steps forecast from the last computed ones, at the denoiser's final output only.

The scheme of TaylorSeer (arXiv:2503.06923) on one tensor per call instead of two per layer: memory stays flat,
and the forecast runs along the log signal-to-noise ratio, not along step numbers. The optional tolerance is ours: the
error of a forecast is measured whenever a step is computed, and bounds the steps after it. At the steps that
are computed, the unconditional branch of guidance may be forecast (accel.methods.guidance), or what forecasts
missed made up for (accel.methods.correction).
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accel.clock import Readback
from accel.errors import AccelWarning, ConfigError
from accel.run import Run, Target
from accel.schedule import Phase, Schedule
from accel.stats import Stats, StepStats

from .checks import check, check_used, is_number, is_share, is_whole
from .correction import Correction
from .forecast import History, growth, memory
from .guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Settings of whole-step forecasts.

    Attributes:
        cycle: for each step between the dense first and last ones, repeated: 1 computes it, 0 forecasts it.
            (0, 0, 1) computes every third step, (1,) all of them, for `guidance_every`.
        late_cycle: takes the place of `cycle` once this share of all steps is over, `late_from`, in (0, 1), and
            the cycle that runs is complete: early, predictions change faster. None: the same.
        order: degree of the polynomial that is continued, 0 (hold the last prediction), 1 or 2.
        trend: share of the extrapolated change that is believed, in (0, 1]: far ahead a line overshoots. On the
            built-in model 0.5 is better than 1 where five steps in a row are skipped, and worse where two are.
        tolerance: forecast a step only if the error it would have, relative to the prediction, is at most
            this much; else compute it. The error is extrapolated from the one measured at the last computed
            step. The measured value is read once per step in question, which waits for the device. None:
            always as `cycle` says.
        correct: at every computed step, make up for what the forecasts before it missed, as far as the line
            between the computed predictions says. Under schedulers that take Euler steps without noise (flow
            matching; predictions of the noise); a warning under others. "auto": where that can be done, else
            without a word but in the stats.
        guidance_every: with classifier-free guidance, compute the unconditional branch at every n-th of the
            steps in between that are computed only, and forecast how it differs from the conditional one at
            the others (to `order`, at most 1). 1: always.
        dense_steps_first, dense_steps_last: steps at either end that are computed.

    Raises:
        ConfigError: a value is outside its range.
    """

    cycle: tuple[int, ...] = (0, 0, 1)
    late_cycle: tuple[int, ...] | None = None
    late_from: float = 0.5
    order: int = 1
    trend: float = 1.0
    tolerance: float | None = None
    correct: bool | Literal["auto"] = False
    guidance_every: int = 1
    dense_steps_first: int = 2
    dense_steps_last: int = 1

    def __post_init__(self) -> None:
        for name in ("cycle", "late_cycle"):
            if isinstance(getattr(self, name), list):  # YAML has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            valid = isinstance(value, tuple) and len(value) > 0
            valid = valid and all(is_number(b) and b in (0, 1) for b in value)
            valid = valid or (name == "late_cycle" and value is None)
            check(valid, name, "a list of 1 (compute) and 0 (forecast)", value)
        check(is_share(self.late_from), "late_from", "in (0, 1)", self.late_from)
        check_used(self, ("late_from",), self.late_cycle is not None, "there is no late_cycle")
        valid = is_whole(self.guidance_every) and self.guidance_every >= 1
        check(valid, "guidance_every", "a whole number >= 1", self.guidance_every)
        forecasts = not all((*self.cycle, *(self.late_cycle or ())))
        computes = any((*self.cycle, *(self.late_cycle or ())))
        check_used(self, ("guidance_every",), computes, f"cycle={self.cycle} computes no step")
        if not forecasts and self.guidance_every == 1:
            raise ConfigError(
                f"cycle={self.cycle} forecasts nothing: at least one entry must be 0, or guidance_every above 1"
            )
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        check(is_number(self.trend) and 0 < self.trend <= 1, "trend", "in (0, 1]", self.trend)
        used = forecasts and self.order > 0
        check_used(self, ("trend",), used, f"order={self.order}, cycle={self.cycle} extrapolate nothing")
        if self.tolerance is not None:
            valid = is_number(self.tolerance) and self.tolerance > 0
            check(valid, "tolerance", "> 0 or None", self.tolerance)
        check_used(self, ("tolerance",), forecasts, f"cycle={self.cycle} forecasts no step")
        valid = isinstance(self.correct, bool) or self.correct == "auto"
        check(valid, "correct", "true, false or 'auto'", self.correct)
        if self.correct is True and self.guidance_every > 1:
            raise ConfigError(
                "correct=True needs both branches at every computed step: "
                f"guidance_every={self.guidance_every} must be 1"
            )
        valid = is_whole(self.dense_steps_first) and self.dense_steps_first >= 1
        check(valid, "dense_steps_first", "a whole number >= 1", self.dense_steps_first)
        valid = is_whole(self.dense_steps_last) and self.dense_steps_last >= 0
        check(valid, "dense_steps_last", "a whole number >= 0", self.dense_steps_last)

    def schedule(self) -> Schedule:
        return Schedule(
            self.cycle,
            dense_first=self.dense_steps_first,
            dense_last=self.dense_steps_last,
            guidance_every=self.guidance_every,
            late_cycle=self.late_cycle,
            late_from=self.late_from,
        )


def attach(target: Target, config: ForecastConfig, stats: Stats, stack: ExitStack) -> Run:
    """Attach whole-step forecasts to a pipeline; every undo action goes onto `stack`."""
    method = Forecasting(target, config, stats)
    method.run.attach(stack)
    return method.run


class Forecasting:
    """Whole-step forecasts at work on one denoiser."""

    def __init__(self, target: Target, config: ForecastConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        self._blocks = len(target.adapter.sites(target.denoiser))
        self.run = Run(target, config.schedule(), self, stats, span=False)
        self.run.keep_outputs = True
        self.guidance = Guidance(self.run, min(config.order, 1), halves=True)
        self.correction = Correction()
        self.forget()

    # Between steps (see accel.run.Method).

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
