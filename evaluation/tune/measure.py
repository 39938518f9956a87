"""What tuning runs: the plain pipeline, watched; masks; and runs with a single gap, for what a gap does to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel import configs, generation
from accel.core import samplers
from accel.core.capability import scheduler_of
from accel.core.clock import Clock, Listener
from accel.core.schedule import Schedule
from accel.errors import UnsupportedError
from accel.generation import Job
from accel.methods.forecasting import ForecastConfig
from accel.methods.merging import TokenMergingConfig

from .masks import Array, Mask, Plain, gaps

#: Where single gaps begin, of 24 steps: close to the start, where what a gap does to the end changes quickly.
_PROBES = (1, 2, 3, 4, 6, 10, 16)


@dataclass(frozen=True)
class Made:
    """Pictures (P, 3, H, W) uint8 of P prompts, and the seconds of the denoiser and of the whole calls."""

    pictures: Tensor
    denoiser_seconds: float
    seconds: float


@dataclass(frozen=True)
class Seen:
    """What the sampler was given in runs of P prompts: `given_PNL`, N steps of L numbers; and when the steps were.

    Attributes:
        shape: of one image's prediction.
        known: how far each step goes along a prediction is known of the scheduler, so that forecasts are corrected.
    """

    given_PNL: Tensor
    times_N: Array
    lengths_N: Array
    shape: tuple[int, ...]
    known: bool

    @property
    def ends_PL(self) -> Tensor:
        """What the steps add up to."""
        return torch.einsum("pnl,n->pl", self.given_PNL, torch.from_numpy(self.lengths_N).float())

    def plain(self) -> Plain:
        given = self.given_PNL.double()
        return Plain(self.times_N, self.lengths_N, (given @ given.mT).numpy(), self.known)


class Watch(Listener):
    """Keeps what the sampler is given at every step of a run, on the host."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.given: list[Tensor] = []

    def begin(self, clock: Clock) -> None:
        self.given, self.times, self.lengths = [], clock.times, clock.lengths
        reason = samplers.unsteady(self.scheduler, clock.times, clock.timesteps)
        if reason is not None:
            raise UnsupportedError(f"{type(self.scheduler).__name__} {reason}. {samplers.OTHER}")

    def after(self, clock: Clock) -> None:
        if clock.noise is not None:
            raise UnsupportedError(
                f"{type(self.scheduler).__name__} {clock.noise}: masks are priced by what predictions add up to, which is not "
                f"all that the picture is then made of. {samplers.OTHER} Or take a preset as it is: forecasts run under most "
                "samplers that add noise"
            )
        if not isinstance(clock.model_output, Tensor):
            raise UnsupportedError(
                f"{type(self.scheduler).__name__} is given no tensor: there is nothing to tune on"
            )
        self.given.append(clock.model_output.detach().float().cpu())

    @property
    def how_far(self) -> tuple[float, ...]:
        """Each step goes; of schedulers that do not take Euler's, how much noise it takes away stands for that."""
        if self.lengths is not None:
            return self.lengths
        shares = [1 / (1 + np.exp(time)) for time in self.times]
        return tuple(later - now for now, later in pairwise([*shares, 0.0]))

    def seen(self) -> Seen:
        return Seen(
            torch.stack([given.flatten(1) for given in self.given], 1),
            np.asarray(self.times),
            np.asarray(self.how_far),
            tuple(self.given[0].shape[1:]),
            self.lengths is not None,
        )


@dataclass
class Runs:
    """Runs the pipeline on jobs, in batches.

    Attributes:
        call: how; its `steps` given.
        spend: told how much has been done, in computed steps x images.
    """

    pipe: Any
    call: generation.Settings
    batch: int
    spend: Callable[[float], None] = lambda units: None

    @property
    def total(self) -> int:
        assert self.call.steps is not None
        return self.call.steps

    def made(self, jobs: Sequence[Job], mask: Mask | None = None, config: Any = None) -> Made:
        """Plain; or with a mask, or any configuration."""
        config = config_of(mask, self.total) if mask is not None else config
        share = 1.0 if config is None else computed(config, self.total) / self.total
        pictures, inside, whole = [], 0.0, 0.0
        for members in generation.batches(jobs, self.batch):

            def spent(steps: int, images: int = len(members)) -> None:
                self.spend(steps * images * share)

            done = generation.timed(self.pipe, members, self.call, config, spent)
            pictures.append((done.images * 255).round().byte())
            inside, whole = inside + (done.denoiser_seconds or 0.0), whole + done.seconds
        return Made(torch.cat(pictures), inside, whole)

    def watched(self, jobs: Sequence[Job], config: Any = None) -> Iterator[tuple[Made, Seen]]:
        """The same, batch by batch, with what the sampler was given.

        Raises:
            UnsupportedError: the sampler adds noise, or is not given one row per image.
        """
        for members in generation.batches(jobs, self.batch):
            with watching(self.pipe) as watch:
                made = self.made(members, config=config)
            seen = watch.seen()
            if len(seen.given_PNL) != len(members) or seen.given_PNL.shape[1] != self.total:
                raise UnsupportedError(
                    f"{type(self.pipe).__name__} gave its scheduler {tuple(seen.given_PNL.shape[:2])} predictions for "
                    f"{len(members)} images of {self.total} steps: which is whose cannot be told"
                )
            yield made, seen


