"""Whole steps forecast from the last computed ones, at the denoiser's final output only.

The scheme of TaylorSeer (arXiv:2503.06923) on one tensor per call instead of two per layer: memory stays flat,
and the forecast runs along the log signal-to-noise ratio, not along step numbers. The optional tolerance is ours: the
error of a forecast is measured whenever a step is computed, and bounds the steps after it. At the steps that
are computed, the unconditional branch of guidance may be forecast (accel.methods.guidance).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.clock import Readback
from accel.errors import ConfigError
from accel.run import Run, Target
from accel.schedule import Phase, Schedule
from accel.stats import Stats, StepStats

from .checks import check, is_number, is_share, is_whole
from .forecast import History, growth, memory
from .guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Settings of whole-step forecasts.

    Attributes:
        cycle: for each step between the dense first and last ones, repeated: 1 computes it, 0 forecasts it.
            (0, 0, 1) computes every third step, (1,) all of them, for `guidance_every`.
        late_cycle: takes the place of `cycle` from the step at this share of all on, `late_from`, in (0, 1):
            early, predictions change faster. None: the same.
        order: degree of the polynomial that is continued, 0 (hold the last prediction), 1 or 2.
        tolerance: forecast a step only if the error it would have, relative to the prediction, is at most
            this much; else compute it. The error is extrapolated from the one measured at the last computed
            step. The measured value is read once per step in question, which waits for the device. None:
            always as `cycle` says.
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
    tolerance: float | None = None
    guidance_every: int = 1
    dense_steps_first: int = 2
    dense_steps_last: int = 1

    def __post_init__(self) -> None:
        for name in ("cycle", "late_cycle"):
            if isinstance(getattr(self, name), list):  # YAML has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            valid = isinstance(value, tuple) and len(value) > 0 and all(b in (0, 1) for b in value)
            valid = valid or (name == "late_cycle" and value is None)
            check(valid, name, "a list of 1 (compute) and 0 (forecast)", value)
        check(is_share(self.late_from), "late_from", "in (0, 1)", self.late_from)
        valid = is_whole(self.guidance_every) and self.guidance_every >= 1
        check(valid, "guidance_every", "a whole number >= 1", self.guidance_every)
        if all((*self.cycle, *(self.late_cycle or ()))) and self.guidance_every == 1:
            raise ConfigError(
                f"cycle={self.cycle} forecasts nothing: at least one entry must be 0, or guidance_every above 1"
            )
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        if self.tolerance is not None:
            valid = is_number(self.tolerance) and self.tolerance > 0
            check(valid, "tolerance", "> 0 or None", self.tolerance)
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
        self.config = config
        self._blocks = len(target.adapter.sites(target.denoiser))
        self.run = Run(target, config.schedule(), self, stats, span=False)
        self.run.keep_outputs = True
        self.guidance = Guidance(self.run, min(config.order, 1), halves=True)
        self.forget()

    # Between steps (see accel.run.Method).

    def forget(self) -> None:
        self.history: History | None = None
        self._age = 0
        self._error: Tensor | None = None  # relative error per growth of the last forecast that was checked
        self.guidance.forget()

    def prepare(self, run: Run) -> None:
        if run.clock.step == 0:
            run.check_times()
        if not run.phase.dense and self._too_far(run):
            run.phase = Phase(1.0)
        if run.phase.dense:
            self.guidance.prepare()
            return
        assert self.history is not None
        run.answer(self.history.forecasts(run.time))

    def _too_far(self, run: Run) -> bool:
        """Whether a forecast of this step is expected to miss the tolerance."""
        if self.config.tolerance is None:
            return False
        if self._error is None:  # nothing measured yet
            return True
        assert self.history is not None
        age = self.history.age(run.time)
        return Readback(self._error * growth(age, self.config.order)).read() > self.config.tolerance

    def account(self, run: Run) -> StepStats:
        assert run.grid is not None
        tokens = self._blocks * run.grid[0] * run.grid[1]
        if run.phase.dense:
            self.guidance.account()
            self._observe(run)
        self._age = 0 if run.phase.dense else self._age + 1
        assert self.history is not None
        held = memory(self.history, self.guidance.history)
        return StepStats(tokens, tokens, cache_bytes=held, oldest_age=self._age)

    def _observe(self, run: Run) -> None:
        if self.history is None:
            self.history = History(self.config.order)
            self.history.start(run.outputs, run.time)
            return
        run.check_calls(len(run.outputs), len(self.history.values))
        if self.config.tolerance is not None:
            age = self.history.age(run.time)
            pairs = zip(run.outputs, self.history.forecasts(run.time), strict=True)
            errors = [(v - f).float().norm() / v.float().norm() for v, f in pairs]
            self._error = torch.stack(errors).max() / growth(age, self.config.order)
        self.history.add(run.outputs, run.time)
