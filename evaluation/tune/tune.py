"""The order of things: plain runs, what gaps do, masks without the model, the best few with it, prompts not seen.

A mask's price says which masks are good, within a factor; what they give is only known by running them. So prices choose
what is run, and runs choose what is kept.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel import configs, generation
from accel.core import made_for
from accel.core.capability import denoisers_of, scheduler_of
from accel.core.schedule import Schedule, growing
from accel.errors import ConfigError, UnsupportedError
from accel.evaluation.errors import EvaluationError
from accel.evaluation.metrics.pixel import psnr
from accel.generation import Job
from accel.methods.forecasting import ForecastConfig

from .goal import Goal, Row, Settings, Tuned, name_of
from .masks import Array, Mask, Plain, cheapest, gaps, price
from .measure import Runs, amplification, amplification_at, computed, config_of, cost, probes, schedule_of
from .state import State, rounded

TRENDS = (0.5, 0.75, 1.0)
#: Up to so many steps, which leave few to forecast, computed ones may be computed with the tokens of these presets.
FEW, THIN = 9, ("few-step", "few-step-fast")
SEARCH, HELD = "search", "held-back"
FEWEST, MOST = 4, 12  # prompts; and of each of the two parts
_PROBED = 4  # prompts of the runs with a single gap
_IDENTICAL = 100.0  # dB that stand for no difference at all


Progress = Callable[[tuple[float, float, str]], None]


def tune(
    pipe: Any,
    goal: Goal,
    settings: Settings,
    folder: str | Path,
    progress: Progress = lambda state: None,
) -> Tuned:
    """Find the steps to compute for a pipeline; see `accel.cli.tune` for what is written.

    Args:
        folder: what has been measured; continued if it exists.
        progress: told (done, total, what), in computed steps x images.

    Raises:
        ConfigError: the goal or the settings cannot be.
        UnsupportedError: the pipeline cannot be forecast: its sampler adds noise, ...
        EvaluationError: no mask keeps the goal (the best found is named), or the folder is of other settings.
    """
    return _Tuning(pipe, goal, settings, Path(folder), progress).run()


class _Tuning:
    def __init__(self, pipe: Any, goal: Goal, settings: Settings, folder: Path, progress: Progress) -> None:
        total = settings.call.steps
        assert total is not None
        if len(set(settings.prompts)) < FEWEST:
            raise ConfigError(
                f"{len(set(settings.prompts))} prompts: tuning takes at least {FEWEST} different ones, some of which are "
                "held back to verify; 12 to 24 are better"
            )
        if total < 4:
            raise ConfigError(f"{total} steps leave none to forecast: tune with at least 4 (--steps)")
        if any(other < 4 for other in settings.also):
            raise ConfigError(f"--also {min(settings.also)}: too few steps to leave any out; at least 4")
        if goal.metric == "speedup" and not 1 < goal.value <= total:
            raise ConfigError(
                f"a speedup of {goal.value:g} cannot be: above 1, and at most {total}, the steps of a run"
            )
        generation.check_can_accelerate(pipe, ForecastConfig(schedule=Schedule(growth=0.4), correct="auto"))
        self.goal, self.settings, self.total = goal, settings, total
        jobs = [Job(text, settings.seed + i) for i, text in enumerate(dict.fromkeys(settings.prompts))]
        held = min(max(len(jobs) // 3, 1), MOST)
        self.jobs = {SEARCH: jobs[: len(jobs) - held][:MOST], HELD: jobs[len(jobs) - held :]}
        (_, denoiser), *_ = denoisers_of(pipe)
        self.described = made_for.describe(denoiser, scheduler_of(pipe))
        self.state = State(folder, self._made(pipe))
        self.done, self.what, self.progress = 0.0, "", progress
        self.ahead = 0.0  # what is expected to come after what is going on
        self.until = 0.0
        self.runs = Runs(pipe, settings.call, settings.batch, self._spend)
        self.thin = THIN if total <= FEW and _takes_windows(pipe) else ()
        self.started = time.monotonic()

    def _made(self, pipe: Any) -> dict[str, Any]:
        call = generation.call_in_full(pipe, self.settings.call)
        size = self.settings.call.size
        dtype = str(getattr(denoisers_of(pipe)[0][1], "dtype", "")).removeprefix("torch.")
        return {
            **self.described,
            "call": {**call, "size": None if size is None else f"{size[0]}x{size[1]}", "dtype": dtype},
            "prompts": {name: [[job.prompt, job.seed] for job in jobs] for name, jobs in self.jobs.items()},
        }

    # Progress.

    def _spend(self, units: float) -> None:
        self.done += units
        self.progress((self.done, max(self.until, self.done) + self.ahead, self.what))

    def _begin(self, what: str, units: float, ahead: float) -> None:
        self.what, self.until, self.ahead = what, self.done + units, ahead
        self._spend(0)

    def _size(self, split: str) -> int:
        return len(self.jobs[split])

    # Measuring, or what has been measured.

    def _plain(self, split: str, ahead: float) -> Tensor:
        """Pictures; those of the search with their Gram matrices and ends."""
        known = self.state.pictures(split, self._size(split))
        if split not in (self.state["seconds"] or {}):  # stopped amid the pictures, or right behind them
            known = None
        if known is not None and (split == HELD or self.state["grams"] is not None):
            return known
        self._begin(f"plain, {split}", self._size(split) * self.total, ahead)
        parts = list(self.runs.watched(self.jobs[split]))
        seen, pictures = [s for _, s in parts], torch.cat([made.pictures for made, _ in parts])
        self.state.keep_pictures(split, pictures)
        seconds = {split: [sum(m.denoiser_seconds for m, _ in parts), sum(m.seconds for m, _ in parts)]}
        self.state.keep(seconds={**(self.state["seconds"] or {}), **seconds})
        if split == SEARCH:
            self.state.keep_ends(torch.cat([s.ends_PL for s in seen]))
            plains = [s.plain() for s in seen]
            self.state.keep(
                times=list(map(float, plains[0].times_N)),
                lengths=list(map(float, plains[0].lengths_N)),
                corrects=plains[0].corrects,
                shape=list(seen[0].shape),
                grams=[[rounded(row, 10) for row in gram] for plain in plains for gram in plain.grams_PNN],
            )
        return pictures

    def _of_plain(self) -> Plain:
        times, lengths, grams = (np.asarray(self.state[key]) for key in ("times", "lengths", "grams"))
        return Plain(times, lengths, grams, self.state["corrects"])

    def _amplification(self, plain: Plain, ahead: float) -> Array:
        measured = [tuple(pair) for pair in self.state["amplification"] or []]
        jobs, ends = self.jobs[SEARCH][:_PROBED], self.state.ends()
        assert ends is not None
        places = probes(self.total)
        one = len(jobs) * self.total
        for number, gap in enumerate(places):
            if number < len(measured):
                continue
            self._begin(
                f"what a gap does, {number + 1}/{len(places)}", one, ahead + one * (len(places) - number - 1)
            )
            measured.append(amplification(self.runs, jobs, plain, ends, gap))
            self.state.keep(amplification=measured)
        return amplification_at(measured, plain.times_N)

    def measured(self, split: str, what: Mask | tuple[str, Any], ahead: float = 0.0) -> Row:
        """A mask, or a named configuration, on a part of the prompts."""
        mask = what if isinstance(what, Mask) else None
        name = name_of(mask) if mask else what[0]  # type: ignore[index]
        config = None if mask else what[1]  # type: ignore[index]
        count = cost(mask, self.total) if mask else computed(config, self.total)
        # A preset's name stays, what it does may not.
        settings = "" if mask and not mask.thin else repr(config_of(mask, self.total) if mask else config)
        known = self.state.tried(split, name, self.goal.measured, settings)
        if known is None:
            self._begin(f"{count:g} of {self.total} steps, {split}", count * self._size(split), ahead)
            made = self.runs.made(self.jobs[split], mask, config)
            values = {self.goal.measured: rounded(self._distances(made.pictures, self.pictures[split]))}
            times = {"denoiser_seconds": made.denoiser_seconds, "seconds": made.seconds}
            known = {"split": split, "name": name, "computed": count, "values": values, **times}
            self.state.add({**known, "settings": settings})
        return Row(**{key: known[key] for key in Row.__dataclass_fields__})

    def _distances(self, pictures: Tensor, plain: Tensor) -> list[float]:
        if self.settings.lpips is not None and self.goal.metric == "lpips":
            parts = self.settings.lpips(pictures, plain, [])
            if reasons := {part["reason"] for part in parts if part["value"] is None}:
                raise EvaluationError(
                    f"LPIPS cannot be told: {'; '.join(sorted(reasons))}. Tune at a larger --size, or to --min-psnr"
                )
            return [float(part["value"]) for part in parts]
        return [min(value, _IDENTICAL) for value in psnr(pictures, plain).tolist()]

    # The search.

    def run(self) -> Tuned:
        runs_ahead = 8 * self._size(SEARCH) * self.total / 2 + 2 * self._size(HELD) * self.total
        probing = len(probes(self.total)) * min(_PROBED, self._size(SEARCH)) * self.total
        self.pictures = {SEARCH: self._plain(SEARCH, probing + runs_ahead)}
        plain = self._of_plain()
        amplified = self._amplification(plain, runs_ahead)
        self.prices = {trend: gaps(plain, trend).prices(amplified) for trend in TRENDS}
        self.masks = merged([cheapest(prices, trend) for trend, prices in self.prices.items()])
        rows: list[Row] = []
        if self.goal.metric == "speedup":
            most = self.total / self.goal.value + 1e-9
            whole = self._climbed(self._tried(max(1, int(most)), 5, rows), rows, None)
            closest = max([whole, *self._thin(most)], key=lambda mask: self._closeness(mask, rows))
            options = iter([closest])
        else:
            options = self._fastest(rows)
        self.pictures[HELD] = self._plain(HELD, self._size(HELD) * self.total)
        for mask in options:
            held = self.measured(HELD, mask, self._size(HELD) * len(mask.steps))
            rows.append(held)
            if self.goal.is_met(held.values[self.goal.measured]):
                break
        else:
            raise EvaluationError(self._not_met(rows, "prompts that were held back"))
        rows.append(self.measured(HELD, shipped(cost(mask, self.total), self.total)))
        seconds = self.state["seconds"][HELD]
        return Tuned(
            mask, self.goal, rows, plain, self.described, self.state["made"]["call"], self.masks,
            self.state["shape"], self._others(plain, mask), {"denoiser": seconds[0], "call": seconds[1]},
        )  # fmt: skip

    def _others(self, plain: Plain, chosen: Mask) -> dict[int, Mask]:
        """By the Gram matrices, interpolated in time (the log signal-to-noise ratio), and what gaps do there."""
        found = {}
        for total in self.settings.also:
            there = plain.at(*schedule_of(self.runs, total, self.jobs[SEARCH][0]))
            amplified = amplification_at(self.state["amplification"] or [], there.times_N)
            every = [cheapest(gaps(there, trend).prices(amplified), trend) for trend in TRENDS]
            masks = (masks[0] for _, masks in sorted(merged(every).items()))
            fits = next(mask for mask in masks if mask.price <= chosen.price or len(mask.steps) == total)
            found[total] = replace(fits, thin=chosen.thin if total <= FEW else "")
        return found

    def _fastest(self, rows: list[Row]) -> Iterator[Mask]:
        """Masks that keep the goal on the prompts of the search, fastest first."""
        low, high, best = 0, self.total, None
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._tried(middle, 3, rows, stop=True)
            if self._keeps(tried[0], rows):
                high, best = middle, tried[0]
            else:
                low = middle
        if best is None:
            raise EvaluationError(self._not_met(rows, "the prompts"))
        while high > 2:  # between two of the masks' numbers, neighbours of the cheapest may do
            climbed = self._climbed(self._tried(high - 1, 5, rows, stop=True), rows, self.goal)
            if not self._keeps(climbed, rows):
                break
            high, best = high - 1, climbed
        yield from self._thinnest(cost(best, self.total), rows)
        yield best
        for count in range(high, min(high + 4, self.total)):
            yield from (
                mask for mask in self._tried(count, 3, rows) if mask != best and self._keeps(mask, rows)
            )

    def _thin(self, most: float) -> list[Mask]:
        """The cheapest masks, by price, that compute parts of the tokens, and no more than `most` steps' worth of them."""
        found = []
        for thin in self.thin:
            thinner = [[replace(mask, thin=thin) for mask in masks[:2]] for masks in self.masks.values()]
            fitting = [masks for masks in thinner if cost(masks[0], self.total) <= most]
            longest: list[Mask] = max(fitting, key=lambda masks: len(masks[0].steps))
            found += longest
        return [mask for mask in found if len(mask.steps) > most >= cost(mask, self.total)]

    def _thinnest(self, below: float, rows: list[Row]) -> list[Mask]:
        """Masks that keep the goal on parts of the tokens, for less than `below` steps' worth of them; fastest first."""
        found = []
        for thin in self.thin:
            low, high, best = 1, self.total + 1, None
            while high - low > 1:
                middle = (low + high) // 2
                mask = replace(self.masks[middle][0], thin=thin)
                if cost(mask, self.total) >= below:
                    high = middle
                elif self._keeps(mask, rows):
                    high, best = middle, mask
                else:
                    low = middle
            found += [] if best is None else [best]
        return sorted(found, key=lambda mask: cost(mask, self.total))

    def _row(self, mask: Mask, rows: list[Row]) -> Row:
        row = self.measured(
            SEARCH, mask, 3 * self._size(SEARCH) * len(mask.steps) + self._size(HELD) * self.total
        )
        if row not in rows:
            rows.append(row)
        return row

    def _keeps(self, mask: Mask, rows: list[Row]) -> bool:
        return self.goal.is_met(self._row(mask, rows).values[self.goal.measured])

    def _closeness(self, mask: Mask, rows: list[Row]) -> float:
        """Median and 10th percentile alike: of a dozen prompts the latter alone is one or two of them."""
        values = self._row(mask, rows).values[self.goal.measured]
        return (self.goal.closeness(values) + self.goal.closeness(values, 0.5)) / 2

    def _tried(self, count: int, most: int, rows: list[Row], stop: bool = False) -> list[Mask]:
        """The cheapest masks of this many steps, run; closest first. `stop` at the first that keeps the goal."""
        tried: list[Mask] = []
        for mask in self.masks[count][:most]:
            tried.append(mask)
            if stop and self._keeps(mask, rows):
                return [mask]
        return sorted(tried, key=lambda mask: -self._closeness(mask, rows))

    def _climbed(self, tried: Sequence[Mask], rows: list[Row], goal: Goal | None) -> Mask:
        """From the closest of these, the best of its neighbours, while there is time and they are closer; until the
        goal is kept, if there is one."""
        best = tried[0]
        while self._in_time() and not (goal and self._keeps(best, rows)):
            near = sorted(self._neighbours(best), key=lambda mask: mask.price)[:4]
            options = [best, *self._other_trends(best), *near]
            closest = max(options, key=lambda mask: self._closeness(mask, rows))
            if closest == best:
                break
            best = closest
        return best

    def _neighbours(self, mask: Mask) -> list[Mask]:
        """One step moved by one."""
        found = []
        for i, shift in itertools.product(range(1, len(mask.steps)), (-1, 1)):
            moved = sorted({*mask.steps[:i], mask.steps[i] + shift, *mask.steps[i + 1 :]})
            if len(moved) == len(mask.steps) and moved[-1] < self.total:
                steps = tuple(moved)
                found.append(Mask(steps, mask.trend, price(steps, self.prices[mask.trend])))
        return found

    def _other_trends(self, mask: Mask) -> list[Mask]:
        prices = self.prices.items()
        return [Mask(mask.steps, t, price(mask.steps, p)) for t, p in prices if t != mask.trend]

    def _in_time(self) -> bool:
        return time.monotonic() - self.started < 60 * self.settings.minutes

    def _not_met(self, rows: Sequence[Row], where: str) -> str:
        """What the best of the runs gave."""
        if not rows:
            return f"no mask leaves a step out and keeps {self.goal}"
        best = max(rows, key=lambda row: self.goal.closeness(row.values[self.goal.measured]))
        values = best.values[self.goal.measured]
        return (
            f"nothing faster than the plain pipeline keeps {self.goal} at the 10th percentile on {where}; the best found "
            f"computes {best.computed:g} of {self.total} steps and has {self.goal.said(values)}. Ask for less, or use more steps"
        )


