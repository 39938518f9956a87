"""How much to compute at each step. Plain data, decided before the step runs, so that shapes stay static."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accel.errors import ConfigError


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

    `cycle` holds the budgets of the steps between the dense head and the dense tail and is repeated:
    `(0.5,)` is half of the tokens at every step, `(1, 0, 0.25, 0)` a dense step, a forecast, a partial step,
    a forecast.

    Attributes:
        cycle: budgets in [0, 1].
        dense_first, dense_last: number of dense steps at either end.
        refresh_every: refresh at every n-th step that is not dense; 0: at the first one only.
        late_cycle: budgets in place of `cycle` once this share of all steps is over, `late_from`, and the cycle
            that runs is complete; None: the same.
        refresh_at: steps at which to refresh, not `refresh_every`; the first reduced step always does.
        guidance_every: both branches of guidance at every n-th of the steps in between that compute anything,
            counted from the dense head, so that the first of them has one branch; 1: always.
    """

    cycle: tuple[float, ...]
    dense_first: int = 0
    dense_last: int = 0
    refresh_every: int = 0
    refresh_at: tuple[int, ...] = ()
    guidance_every: int = 1
    late_cycle: tuple[float, ...] | None = None
    late_from: float = 0.5

    def __post_init__(self) -> None:
        for name, cycle in (("cycle", self.cycle), ("late_cycle", self.late_cycle)):
            if cycle is not None and not (cycle and all(0 <= b <= 1 for b in cycle)):
                raise ConfigError(f"{name} must hold budgets in [0, 1], got {cycle}")
        for name in ("dense_first", "dense_last", "refresh_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be a whole number >= 0, got {value!r}")
        if not isinstance(self.guidance_every, int) or self.guidance_every < 1:
            raise ConfigError(f"guidance_every must be a whole number >= 1, got {self.guidance_every!r}")

    @property
    def budgets(self) -> tuple[float, ...]:
        """All that occur between the dense steps at either end."""
        return (*self.cycle, *(self.late_cycle or ()))

    @property
    def reduces(self) -> bool:
        """Whether any step computes less than everything."""
        return min(self.budgets) < 1 or self.guidance_every > 1

    def phases(self, total: int) -> tuple[Phase, ...]:
        """The phases of a run of `total` steps."""
        phases, reduced, computed, late = [], 0, 0, self._late(total)
        for step in range(total):
            middle = self.dense_first <= step < total - self.dense_last
            first, cycle = self.dense_first, self.cycle
            if self.late_cycle is not None and step >= late:
                first, cycle = late, self.late_cycle
            budget = cycle[(step - first) % len(cycle)] if middle else 1.0
            computed += middle and budget > 0
            guided = not middle or budget == 0 or _every(self.guidance_every, computed)
            if budget >= 1:
                phases.append(Phase(1.0, guided=guided))
                continue
            due = step in self.refresh_at if self.refresh_at else _every(self.refresh_every, reduced)
            phases.append(Phase(budget, refresh=reduced == 0 or due, guided=guided))
            reduced += 1
        return tuple(phases)

    def _late(self, total: int) -> int:
        """The step at which `late_cycle` takes over. Never within a cycle: with (0, 1) and then (0, 0, 1), three
        forecasts in a row would come where no cycle has as many."""
        # 1e-9: 0.3 x 10 is 3.
        over = max(math.ceil(self.late_from * total - 1e-9) - self.dense_first, 0)
        return self.dense_first + math.ceil(over / len(self.cycle)) * len(self.cycle)


def _every(n: int, count: int) -> bool:
    return n > 0 and count % n == 0


def slots(tokens: int, budget: float, multiple: int = 1) -> int:
    """Number of tokens to compute: budget x tokens, rounded up to a multiple (tensor cores like 16)."""
    # 1e-9: 1 - 0.9 is 0.09999999999999998 and must not cost one token more or less than 0.1.
    wanted = math.ceil(tokens * budget - 1e-9)
    return min(tokens, math.ceil(wanted / multiple) * multiple)
