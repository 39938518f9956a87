"""Spectrum (Han et al., "Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration", 2026), from the
paper's formulas, for comparison: features as Chebyshev polynomials of time, fitted by ridge regression.

With tau in [-1, 1] along the step numbers, T the Chebyshev polynomials at the last K computed steps and F what was computed
there, the coefficients are C = (T'T + lambda I)^-1 T'F (degree M = 4, lambda = 0.1, K = 10), and the forecast T(tau) C is
mixed half and half with Newton's forward difference. The first five steps are computed, then gaps that grow by 0.75 a
computed step. "At the hidden state" is the paper's own place: what goes into the output layer, which runs at every
step; "at the output" is where accel's forecasts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.core.history import History
from accel.core.run import Run, StepMethod
from accel.core.schedule import Schedule
from accel.core.target import Target
from accel.errors import UnsupportedError
from accel.evaluation.configurations import Configuration
from accel.methods.forecasting import ForecastConfig
from accel.methods.forecasting.engine import Forecasting
from accel.pipelines import registry
from accel.stats import Stats, StepStats

DEGREE, RIDGE, KEPT, MIX = 4, 0.1, 10, 0.5
#: Of the window, by every computed step after the warm-up.
GROWTH = 0.75


def steps(total: int, warm: int = 5, window: float = 2.0, growth: float = GROWTH) -> tuple[int, ...]:
    """The steps that its schedule computes: after the warm-up, every floor(window)-th, and the window grows each time."""
    found, waited = [], 0
    for step in range(total):
        if step < warm or (waited + 1) % int(window) == 0:
            found.append(step)
            window, waited = window + growth * (step >= warm), 0
        else:
            waited += 1
    return tuple(found)


def weights(at: Sequence[float], now: float) -> list[float]:
    """Of the values at these taus, newest first, in the forecast at tau `now`."""
    basis = np.polynomial.chebyshev.chebvander(np.asarray(at), DEGREE)
    inverse = np.linalg.inv(basis.T @ basis + RIDGE * np.eye(DEGREE + 1))
    fitted = np.polynomial.chebyshev.chebvander(np.asarray([now]), DEGREE)[0] @ inverse @ basis.T
    newton = np.zeros(len(at))
    newton[0] = 1.0
    if len(at) > 1:
        ahead = (now - at[0]) / (at[0] - at[1])
        newton[:2] = 1 + ahead, -ahead
    return [float(w) for w in MIX * fitted + (1 - MIX) * newton]


class _Polynomials(History):
    """The last predictions of a loop, continued the paper's way; times are step numbers as taus."""

    def __init__(self, run: Run) -> None:
        super().__init__(order=0)
        self.run = run
        self.taus = [self.tau]

    @property
    def tau(self) -> float:
        return 2 * self.run.clock.step / max(self.run.clock.total - 1, 1) - 1

    def forecasts(self, now: float) -> list[Tensor]:
        mix = weights(self.taus, self.tau)
        return [sum_of(mix, values) for values in self.values]

    def add(self, outputs: Sequence[Tensor], now: float, computed: Tensor | None = None) -> None:
        self.values = [[new, *old][:KEPT] for old, new in zip(self.values, outputs, strict=True)]
        self.taus = [self.tau, *self.taus][:KEPT]


def sum_of(mix: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float32)
    for weight, value in zip(mix, values, strict=True):
        total.add_(value.float(), alpha=weight)
    return total.to(values[0].dtype)


class _AtOutput(Forecasting):
    """Accel's engine, and its correction if that is asked for, around Spectrum's forecast."""

    def remember(self) -> History:
        return _Polynomials(self.run)


class _AtHidden(StepMethod):
    """The forecast of what goes into the output layer, which runs at every step. FLUX's layout."""

    name = "spectrum"

    def __init__(self, target: Target, schedule: Schedule) -> None:
        self.target = target
        if not all(hasattr(target.denoiser, part) for part in ("norm_out", "proj_out", "time_text_embed")):
            raise UnsupportedError(
                f"Spectrum at the hidden state is written for FLUX, not {type(target.denoiser).__name__}"
            )
        self.run = Run(target, schedule, self, Stats(self.name), span=False)
        self.forget()

    def attach(self, stack: ExitStack) -> None:
        model: Any = self.target.denoiser
        stack.callback(model.norm_out.register_forward_pre_hook(self._seen).remove)
        self.run.attach(stack)

    def forget(self) -> None:
        self.history: _Polynomials | None = None
        self.made: list[Tensor] = []

    def _seen(self, module: Any, args: tuple) -> None:
        if self.run.active and self.run.phase.dense:
            self.made.append(args[0].detach().clone())

    def prepare(self, run: Run) -> None:
        self.made = []
        if run.phase.dense:
            return
        assert self.history is not None
        forecasts = iter(self.history.forecasts(run.time))
        run.divert(lambda call, args, kwargs: self._last_layer(next(forecasts), kwargs))

    def _last_layer(self, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        model: Any = self.target.denoiser
        times = kwargs["timestep"].to(hidden.dtype) * 1000
        embedded = model.time_text_embed(times, kwargs["pooled_projections"])
        return (model.proj_out(model.norm_out(hidden, embedded)),)

    def account(self, run: Run) -> StepStats:
        if run.phase.dense:
            if self.history is None:
                self.history = _Polynomials(run)
                self.history.values = [[value] for value in self.made]
            else:
                self.history.add(self.made, run.time)
        return StepStats(int(run.phase.dense), 1)


@dataclass(frozen=True)
class Spectrum(Configuration):
    """Spectrum on a mask of computed steps.

    Attributes:
        hidden: at the hidden state, else at the output.
        correct: with accel's correction; at the output alone.
        computed: the steps that are computed.
    """

    hidden: bool = False
    correct: bool = False
    computed: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        options = {"hidden": self.hidden, "correct": self.correct, "computed": self.computed}
        return {"method": {"type": "Spectrum", **options}, "steps": None}

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        target = StepMethod.take_apart(pipe, registry.find)
        method: StepMethod
        if self.hidden:
            method = _AtHidden(target, Schedule(steps=self.computed))
        else:
            config = ForecastConfig(schedule=Schedule(steps=self.computed), order=0, correct=self.correct)
            method = _AtOutput(target, config, Stats("spectrum"))
        with ExitStack() as stack:
            method.attach(stack)
            yield
