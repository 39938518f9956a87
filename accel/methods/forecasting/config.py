"""Whole steps forecast from the last computed ones, at the denoiser's final output only.

The scheme of TaylorSeer (arXiv:2503.06923) on one tensor per call instead of two per layer: memory stays flat,
and the forecast runs along the log signal-to-noise ratio, not along step numbers. The optional tolerance is ours: the
error of a forecast is measured whenever a step is computed, and bounds the steps after it. At the steps that
are computed, the unconditional branch of guidance may be forecast (accel.core.guidance), or what forecasts
missed made up for (accel.methods.forecasting.correction).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accel.core.checks import check, check_used, is_number, is_whole, settings
from accel.core.schedule import Schedule, Scheduled
from accel.errors import ConfigError


@settings
@dataclass(frozen=True, kw_only=True)
class ForecastConfig(Scheduled):
    """Settings of whole-step forecasts.

    Attributes:
        schedule: which steps are computed, by a cycle of 1 (computed) and 0 (forecast), by growth, or one by one. By
            default `Schedule(cycle=(0, 0, 1), dense_first=2, dense_last=1)`; with a cycle, dense_first is at least 1.
            `guidance_every` computes the unconditional branch of classifier-free guidance at every n-th of the computed steps
            in between only, and forecasts how it differs from the conditional one at the others (to `order`, at most 1).
        made_for: the side-car of a tuned preset (JSON, written by `accel tune`): the pipeline is checked to be the one
            that it was tuned on. In a preset's file, relative to it.
        order: degree of the polynomial that is continued, 0 (hold the last prediction), 1 or 2.
        trend: share of the extrapolated change that is believed, in (0, 1]: far ahead a line overshoots. On the
            built-in model 0.5 is better than 1 where five steps in a row are skipped, and worse where two are.
        tolerance: forecast a step only if the error it would have, relative to the prediction, is at most
            this much; else compute it. The error is extrapolated from the one measured at the last computed
            step. The measured value is read once per step in question, which waits for the device. None:
            always as the schedule says.
        correct: at every computed step, make up for what the forecasts before it missed, as far as the line
            between the computed predictions says. Under schedulers that take Euler steps without noise (flow
            matching; predictions of the noise); a warning under others. "auto": where that can be done, else
            without a word but in the stats.

    Raises:
        ConfigError: a value is outside its range.
    """

    DEFAULT = Schedule(cycle=(0, 0, 1), dense_first=2, dense_last=1)
    TAKES = (
        *("cycle", "dense_first", "dense_last", "late_cycle", "late_from"),
        *("growth", "tail", "steps", "total", "guidance_every"),
    )

    made_for: str | None = None
    order: int = 1
    trend: float = 1.0
    tolerance: float | None = None
    correct: bool | Literal["auto"] = False

    def _check(self) -> None:
        for name in ("cycle", "late_cycle"):
            cycle = getattr(self.schedule, name) or ()
            what = "a list of 1 (compute) and 0 (forecast)"
            check(all(b in (0, 1) for b in cycle), f"schedule.{name}", what, cycle)
        self._check_first()
        every, budgets = self.schedule.guidance_every, self.schedule.budgets
        cycle, forecasts = self.schedule.source, 0 in budgets
        check_used(self.schedule, ("guidance_every",), 1 in budgets, f"{cycle} computes no step", "schedule.")
        if not forecasts and every == 1:
            raise ConfigError(
                f"{cycle} forecasts nothing: at least one entry must be 0, or schedule.guidance_every above 1"
            )
        valid = self.made_for is None or (isinstance(self.made_for, str) and self.made_for != "")
        check(valid, "made_for", "the path of a side-car, or none", self.made_for)
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        check(is_number(self.trend) and 0 < self.trend <= 1, "trend", "in (0, 1]", self.trend)
        used = forecasts and self.order > 0
        check_used(self, ("trend",), used, f"order={self.order}, {cycle} extrapolate nothing")
        valid = self.tolerance is None or (is_number(self.tolerance) and self.tolerance > 0)
        check(valid, "tolerance", "> 0 or None", self.tolerance)
        check_used(self, ("tolerance",), forecasts, f"{cycle} forecasts no step")
        valid = isinstance(self.correct, bool) or self.correct == "auto"
        check(valid, "correct", "true, false or 'auto'", self.correct)
        if self.correct is True and every > 1:
            raise ConfigError(
                f"correct=True needs both branches at every computed step: schedule.guidance_every={every} must be 1"
            )