def _takes_windows(pipe: Any) -> bool:
    try:
        generation.check_can_accelerate(pipe, configs.load("few-step"))
    except UnsupportedError:
        return False
    return True


def merged(found: Sequence[dict[int, list[Mask]]]) -> dict[int, list[Mask]]:
    """Of each number of steps all masks, the cheapest first; one that several trends have, once."""
    every: dict[int, list[Mask]] = {}
    for count in found[0]:
        masks = sorted((mask for one in found for mask in one[count]), key=lambda mask: mask.price)
        every[count] = list({mask.steps: mask for mask in reversed(masks)}.values())[::-1]
    return every


def shipped(count: float, total: int) -> tuple[str, Any]:
    """A preset that computes as many steps; where there is none, the rule of the presets with a growth that does, or
    the nearest."""
    few = ("few-step", "few-step-fast") if total <= FEW and count % 1 else ()
    for name in ("quality", "balanced", "fast", "draft", *few):
        config = configs.load(name)
        if computed(config, total) == count:
            return name, config
    growths = np.round(np.arange(0.02, 4, 0.01), 2)
    growth = min(growths, key=lambda value: (abs(len(growing(total, float(value), 0.5)) - count), value))
    config = ForecastConfig(schedule=Schedule(growth=float(growth)), trend=0.75, correct="auto")
    return f"growth {growth:g}, tail 0.5, trend 0.75", config