@contextmanager
def watching(pipe: Any) -> Iterator[Watch]:
    watch = Watch(scheduler_of(pipe))
    undo = Clock.of(scheduler_of(pipe)).add(watch, pipe)
    try:
        yield watch
    finally:
        undo()


class _Known(Exception):
    """All that was asked for is known: leave the loop before the model is called."""


def schedule_of(runs: Runs, total: int, job: Job) -> tuple[Array, Array]:
    """Times and lengths of a run of `total` steps, without a call of the model."""

    class Stop(Watch):
        def before(self, clock: Clock) -> None:
            raise _Known

    watch = Stop(scheduler_of(runs.pipe))
    undo = Clock.of(scheduler_of(runs.pipe)).add(watch, runs.pipe)
    try:
        generation.run(runs.pipe, [job], replace(runs.call, steps=total))
    except _Known:
        return np.asarray(watch.times), np.asarray(watch.how_far)
    finally:
        undo()
    raise AssertionError("a loop that never began")


def config_of(mask: Mask, total: int) -> ForecastConfig | TokenMergingConfig:
    """The configuration of a mask for runs of `total` steps."""
    if not mask.thin:
        return ForecastConfig(
            schedule=Schedule(steps=mask.steps, total=total), trend=mask.trend, correct="auto"
        )
    preset = configs.load(mask.thin)
    phases = preset.full_schedule.phases(total)
    budgets = tuple(phases[step].budget if step in mask.steps else 0.0 for step in range(1, total))
    schedule = preset.schedule.changed(cycle=budgets, dense_first=1, dense_last=0)
    return replace(preset, schedule=schedule, ratio=TokenMergingConfig.ratio, order=int(0 in budgets))


def cost(mask: Mask, total: int) -> float:
    """In steps that compute everything."""
    return computed(config_of(mask, total), total) if mask.thin else len(mask.steps)


def computed(config: Any, total: int) -> float:
    """Steps that a configuration computes, one on a part of the tokens as that part."""
    return round(sum(phase.budget for phase in config.full_schedule.phases(total)), 4)


def probes(total: int) -> list[tuple[int, int]]:
    """Single gaps (a, c) of a run: two steps of 24 left out, as many in proportion."""
    skipped = max(1, round(total / 12))
    starts = sorted({max(1, round(start * total / 24)) for start in _PROBES})
    return [(a, a + skipped + 1) for a in starts if a + skipped + 1 < total]


def amplification(
    runs: Runs, jobs: Sequence[Job], plain: Plain, ends_PL: Tensor, gap: tuple[int, int]
) -> tuple[float, float]:
    """(time of a, A) of one single gap, not corrected: how far the end of a run is off, over how far the forecast was, as
    a mean of logarithms over prompts."""
    a, c = gap
    steps = tuple(step for step in range(runs.total) if not a < step < c)
    found = gaps(plain, 1.0)
    logs: list[float] = []
    for _, seen in runs.watched(jobs, ForecastConfig(schedule=Schedule(steps=steps, total=runs.total))):
        for off_L in seen.ends_PL - ends_PL[len(logs) : len(logs) + len(seen.given_PNL)]:
            forecast = max(float(found.forecast_PBAC[len(logs), a - 1, a, c]), 1e-30)
            end = float(off_L.double().square().sum())
            logs.append(0.5 * np.log(max(end, 1e-4 * forecast) / forecast))
    return float(plain.times_N[a]), float(np.exp(np.mean(logs)))


def amplification_at(measured: Sequence[tuple[float, float]], times_N: Array) -> Array:
    """Interpolated in time, on a logarithmic scale; before the first and after the last as these."""
    if not measured:  # too few steps for a single gap
        return np.ones(len(times_N))
    times, values = zip(*sorted(measured), strict=True)
    return np.exp(np.interp(times_N, times, np.log(np.maximum(values, 1e-3))))
