"""What whole-step forecasts do at every step of one denoiser; their settings are in `config`."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.core import samplers
from accel.core.capability import require
from accel.core.guidance import Guidance
from accel.core.history import History, growth, memory
from accel.core.made_for import MadeFor
from accel.core.noise_levels import picture_shares
from accel.core.readback import Readback
from accel.core.run import Run, StepMethod
from accel.core.schedule import Phase
from accel.core.target import Target
from accel.errors import AccelWarning, UnsupportedError
from accel.stats import Stats, StepStats

from .config import ForecastConfig
from .correction import Correction
from .linear import Fit

#: Of the trend, where the sampler adds noise: the pictures that steps show differ by their noise, too. Independent Gaussian
#: numbers of three spreads under eight samplers (tests/core/gaussian.py), 24 steps of which 12 are computed: with two thirds
#: nearer to plain than twelve steps of the sampler's own everywhere; with the whole, up to 2.1 times as spread as plain.
_TREND_IN_NOISE = 2 / 3


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
        pictures: what the last computed steps' guided predictions showed; None but under a sampler that adds noise.
    """

    history: History | None = None
    wait: int = 0
    age: int = 0
    error: Tensor | None = None
    made: tuple[Tensor, ...] = ()
    last: float = 0.0
    corrects: bool = False
    fit: Fit = field(default_factory=Fit)
    pictures: History | None = None


class Forecasting(StepMethod):
    """Whole-step forecasts at work on one denoiser."""

    name = "forecast"

    def __init__(self, target: Target, config: ForecastConfig, stats: Stats) -> None:
        require(self.name, {"prediction"}, target.adapter, target.denoiser)
        self.target, self.config = target, config
        self.made_for = MadeFor.of(config.made_for, target)
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

    def noisy(self, run: Run, reason: str) -> None:
        """A forecast's prediction was made for older noise, but the picture it showed can be continued, and what that
        makes of the new noise be given to the sampler (`stepping`)."""
        scheduler, config = run.target.scheduler, self.config
        told = samplers.steps_from_its_sample(scheduler, reason)
        if not told or picture_shares(scheduler, run.time) is None:
            super().noisy(run, reason)
        every, tolerance = config.schedule.guidance_every, config.tolerance
        if every > 1 or tolerance is not None:
            setting = f"schedule.guidance_every={every}" if every > 1 else f"tolerance={tolerance}"
            raise UnsupportedError(
                f"{setting} compares predictions of different steps, and "
                f"{type(scheduler).__name__} {reason} between them. Leave it out, or use a scheduler without noise."
            )

    def stepping(self, run: Run) -> None:
        """Under a sampler that adds noise: learn the picture of a computed step; at a forecast one, let the sampler
        have the prediction that shows the continued picture in the sample as it is now."""
        clock, state = run.clock, self.state
        output, sample = clock.model_output, clock.sample
        if clock.noise is None or not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            return
        self.noisy(run, clock.noise)
        shares = picture_shares(run.target.scheduler, run.time)
        assert shares is not None
        a, b = shares
        channels = sample.shape[1] if output.ndim == sample.ndim > 1 else output.shape[1]
        made, rest = output[:, :channels], output[:, channels:]  # behind it a learned variance
        if run.computed:
            picture = b * made.float() + (a * sample.float() if a else 0)
            if state.pictures is None or run.changed:
                order, trend = min(self.config.order, 1), self.config.trend * _TREND_IN_NOISE
                state.pictures = History(order, trend=trend)
                state.pictures.start((picture,), run.time)
            else:
                state.pictures.add((picture,), run.time)
        elif state.pictures is not None and b:
            (picture,) = state.pictures.forecasts(run.time)
            made = ((picture - a * sample.float() if a else picture) / b).to(output.dtype)
            clock.model_output = torch.cat((made, rest), 1)

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
        held = memory(state.history, state.pictures, self.guidance.history, *self.correction.tensors)
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
