"""How much to compute at each step. Plain data, decided before the step runs, so that shapes stay static."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from accel.errors import ConfigError

from .checks import check, check_used, is_number, is_share, is_whole, is_wholes, settings


@dataclass(frozen=True)
class Phase:
    """What one step does.

    Attributes:
        budget: share of the tokens to compute, 1 (dense) to 0 (none: forecast only).
        refresh: state that outlives a step (a plan, a reference) is due to be rebuilt at this step.
        guided: both branches of classifier-free guidance are computed, not the conditional one only.
    """

    budget: float
    refresh: bool = False
    guided: bool = True

    @property
    def dense(self) -> bool:
        return self.budget >= 1


@settings
@dataclass(frozen=True)
class Schedule:
    """(step, total) -> Phase.

    What is computed comes from one of three: a `cycle`, `growth`, or a list of `steps`. A configuration's may leave all
    three out where its method has a default.

    Attributes:
        cycle: budgets in [0, 1] of the steps between the dense first and last ones, repeated: `(0.5,)` is half of the
            tokens at every step, `(1, 0, 0.25, 0)` a dense step, a forecast, a partial step, a forecast.
        dense_first, dense_last: number of dense steps at either end of a cycle's. None: the method's default.
        refresh_every: refresh at every n-th step that is not dense; 0: at the first one only. None: the method's default.
        late_cycle: budgets in place of `cycle` once this share of all steps is over, `late_from` in (0, 1), and the cycle
            that runs is complete: early, predictions change faster. None: the same.
        refresh_at: steps at which to refresh, not `refresh_every`; the first reduced step always does.
        guidance_every: both branches of guidance at every n-th of the steps in between that compute anything,
            counted from the dense head, so that the first of them has one branch; 1: always.
        growth, tail: r and q of gaps that grow with the step, for any number of steps (see `growing`): after step i of N,
            the next to be computed is round(min(r i, q (N - i) + 1)) further on. 0.42 and 0.5 compute 10 of 24: 0 to 4,
            6, 9, 13, 18, 22.
        steps: the steps that are computed, from 0, rising (`accel tune` finds them); the others are forecast.
        total: the number of steps of the runs that `steps` are for; None: any that has them all.

    Raises:
        ConfigError: a value is outside its range, or has no effect.
    """

    cycle: tuple[float, ...] | None = None
    dense_first: int | None = None
    dense_last: int | None = None
    refresh_every: int | None = None
    refresh_at: tuple[int, ...] = ()
    guidance_every: int = 1
    late_cycle: tuple[float, ...] | None = None
    late_from: float = 0.5
    growth: float | None = None
    tail: float = 0.5
    steps: tuple[int, ...] | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name in ("cycle", "late_cycle"):
            cycle = getattr(self, name)
            valid = isinstance(cycle, tuple) and cycle and all(is_number(b) and 0 <= b <= 1 for b in cycle)
            check(cycle is None or bool(valid), f"schedule.{name}", "a list of budgets in [0, 1]", cycle)
        for name in ("dense_first", "dense_last", "refresh_every"):
            value = getattr(self, name)
            valid = value is None or (is_whole(value) and value >= 0)
            check(valid, f"schedule.{name}", "a whole number >= 0", value)
        check(is_wholes(self.refresh_at), "schedule.refresh_at", "whole numbers >= 0", self.refresh_at)
        valid = is_whole(self.guidance_every) and self.guidance_every >= 1
        check(valid, "schedule.guidance_every", "a whole number >= 1", self.guidance_every)
        check(is_share(self.late_from), "schedule.late_from", "in (0, 1)", self.late_from)
        for name in ("growth", "tail"):
            value = getattr(self, name)
            valid = (value is None and name == "growth") or (is_number(value) and value > 0)
            check(valid, f"schedule.{name}", "a number > 0", value)
        valid = is_wholes(self.steps) and list(self.steps or ()) == sorted({0, *(self.steps or ())})
        check(self.steps is None or valid, "schedule.steps", "whole numbers that rise from 0", self.steps)
        last = -1 if self.steps is None else self.steps[-1]
        valid = self.total is None or (is_whole(self.total) and self.total > last)
        check(valid, "schedule.total", "a whole number above the last of steps", self.total)
        self._check_effects()

    def _check_effects(self) -> None:
        given = [name for name in ("cycle", "growth", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"a schedule has one of cycle, growth and steps: got {' and '.join(given)}")
        for name, by in (("late_from", "late_cycle"), ("tail", "growth"), ("total", "steps")):
            check_used(self, (name,), getattr(self, by) is not None, f"no {by} is given", "schedule.")
        if not self.cycled:
            why = f"{given[0]} says of every step whether it is computed"
            check_used(self, ("dense_first", "dense_last", "late_cycle"), False, why, "schedule.")
        if self.refresh_at and self.refresh_every is not None:
            raise ConfigError(
                f"schedule.refresh_at={self.refresh_at} and schedule.refresh_every={self.refresh_every} both say when to "
                "refresh: leave one of them out"
            )

    @property
    def cycled(self) -> bool:
        """Whether neither growth nor steps say what is computed."""
        return self.growth is None and self.steps is None

    @property
    def source(self) -> str:
        """What says which steps are computed, for messages."""
        name = next((n for n in ("growth", "steps") if getattr(self, n) is not None), "cycle")
        return f"schedule.{name}={getattr(self, name)}"

    def over(self, default: Schedule) -> Schedule:
        """With what it leaves out as in another one; where growth or steps are given, nothing is."""
        names = ["cycle", "dense_first", "dense_last"] if self.cycled else []
        if self.cycled and not self.refresh_at:
            names.append("refresh_every")
        return replace(self, **{n: getattr(default, n) for n in names if getattr(self, n) is None})

    def changed(self, **values: Any) -> Schedule:
        """With other values. What says anew which steps are computed, or when to refresh, takes the place of what said
        so before, and of what belongs to that."""
        defaults = {f.name: f.default for f in fields(self)}
        gone: dict[str, Any] = {}
        for choices in _EITHER:
            new = [name for name in choices if values.get(name) not in (None, ())]
            if new:
                names = [n for name in choices if name not in new for n in (name, *choices[name])]
                gone |= {name: defaults[name] for name in names}
        if values.get("cycle") is not None:  # the whole of it, not its first part
            gone |= {name: defaults[name] for name in ("late_cycle", "late_from")}
        return replace(self, **{**gone, **values})

    @property
    def budgets(self) -> tuple[float, ...]:
        """All that occur between the dense steps at either end."""
        return (*(self.cycle or ()), *(self.late_cycle or ())) if self.cycled else (1.0, 0.0)

    @property
    def reduces(self) -> bool:
        """Whether any step computes less than everything."""
        return min(self.budgets) < 1 or self.guidance_every > 1

    def phases(self, total: int) -> tuple[Phase, ...]:
        """The phases of a run of `total` steps.

        Raises:
            ConfigError: nothing says what is computed, or `steps` are for runs of another length.
        """
        budgets = self._cycled(total) if self.cycled else self._computed(total)
        first, last = self.dense_first or 0, self.dense_last or 0
        if not self.cycled:
            first = next((step for step, budget in enumerate(budgets) if budget == 0), total)
        phases, reduced, computed = [], 0, 0
        for step, budget in enumerate(budgets):
            middle = first <= step < total - last
            computed += middle and budget > 0
            guided = not middle or budget == 0 or _every(self.guidance_every, computed)
            if budget >= 1:
                phases.append(Phase(1.0, guided=guided))
                continue
            due = step in self.refresh_at if self.refresh_at else _every(self.refresh_every or 0, reduced)
            phases.append(Phase(budget, refresh=reduced == 0 or due, guided=guided))
            reduced += 1
        return tuple(phases)

    def _cycled(self, total: int) -> list[float]:
        if self.cycle is None:
            raise ConfigError(
                "the schedule has neither cycle, growth nor steps: a configuration's full_schedule has"
            )
        budgets, late, start = [1.0] * total, self._late(total, self.cycle), self.dense_first or 0
        for step in range(start, total - (self.dense_last or 0)):
            first, cycle = start, self.cycle
            if self.late_cycle is not None and step >= late:
                first, cycle = late, self.late_cycle
            budgets[step] = cycle[(step - first) % len(cycle)]
        return budgets

    def _computed(self, total: int) -> list[float]:
        steps = (self.steps or (0,)) if self.growth is None else growing(total, self.growth, self.tail)
        if self.growth is None and total != (self.total or max(total, steps[-1] + 1)):
            raise ConfigError(
                f"steps={list(steps)} are for runs of {self.total or f'at least {steps[-1] + 1}'} steps, this one has "
                f"{total}: choose other steps for it (accel tune), or growth, which goes with any number"
            )
        chosen = set(steps)
        return [float(step in chosen) for step in range(total)]

    def _late(self, total: int, cycle: tuple[float, ...]) -> int:
        """The step at which `late_cycle` takes over. Never within a cycle: with (0, 1) and then (0, 0, 1), three
        forecasts in a row would come where no cycle has as many."""
        # 1e-9: 0.3 x 10 is 3.
        first = self.dense_first or 0
        over = max(math.ceil(self.late_from * total - 1e-9) - first, 0)
        return first + math.ceil(over / len(cycle)) * len(cycle)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A configuration with a schedule. `cycle`, `dense_steps_first` and `dense_steps_last` are short for a schedule of
    `cycle`, `dense_first` and `dense_last`.

    Attributes:
        DEFAULT: what a schedule of this method leaves out.
        TAKES: the fields of a schedule that have an effect on it.
    """

    SHORT: ClassVar = {"cycle": "cycle", "dense_steps_first": "dense_first", "dense_steps_last": "dense_last"}
    DEFAULT: ClassVar = Schedule()
    TAKES: ClassVar[tuple[str, ...]] = ()

    schedule: Schedule = Schedule()
    if TYPE_CHECKING:  # `settings` takes them
        cycle: InitVar[tuple[float, ...] | None] = None
        dense_steps_first: InitVar[int | None] = None
        dense_steps_last: InitVar[int | None] = None

    def __post_init__(self, *_: Any) -> None:
        others = [f.name for f in fields(Schedule) if f.name not in self.TAKES]
        why = f"a {type(self).__name__} takes {', '.join(self.TAKES)} of a schedule"
        check_used(self.schedule, others, False, why, "schedule.")
        object.__setattr__(self, "schedule", self.schedule.over(self.DEFAULT))
        self._check()

    def _check(self) -> None:
        """
        Raises:
            ConfigError: a value is outside its range.
        """

    @property
    def full_schedule(self) -> Schedule:
        """With a source, where `schedule` leaves it to other settings."""
        return self.schedule

    def _check_first(self, why: str = "") -> None:
        first = self.schedule.dense_first
        check(first is None or first >= 1, "schedule.dense_first", f"a whole number >= 1{why}", first)


