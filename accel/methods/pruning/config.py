"""Token pruning with forecasts: some tokens are computed, the others forecast from their own history.

Between two dense steps the transformer runs on the tokens whose forecasts are expected to be worst, from its
entry to its exit, or not at all. What exists already: keys and values of the others kept, clusters, staleness
(CAT Pruning, arXiv:2502.00433), gathering at the entry and scattering at the exit (RAS, arXiv:2502.10389),
computing some tokens and forecasting the rest (ClusCa, arXiv:2509.10312). What is added: tokens are chosen by
the measured error of their own forecasts, every token is forecast from its own time stamps, and every step has
a budget between 1 and 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle as repeated
from itertools import islice
from typing import Literal

from accel.core.checks import check, check_choice, check_used, is_number, is_share, is_whole, settings
from accel.core.schedule import Schedule, Scheduled
from accel.errors import ConfigError


@settings
@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tokens a partial step computes.

    Attributes:
        score: "error": those whose forecast is expected to be worst, from the error measured whenever a token was
            computed, grown by age^(order + 1) and pooled over 3x3 tokens; "change": those whose prediction has changed most
            since before the last dense step (CAT Pruning); "age": those that have waited longest.
        clusters: give every cluster of tokens a share of the budget, proportional to its score; 0: no clusters.
        clustering: "grid" (rectangles) or "kmeans" (of prediction and position, once per run).
        fresh_share: share of a partial step's tokens that goes to those selected least often of late, whatever
            their score (CAT Pruning: 0.75).
        max_age: no token goes more steps than this without being computed; steps become dense where the
            budgets could not keep it. None: no bound but the schedule's dense steps.

    Raises:
        ConfigError: a value is outside its range, or has no effect.
    """

    score: Literal["error", "change", "age"] = "error"
    clusters: int = 0
    clustering: Literal["grid", "kmeans"] = "grid"
    fresh_share: float = 0.0
    max_age: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "score", ("error", "change", "age"), "selection.")
        check_choice(self, "clustering", ("grid", "kmeans"), "selection.")
        valid = is_whole(self.clusters) and self.clusters >= 0
        check(valid, "selection.clusters", "a whole number >= 0", self.clusters)
        check_used(self, ("clustering",), self.clusters > 0, "clusters is 0", "selection.")
        valid = is_number(self.fresh_share) and 0 <= self.fresh_share <= 1
        check(valid, "selection.fresh_share", "in [0, 1]", self.fresh_share)
        valid = self.max_age is None or (is_whole(self.max_age) and self.max_age >= 1)
        check(valid, "selection.max_age", "a whole number >= 1 or None", self.max_age)


