"""Token pruning with forecasts: some tokens are computed, the others forecast from their own history.

Between two dense steps the transformer runs on the tokens whose forecasts are expected to be worst, from its
entry to its exit, or not at all. What exists already: keys and values of the others kept, clusters, staleness
(CAT Pruning, arXiv:2502.00433), gathering at the entry and scattering at the exit (RAS, arXiv:2502.10389),
computing some tokens and forecasting the rest (ClusCa, arXiv:2509.10312). What is added: tokens are chosen by
the measured error of their own forecasts, every token is forecast from its own time stamps, and every step has
a budget between 1 and 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle as repeated
from itertools import islice
from typing import Literal

from accel.core.checks import check, check_used, is_number, is_share, is_whole
from accel.core.schedule import Schedule
from accel.errors import ConfigError

_CHOICES = {
    "score": ("error", "change", "age"),
    "clustering": ("grid", "kmeans"),
}
#: What only partial steps look at.
_PARTIAL = ("score", "clusters", "clustering", "fresh_share", "keys_values")


@dataclass(frozen=True, kw_only=True)
class TokenPruningConfig:
    """Settings of token pruning.

    Attributes:
        budget: share of the tokens that a partial step computes, in (0, 1]. None: 0.25, unless `cycle` says.
        cycle: budgets of the steps between the dense first and last ones, repeated: 1 is a dense step, 0
            forecasts all tokens, anything between computes that share. None: (0, budget), dense at every fourth.
        refresh_every: of the steps in between, every n-th is dense whatever `cycle` says, at least 2. None: as
            `cycle` says; where that is None, 4.
        late_cycle: takes the place of `cycle` once this share of all steps is over, `late_from`, in (0, 1), and
            the cycle that runs is complete: early, predictions change faster. None: the same.
        order: degree of the polynomial that continues a token which is not computed: 0 (hold), 1 or 2.
        score: which tokens are computed. "error": those whose forecast is expected to be worst, from the error
            measured whenever a token was computed, grown by age^(order + 1) and pooled over 3x3 tokens;
            "change": those whose prediction has changed most since before the last dense step (CAT Pruning);
            "age": those that have waited longest.
        clusters: give every cluster of tokens a share of the budget, proportional to its score; 0: no clusters.
        clustering: "grid" (rectangles) or "kmeans" (of prediction and position, once per run).
        fresh_share: share of a partial step's tokens that goes to those selected least often of late, whatever
            their score (CAT Pruning: 0.75).
        max_age: no token goes more steps than this without being computed; steps become dense where the
            budgets could not keep it. None: no bound but the schedule's dense steps.
        keys_values: "all" keeps every layer's keys and values, so that computed tokens attend to the whole
            image; "none" lets them attend to text and to each other only, which takes no memory; a share in (0, 1) keeps
            those of that share of the layers, evenly spread, for that share of the memory.
        references: of models that edit, compute the tokens of their reference images at every n-th of the steps that
            compute anything only, from the first on, 0: at the first alone, and let the image attend to their kept
            keys and values at the others. 1: always. With `cycle=(1,)` nothing else is left out, so that it goes
            with runs of four steps.
        guidance_every: with classifier-free guidance in two calls, compute the unconditional branch at every
            n-th of the steps in between that compute anything only, and forecast how it differs from the
            conditional one at the others (to `order`, at most 1). 1: always.
        dense_steps_first, dense_steps_last: steps at either end that compute all tokens.

    Raises:
        ConfigError: a value is outside its range.
    """

    budget: float | None = None
    cycle: tuple[float, ...] | None = None
    refresh_every: int | None = None
    late_cycle: tuple[float, ...] | None = None
    late_from: float = 0.5
    order: int = 1
    score: Literal["error", "change", "age"] = "error"
    clusters: int = 0
    clustering: Literal["grid", "kmeans"] = "grid"
    fresh_share: float = 0.0
    max_age: int | None = None
    keys_values: Literal["all", "none"] | float = "all"
    references: int = 1
    guidance_every: int = 1
    dense_steps_first: int = 2
    dense_steps_last: int = 1

    def __post_init__(self) -> None:
        for name in ("cycle", "late_cycle"):
            if isinstance(getattr(self, name), list):  # YAML has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            valid = isinstance(value, tuple) and len(value) > 0
            valid = valid and all(is_number(b) and 0 <= b <= 1 for b in value)
            check(value is None or valid, name, "a list of budgets in [0, 1] or None", value)
        check(is_share(self.late_from), "late_from", "in (0, 1)", self.late_from)
        if self.budget is not None:
            check(is_number(self.budget) and 0 < self.budget <= 1, "budget", "in (0, 1]", self.budget)
        if self.refresh_every is not None:
            valid = is_whole(self.refresh_every) and self.refresh_every >= 2
            check(valid, "refresh_every", "a whole number >= 2 or None", self.refresh_every)
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check(value in choices, name, f"one of {', '.join(choices)}", value)
        valid = self.keys_values in ("all", "none") or is_share(self.keys_values)
        check(valid, "keys_values", "one of all, none, or a share in (0, 1)", self.keys_values)
        valid = is_whole(self.clusters) and self.clusters >= 0
        check(valid, "clusters", "a whole number >= 0", self.clusters)
        valid = is_number(self.fresh_share) and 0 <= self.fresh_share <= 1
        check(valid, "fresh_share", "in [0, 1]", self.fresh_share)
        if self.max_age is not None:
            valid = is_whole(self.max_age) and self.max_age >= 1
            check(valid, "max_age", "a whole number >= 1 or None", self.max_age)
        valid = is_whole(self.references) and self.references >= 0
        check(valid, "references", "a whole number >= 0", self.references)
        if self.references != 1 and self.keys_values != "all":
            raise ConfigError(
                "references which are not computed are seen by their kept keys and values: use keys_values='all'"
            )
        valid = is_whole(self.guidance_every) and self.guidance_every >= 1
        check(valid, "guidance_every", "a whole number >= 1", self.guidance_every)
        valid = is_whole(self.dense_steps_first) and self.dense_steps_first >= 1
        check(valid, "dense_steps_first", "a whole number >= 1", self.dense_steps_first)
        valid = is_whole(self.dense_steps_last) and self.dense_steps_last >= 0
        check(valid, "dense_steps_last", "a whole number >= 0", self.dense_steps_last)
        if self.score == "change" and self.fresh_share < 1 and self.dense_steps_first < 2:
            raise ConfigError("score='change' compares two dense steps: dense_steps_first must be at least 2")
        self._check_effects()

    def _check_effects(self) -> None:
        check_used(self, ("late_from",), self.late_cycle is not None, "there is no late_cycle")
        check_used(self, ("clustering",), self.clusters > 0, "clusters is 0")
        budgets = self.schedule().budgets
        shares = (
            f"by cycle and refresh_every, the steps compute the shares {', '.join(f'{b:g}' for b in budgets)}"
        )
        check_used(self, ("budget",), self.budget in budgets, shares)
        check_used(self, ("guidance_every",), any(budgets), shares)
        check_used(self, _PARTIAL, any(0 < b < 1 for b in budgets), shares)

    @property
    def keeps(self) -> bool:
        """Whether keys and values are kept from step to step."""
        partial = any(0 < b < 1 for b in self.schedule().budgets)
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
            cycle=(budget,),
            budget=budget,
            order=0,
            score="change",
            clusters=clusters,
            clustering="kmeans",
            fresh_share=0.75,
            dense_steps_first=6,
            dense_steps_last=0,
        )

    def schedule(self) -> Schedule:
        budget = 0.25 if self.budget is None else self.budget
        cycle, every = self.cycle, self.refresh_every
        if cycle is None:
            cycle, every = (0.0, budget), every or 4
        return Schedule(
            _refreshed(cycle, every),
            dense_first=self.dense_steps_first,
            dense_last=self.dense_steps_last,
            guidance_every=self.guidance_every,
            late_cycle=self.late_cycle and _refreshed(self.late_cycle, self.refresh_every),
            late_from=self.late_from,
        )


def _refreshed(cycle: tuple[float, ...], every: int | None) -> tuple[float, ...]:
    """The cycle repeated or cut to `every` steps, the last of which is dense."""
    return cycle if every is None else (*islice(repeated(cycle), every - 1), 1.0)
