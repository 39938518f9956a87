"""What whole-step forecasts do at every step of one denoiser; their settings are in `config`."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.core.capability import require
from accel.core.guidance import Guidance
from accel.core.history import History, growth, memory
from accel.core.made_for import MadeFor
from accel.core.readback import Readback
from accel.core.run import Run, StepMethod
from accel.core.schedule import Phase
from accel.core.target import Target
from accel.errors import AccelWarning
from accel.stats import Stats, StepStats

from .config import ForecastConfig
from .correction import Correction
from .linear import Fit


@dataclass
class _State:
    """What one run has learnt.

    Attributes:
        history: the last computed predictions; None before the first.
        wait: steps that have to be computed before the next forecast, after calls have changed.
        age: steps since the last computed one.
        error: relative error per growth of the last forecast that was checked.
        made: predictions of a corrected step as the model made them.
        last: time of the last computed step.
        corrects: what forecasts miss is made up for.
        fit: how the sampler's input follows from the predictions.
    """

    history: History | None = None
    wait: int = 0
    age: int = 0
    error: Tensor | None = None
    made: tuple[Tensor, ...] = ()
    last: float = 0.0
    corrects: bool = False
    fit: Fit = field(default_factory=Fit)


class Forecasting(StepMethod):
    """Whole-step forecasts at work on one denoiser."""

    name = "forecast"

    def __init__(self, target: Target, config: ForecastConfig, stats: Stats) -> None:
        require(self.name, {"prediction"}, target.adapter, target.denoiser)
        self.target, self.config = target, config
        self.made_for = None if config.made_for is None else MadeFor(config.made_for)
        if self.made_for is not None:
            self.made_for.check(target.denoiser, target.scheduler)
        self.run = Run(target, config.full_schedule, self, stats, span=False)
        self.run.keep_outputs = True
        self.guidance = Guidance(self.run, min(config.order, 1), halves=True)
        self.correction = Correction()
        self.state = _State()

    def attach(self, stack: ExitStack) -> None:
        self.run.attach(stack)

    # Between steps (see StepMethod).

    def forget(self) -> None:
        self.state = _State()
        self.guidance.forget()
        self.correction.forget()

    def prepare(self, run: Run) -> None:
        state = self.state
        run.correct, state.made = None, ()
        if run.clock.step == 0:
            run.check_sampler()
            state.corrects = self._can_correct(run)
        if not run.phase.dense and (state.wait or self._too_far(run)):
            run.phase = Phase(1.0)
        if run.phase.dense:
            self.guidance.prepare()
            if self.correction.due:
                assert run.clock.lengths is not None
                self.correction.prepare(run.time - state.last, run.clock.lengths[run.clock.step])
            if self.correction.due:
                run.correct = self._correct
            return
        assert state.history is not None
        forecasts = state.history.forecasts(run.time)
        if state.corrects and (reason := state.fit.wrong()):
            state.corrects = self._cannot_correct(run, reason)
        if state.corrects:
            assert run.clock.lengths is not None
            latest = [values[0] for values in state.history.values]
            age, length = run.time - state.last, run.clock.lengths[run.clock.step]
            self.correction.add(forecasts, latest, age, length)
        run.answer(forecasts)

    def _can_correct(self, run: Run) -> bool:
        """Whether what this run's forecasts miss is made up for; a note in the stats if that was wanted in vain."""
        if not self.config.correct:
            return False
        if self.config.schedule.guidance_every > 1:
            reason = (
                f"guidance_every={self.config.schedule.guidance_every} leaves out branches of computed steps"
            )
        elif run.clock.lengths is None:
            reason = (
                f"how far {type(self.target.scheduler).__name__} steps along a prediction is not known (it is for "
                "Euler steps without noise)"
            )
        else:
            return True
        return self._cannot_correct(run, reason)

    def _cannot_correct(self, run: Run, reason: str) -> bool:
        note = f"correct={self.config.correct} has no effect: {reason}"
        run.stats.notes.append(note)
        if self.config.correct is True:
            warnings.warn(f"{note}. correct=False or 'auto' is silent.", AccelWarning, stacklevel=2)
        return False

    def _too_far(self, run: Run) -> bool:
        """Whether a forecast of this step is expected to miss the tolerance."""
        if self.config.tolerance is None:
            return False
        if self.state.error is None:  # nothing measured yet
            return True
        assert self.state.history is not None
        age = self.state.history.age(run.time)
        error = float(Readback(self.state.error * growth(age, self.config.order)).read())
        return not error <= self.config.tolerance  # NaN, where nothing can be said, is too far

    def account(self, run: Run) -> StepStats:
        state = self.state
        if self.made_for is not None and run.clock.step == 0:
            self.made_for.check_size(run.clock.model_output)
        if run.phase.dense:
            self.guidance.account()
            if state.corrects:
                state.fit.observe(self._of_image(run), run.clock.model_output)
        if run.computed:
            self._observe(run)
        state.age = 0 if run.computed else state.age + 1
        held = memory(state.history, self.guidance.history, *self.correction.tensors)
        return StepStats(run.tokens, run.tokens, cache_bytes=held, oldest_age=state.age)

    def _of_image(self, run: Run) -> tuple[Tensor, ...]:
        """What was predicted, of a sequence the image's tokens: those that the sampler gets."""
        tokens, made = run.target.adapter.tokens, run.clock.model_output
        if tokens is None or run.grid is None or not isinstance(made, Tensor) or made.ndim != 3:
            return run.outputs
        return tuple(tokens.of(run.target.denoiser, output, run.grid) for output in run.outputs)

    def _observe(self, run: Run) -> None:
        """Learn from a step that was computed."""
        state = self.state
        state.last = run.time
        outputs = state.made if run.correct is not None and not run.changed else run.outputs
        self.correction.forget()
        if state.history is not None:
            run.check_calls(len(outputs), len(state.history.values))
        if run.changed and not run.phase.dense:  # some of its calls may have been answered
            state.history, state.wait = None, self.config.order + 1
            return
        if state.history is None or run.changed:
            state.wait = max(state.wait - 1, self.config.order if run.changed else 0)
            state.history = self.remember()
            state.history.start(outputs, run.time)
            return
        state.wait = max(state.wait - 1, 0)
        if self.config.tolerance is not None:
            age = state.history.age(run.time)
            pairs = zip(outputs, state.history.forecasts(run.time), strict=True)
            errors = [(v - f).float().norm() / v.float().norm() for v, f in pairs]
            state.error = torch.stack(errors).max() / growth(age, self.config.order)
        state.history.add(outputs, run.time)

    def remember(self) -> History:
        """What continues the predictions of a run; another forecast's may take its place."""
        return History(self.config.order, trend=self.config.trend)

    # At the denoiser's gate.

    def _correct(self, prediction: Tensor) -> Tensor:
        state, call = self.state, len(self.run.outputs)
        assert state.history is not None
        self.run.check_calls(max(call + 1, len(state.history.values)), len(state.history.values))
        if self.run.changed:
            return prediction
        state.made = (*state.made, prediction)
        return self.correction.apply(call, prediction, state.history.values[call][0])
