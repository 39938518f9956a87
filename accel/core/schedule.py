"""How much to compute at each step. Plain data, decided before the step runs, so that shapes stay static."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accel.errors import ConfigError

from .checks import is_number, is_whole, is_wholes


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


@dataclass(frozen=True)
class Schedule:
    """(step, total) -> Phase.

    What is computed comes from one of three: a `cycle`, `growth`, or a list of `steps`.

    `cycle` holds the budgets of the steps between the dense head and the dense tail and is repeated:
    `(0.5,)` is half of the tokens at every step, `(1, 0, 0.25, 0)` a dense step, a forecast, a partial step,
    a forecast.

    Attributes:
        cycle: budgets in [0, 1].
        dense_first, dense_last: number of dense steps at either end of a cycle's.
        refresh_every: refresh at every n-th step that is not dense; 0: at the first one only.
        late_cycle: budgets in place of `cycle` once this share of all steps is over, `late_from`, and the cycle
            that runs is complete; None: the same.
        refresh_at: steps at which to refresh, not `refresh_every`; the first reduced step always does.
        guidance_every: both branches of guidance at every n-th of the steps in between that compute anything,
            counted from the dense head, so that the first of them has one branch; 1: always.
        growth, tail: r and q of gaps that grow with the step, for any number of steps (see `growing`).
        steps: the steps that are computed, from 0, rising; the others are forecast.
        total: the number of steps of the runs that `steps` are for; None: any that has them all.
    """

    cycle: tuple[float, ...] = ()
    dense_first: int = 0
    dense_last: int = 0
    refresh_every: int = 0
    refresh_at: tuple[int, ...] = ()
    guidance_every: int = 1
    late_cycle: tuple[float, ...] | None = None
    late_from: float = 0.5
    growth: float | None = None
    tail: float = 0.5
    steps: tuple[int, ...] = ()
    total: int | None = None

    def __post_init__(self) -> None:
        self._check_source()
        for name, cycle in (("cycle", self.cycle), ("late_cycle", self.late_cycle)):
            missing = cycle is None or (cycle == () and name == "cycle")
            if not missing and not (cycle and all(0 <= b <= 1 for b in cycle)):
                raise ConfigError(f"{name} must hold budgets in [0, 1], got {cycle}")
        for name in ("dense_first", "dense_last", "refresh_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be a whole number >= 0, got {value!r}")
        if not isinstance(self.guidance_every, int) or self.guidance_every < 1:
            raise ConfigError(f"guidance_every must be a whole number >= 1, got {self.guidance_every!r}")

    def _check_source(self) -> None:
        named = {"cycle": self.cycle != (), "growth": self.growth is not None, "steps": self.steps != ()}
        given = [name for name, there in named.items() if there]
        if len(given) != 1:
            found = "got none" if not given else f"got {' and '.join(given)}"
            raise ConfigError(f"a schedule has one of cycle (budgets in [0, 1]), growth and steps: {found}")
        if not self.cycle and (self.dense_first or self.dense_last or self.late_cycle is not None):
            raise ConfigError(
                f"{given[0]} says of every step whether it is computed: leave dense_first, dense_last and late_cycle out"
            )
        for name, value in (("growth", self.growth), ("tail", self.tail)):
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigError(f"{name} must be a number > 0, got {value!r}")
        valid = is_wholes(self.steps) and list(self.steps) == sorted({0, *self.steps})
        if self.steps and not valid:
            raise ConfigError(f"steps must be whole numbers that rise from 0, got {self.steps!r}")
        if self.total is not None and not (
            self.steps and is_whole(self.total) and self.total > self.steps[-1]
        ):
            raise ConfigError(f"total must be a whole number above the last of steps, got {self.total!r}")

    @property
    def budgets(self) -> tuple[float, ...]:
        """All that occur between the dense steps at either end."""
        return (*self.cycle, *(self.late_cycle or ())) or (1.0, 0.0)

    @property
    def reduces(self) -> bool:
        """Whether any step computes less than everything."""
        return min(self.budgets) < 1 or self.guidance_every > 1

    def phases(self, total: int) -> tuple[Phase, ...]:
        """The phases of a run of `total` steps.

        Raises:
            ConfigError: `steps` are for runs of another length.
        """
        budgets = self._cycled(total) if self.cycle else self._computed(total)
        first, last = self.dense_first, self.dense_last
        if not self.cycle:
            first = next((step for step, budget in enumerate(budgets) if budget == 0), total)
        phases, reduced, computed = [], 0, 0
        for step, budget in enumerate(budgets):
            middle = first <= step < total - last
            computed += middle and budget > 0
            guided = not middle or budget == 0 or _every(self.guidance_every, computed)
            if budget >= 1:
                phases.append(Phase(1.0, guided=guided))
                continue
            due = step in self.refresh_at if self.refresh_at else _every(self.refresh_every, reduced)
            phases.append(Phase(budget, refresh=reduced == 0 or due, guided=guided))
            reduced += 1
        return tuple(phases)

    def _cycled(self, total: int) -> list[float]:
        budgets, late = [1.0] * total, self._late(total)
        for step in range(self.dense_first, total - self.dense_last):
            first, cycle = self.dense_first, self.cycle
            if self.late_cycle is not None and step >= late:
                first, cycle = late, self.late_cycle
            budgets[step] = cycle[(step - first) % len(cycle)]
        return budgets

    def _computed(self, total: int) -> list[float]:
        steps = self.steps if self.growth is None else growing(total, self.growth, self.tail)
        if self.growth is None and total != (self.total or max(total, steps[-1] + 1)):
            raise ConfigError(
                f"steps={list(steps)} are for runs of {self.total or f'at least {steps[-1] + 1}'} steps, this one has "
                f"{total}: choose other steps for it (accel tune), or growth, which goes with any number"
            )
        chosen = set(steps)
        return [float(step in chosen) for step in range(total)]

    def _late(self, total: int) -> int:
        """The step at which `late_cycle` takes over. Never within a cycle: with (0, 1) and then (0, 0, 1), three
        forecasts in a row would come where no cycle has as many."""
        # 1e-9: 0.3 x 10 is 3.
        over = max(math.ceil(self.late_from * total - 1e-9) - self.dense_first, 0)
        return self.dense_first + math.ceil(over / len(self.cycle)) * len(self.cycle)


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


def _every(n: int, count: int) -> bool:
    return n > 0 and count % n == 0


def slots(tokens: int, budget: float, multiple: int = 1) -> int:
    """Number of tokens to compute: budget x tokens, rounded up to a multiple (tensor cores like 16)."""
    # 1e-9: 1 - 0.9 is 0.09999999999999998 and must not cost one token more or less than 0.1.
    wanted = math.ceil(tokens * budget - 1e-9)
    return min(tokens, math.ceil(wanted / multiple) * multiple)