def growing(total: int, growth: float, tail: float) -> tuple[int, ...]:
    """The computed steps of a run of `total`: from step i on, round(min(growth i, tail (total - i) + 1)) further, at
    least one.

    Predictions change ever more slowly on a logarithmic scale of noise, so gaps may grow in proportion to the steps
    that are over; near the end, where what was missed is not made up for any more, they shrink again. The rule was
    read off masks that dynamic programming found at 24 and 50 steps (accel.evaluation.tune does that for a model).
    """
    steps = [0] if total else []
    while (
        steps
        and (
            following := steps[-1]
            + max(1, math.floor(min(growth * steps[-1], tail * (total - steps[-1]) + 1) + 0.5))
        )
        < total
    ):
        steps.append(following)
    return tuple(steps)


#: Fields that exclude each other, and what belongs to each.
_EITHER: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "cycle": ("dense_first", "dense_last", "late_cycle", "late_from"),
        "growth": ("tail",),
        "steps": ("total",),
    },
    {"refresh_every": (), "refresh_at": ()},
)


def _every(n: int, count: int) -> bool:
    return n > 0 and count % n == 0


def slots(tokens: int, budget: float, multiple: int = 1) -> int:
    """Number of tokens to compute: budget x tokens, rounded up to a multiple (tensor cores like 16)."""
    # 1e-9: 1 - 0.9 is 0.09999999999999998 and must not cost one token more or less than 0.1.
    wanted = math.ceil(tokens * budget - 1e-9)
    return min(tokens, math.ceil(wanted / multiple) * multiple)
