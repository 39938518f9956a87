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

from accel.core.checks import check, check_used, is_number, is_share, is_whole
from accel.core.schedule import Schedule
from accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Settings of whole-step forecasts.

    Attributes:
        cycle: for each step between the dense first and last ones, repeated: 1 computes it, 0 forecasts it.
            (0, 0, 1) computes every third step, (1,) all of them, for `guidance_every`.
        late_cycle: takes the place of `cycle` once this share of all steps is over, `late_from`, in (0, 1), and
            the cycle that runs is complete: early, predictions change faster. None: the same.
        growth, tail: in place of a cycle, for any number of steps N: after step i, the next to be computed is
            round(min(growth i, tail (N - i) + 1)) further on, at least one, so that gaps grow with the step and shrink
            again at the end. 0.42 and 0.5 compute 10 of 24 steps: 0 to 4, 6, 9, 13, 18, 22.
        steps: in place of a cycle, the steps that are computed, rising from 0 (`accel tune` finds them).
        total: the number of steps of the runs that `steps` are for; others are refused. None: any that has them all.
        made_for: the side-car of a tuned preset (JSON, written by `accel tune`): the pipeline is checked to be the one
            that it was tuned on. In a preset's file, relative to it.
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
        dense_steps_first, dense_steps_last: steps at either end of a cycle's that are computed.

    Raises:
        ConfigError: a value is outside its range.
    """

    cycle: tuple[int, ...] = (0, 0, 1)
    late_cycle: tuple[int, ...] | None = None
    late_from: float = 0.5
    growth: float | None = None
    tail: float = 0.5
    steps: tuple[int, ...] | None = None
    total: int | None = None
    made_for: str | None = None
    order: int = 1
    trend: float = 1.0
    tolerance: float | None = None
    correct: bool | Literal["auto"] = False
    guidance_every: int = 1
    dense_steps_first: int = 2
    dense_steps_last: int = 1

    def __post_init__(self) -> None:
        for name in ("cycle", "late_cycle", "steps"):
            if isinstance(getattr(self, name), list):  # YAML has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("cycle", "late_cycle"):
            value = getattr(self, name)
            valid = isinstance(value, tuple) and len(value) > 0
            valid = valid and all(is_number(b) and b in (0, 1) for b in value)
            valid = valid or (name == "late_cycle" and value is None)
            check(valid, name, "a list of 1 (compute) and 0 (forecast)", value)
        check(is_share(self.late_from), "late_from", "in (0, 1)", self.late_from)
        self._check_source()
        check_used(self, ("late_from",), self.late_cycle is not None, "there is no late_cycle")
        valid = is_whole(self.guidance_every) and self.guidance_every >= 1
        check(valid, "guidance_every", "a whole number >= 1", self.guidance_every)
        forecasts = not self._cycled or not all((*self.cycle, *(self.late_cycle or ())))
        computes = not self._cycled or any((*self.cycle, *(self.late_cycle or ())))
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

    @property
    def _cycled(self) -> bool:
        return self.growth is None and self.steps is None

    def _check_source(self) -> None:
        """One of a cycle, growth and steps says which steps are computed."""
        check_used(self, ("tail",), self.growth is not None, "there is no growth")
        check_used(self, ("total",), self.steps is not None, "there are no steps")
        valid = self.made_for is None or (isinstance(self.made_for, str) and self.made_for != "")
        check(valid, "made_for", "the path of a side-car, or none", self.made_for)
        if self._cycled:
            return
        source = "steps" if self.growth is None else "growth"
        others = ("cycle", "late_cycle", "dense_steps_first", "dense_steps_last")
        why = f"{source} says of every step whether it is computed"
        check_used(self, others if source == "steps" else (*others, "steps"), False, why)
        self.schedule()  # which knows their ranges

    def schedule(self) -> Schedule:
        if not self._cycled:
            return Schedule(
                guidance_every=self.guidance_every,
                growth=self.growth,
                tail=self.tail,
                steps=() if self.steps is None else self.steps,
                total=self.total,
            )
        return Schedule(
            self.cycle,
            dense_first=self.dense_steps_first,
            dense_last=self.dense_steps_last,
            guidance_every=self.guidance_every,
            late_cycle=self.late_cycle,
            late_from=self.late_from,
        )