@settings
@dataclass(frozen=True, kw_only=True)
class TokenPruningConfig(Scheduled):
    """Settings of token pruning.

    Attributes:
        budget: share of the tokens that a partial step computes, in (0, 1]. None: 0.25, unless the cycle says.
        selection: which tokens those are.
        schedule: of its cycle, 1 is a dense step, 0 forecasts all tokens, anything between computes that share; by default
            (0, budget), dense at every fourth step. With `refresh_every` every n-th of the steps in between is dense
            whatever the cycle says, at least 2. `guidance_every`: with classifier-free guidance in two calls, compute the
            unconditional branch at every n-th of the steps in between that compute anything only, and forecast how it differs
            from the conditional one at the others (to `order`, at most 1). dense_first is 2 by default and at least
            1, dense_last 1.
        order: degree of the polynomial that continues a token which is not computed: 0 (hold), 1 or 2.
        keys_values: "all" keeps every layer's keys and values, so that computed tokens attend to the whole
            image; "none" lets them attend to text and to each other only, which takes no memory; a share in (0, 1) keeps
            those of that share of the layers, evenly spread, for that share of the memory.
        references: of models that edit, compute the tokens of their reference images at every n-th of the steps that
            compute anything only, from the first on, 0: at the first alone, and let the image attend to their kept
            keys and values at the others. 1: always. With `cycle=(1,)` nothing else is left out, so that it goes
            with runs of four steps.

    Raises:
        ConfigError: a value is outside its range.
    """

    DEFAULT = Schedule(dense_first=2, dense_last=1)
    TAKES = (
        *("cycle", "dense_first", "dense_last", "refresh_every"),
        *("late_cycle", "late_from", "guidance_every"),
    )

    budget: float | None = None
    selection: Selection = Selection()
    order: int = 1
    keys_values: Literal["all", "none"] | float = "all"
    references: int = 1

    def _check(self) -> None:
        valid = self.budget is None or (is_number(self.budget) and 0 < self.budget <= 1)
        check(valid, "budget", "in (0, 1]", self.budget)
        every = self.schedule.refresh_every
        valid = every is None or every >= 2
        check(valid, "schedule.refresh_every", "a whole number >= 2 or None", every)
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        valid = self.keys_values in ("all", "none") or is_share(self.keys_values)
        check(valid, "keys_values", "one of all, none, or a share in (0, 1)", self.keys_values)
        valid = is_whole(self.references) and self.references >= 0
        check(valid, "references", "a whole number >= 0", self.references)
        if self.references != 1 and self.keys_values != "all":
            raise ConfigError(
                "references which are not computed are seen by their kept keys and values: use keys_values='all'"
            )
        self._check_first()
        if self.selection.score == "change" and self.selection.fresh_share < 1:
            first = self.schedule.dense_first
            check(first != 1, "schedule.dense_first", ">= 2 with score='change', which compares two", first)
        self._check_effects()

    def _check_effects(self) -> None:
        budgets = self.full_schedule.budgets
        why = (
            "by schedule.cycle and schedule.refresh_every, the steps compute the shares "
            f"{', '.join(f'{b:g}' for b in budgets)}"
        )
        partial = any(0 < b < 1 for b in budgets)
        check_used(self, ("budget",), self.budget in budgets, why)
        check_used(self, ("keys_values",), partial, why)
        check_used(self.schedule, ("guidance_every",), any(budgets), why, "schedule.")
        check_used(self.selection, ("score", "clusters", "fresh_share"), partial, why, "selection.")

    @property
    def keeps(self) -> bool:
        """Whether keys and values are kept from step to step."""
        partial = any(0 < b < 1 for b in self.full_schedule.budgets)
        return self.keys_values != "none" and (partial or self.references != 1)

    @classmethod
    def cat(cls, budget: float = 0.3, clusters: int = 20) -> TokenPruningConfig:
        """CAT Pruning (arXiv:2502.00433) as published, for comparison: six dense steps, then `budget` of the
        tokens at every step, by the change of the predicted noise and mostly by how rarely they were selected,
        within clusters; the noise of the others is held; never dense again.

        Two differences: the outputs of tokens that are not computed are held at the model's exit, not at every
        attention and MLP; and the change is taken from the step before the last dense one (from the last one
        it would be zero for every token when the first selection is due).
        """
        return cls(
            budget=budget,
            selection=Selection(score="change", clusters=clusters, clustering="kmeans", fresh_share=0.75),
            schedule=Schedule(cycle=(budget,), dense_first=6, dense_last=0),
            order=0,
        )

    @property
    def full_schedule(self) -> Schedule:
        every, late = self.schedule.refresh_every, self.schedule.late_cycle
        cycle: tuple[float, ...] = (0.0, 0.25 if self.budget is None else self.budget)
        if self.schedule.cycle is not None:
            cycle = self.schedule.cycle
        elif every is None:
            every = 4
        late = late and _refreshed(late, self.schedule.refresh_every)
        return replace(self.schedule, cycle=_refreshed(cycle, every), late_cycle=late, refresh_every=None)


def _refreshed(cycle: tuple[float, ...], every: int | None) -> tuple[float, ...]:
    """The cycle repeated or cut to `every` steps, the last of which is dense."""
    return cycle if every is None else (*islice(repeated(cycle), every - 1), 1.0)
