"""Token pruning with forecasts: some tokens are computed, the others forecast from their own history.

Between two dense steps the transformer runs on the tokens whose forecasts are expected to be worst, from its
entry to its exit, or not at all. What exists already: keys and values of the others kept, clusters, staleness
(CAT Pruning, arXiv:2502.00433), gathering at the entry and scattering at the exit (RAS, arXiv:2502.10389),
computing some tokens and forecasting the rest (ClusCa, arXiv:2509.10312). What is added: tokens are chosen by
the measured error of their own forecasts, every token is forecast from its own time stamps, and every step has
a budget between 1 and 0.

Shapes: B batch, N tokens, G plan rows (1, or one per image), c channels of a prediction.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle as repeated
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from accel.errors import AccelWarning, ConfigError, UnsupportedError
from accel.keyvalues import KeyValues
from accel.plan import TokenPlan
from accel.run import Run, Target
from accel.schedule import Schedule, slots
from accel.span import Span
from accel.stats import Stats, StepStats

from . import importance, selection
from .checks import check, check_used, is_number, is_share, is_whole
from .forecast import History, growth, memory
from .guidance import Guidance

_CHOICES = {
    "score": ("error", "change", "age"),
    "clustering": ("grid", "kmeans"),
    "keys_values": ("all", "none"),
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
            image; "none" lets them attend to text and to each other only, which takes no memory.
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
    keys_values: Literal["all", "none"] = "all"
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
        valid = is_whole(self.clusters) and self.clusters >= 0
        check(valid, "clusters", "a whole number >= 0", self.clusters)
        valid = is_number(self.fresh_share) and 0 <= self.fresh_share <= 1
        check(valid, "fresh_share", "in [0, 1]", self.fresh_share)
        if self.max_age is not None:
            valid = is_whole(self.max_age) and self.max_age >= 1
            check(valid, "max_age", "a whole number >= 1 or None", self.max_age)
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
        check_used(self, _PARTIAL, any(0 < b < 1 for b in budgets), shares)

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
        cycle, every = (
            (self.cycle, self.refresh_every) if self.cycle else ((0.0, budget), self.refresh_every or 4)
        )
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


def attach(target: Target, config: TokenPruningConfig, stats: Stats, stack: ExitStack) -> Run:
    """Attach token pruning to a pipeline; every undo action goes onto `stack`."""
    return TokenPruning(target, config, stats).attach(stack)


class TokenPruning:
    """Token pruning at work on one denoiser."""

    def __init__(self, target: Target, config: TokenPruningConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        self.sites = list(target.adapter.sites(target.denoiser))
        self.run = Run(target, config.schedule(), self, stats, span=True)
        self.run.keep_outputs = True
        self.run.keeps_layers = config.keys_values == "all"
        self.guidance = Guidance(self.run, min(config.order, 1), halves=False)
        self.span = Span(self._plan_for, pick=True)
        self.kept = KeyValues(lambda: len(self.run.outputs))
        self.attentions = list(target.adapter.attentions(target.denoiser))
        partial = any(0 < b < 1 for b in config.schedule().budgets)
        self._keeps = config.keys_values == "all" and partial
        if self._keeps and not self.attentions:
            raise UnsupportedError(
                f"keys_values='all': the adapter of {target.adapter.name} does not say where keys and values are "
                "made. Use keys_values='none'."
            )
        if not config.schedule().reduces:
            warnings.warn("every budget is 1: the pipeline is not accelerated.", AccelWarning, stacklevel=4)
        self.forget()

    def attach(self, stack: ExitStack) -> Run:
        denoiser = self.target.denoiser
        if self._keeps:
            self.kept.attach(denoiser, self.attentions, stack)
        # After the hooks on the attentions: those are inside.
        self.span.attach(denoiser, self.sites, stack, bias=False)
        self.run.attach(stack)
        return self.run

    # Between steps (see accel.run.Method).

    def forget(self) -> None:
        self.plan: TokenPlan | None = None
        self.history: History | None = None
        self.rows = 1
        self.last_GN: Tensor | None = None  # step at which each token was computed last
        self.error_GN: Tensor | None = None  # measured forecast error per growth(age)
        self.selected_GN: Tensor | None = None  # how often selected of late, halved at every selection
        self.labels: tuple[Tensor, int] | None = None
        self.before: tuple[Tensor, ...] = ()  # predictions of the step before the last dense one
        self.forecasts: list[Tensor] = []
        self.computed: Tensor | None = None  # mask that broadcasts to a prediction
        self.guidance.forget()
        self.span.clear()
        self.kept.clear()

    def prepare(self, run: Run) -> None:
        step = run.clock.step
        if step == 0:
            run.check_times()
            if self.config.max_age is not None:
                run.phases = selection.bounded(run.phases, self.config.max_age)
        run.phase = run.phases[step]
        self.plan = self.kept.plan = run.correct = self.computed = None
        self.forecasts = []
        computing = [p for p in run.phases[step + 1 :] if p.budget > 0]
        # Of each branch, the next step that computes it: a partial one needs what this one makes.
        following = [next(iter(ps), None) for ps in (computing, [p for p in computing if p.guided])]
        partial = any(p is not None and not p.dense for p in following)
        self.kept.storing = bool(self.kept.layers) and run.phase.dense and partial
        if step == 0:
            return
        assert self.history is not None
        if not run.phase.dense or self.config.score == "error":
            self.forecasts = self.history.forecasts(run.time)
        if run.phase.budget == 0:
            run.answer(self.forecasts)
            return
        self.guidance.prepare()
        if not run.phase.dense:
            self._select(run)

    def account(self, run: Run) -> StepStats:
        assert run.grid is not None
        tokens = run.grid[0] * run.grid[1]
        computed = 0 if run.phase.budget == 0 else tokens if self.plan is None else self.plan.slots
        if computed:
            self.guidance.account()
        if self.history is None:
            self._start(run, tokens)
        elif computed:
            run.check_calls(len(run.outputs), len(self.history.values))
            self._learn(run)
        if self.kept.storing:
            self.kept.check(len(run.outputs) - run.branch_skipped)
        assert self.history is not None
        assert self.last_GN is not None
        blocks = len(self.sites)
        return StepStats(
            blocks * computed,
            blocks * tokens,
            built=int(self.plan is not None),
            forecast=blocks * (tokens - computed),
            cache_bytes=memory(self.history, self.guidance.history, *self._held) + self.kept.bytes,
            oldest_age=(run.clock.step - self.last_GN).max(),
        )

    @property
    def _held(self) -> tuple[Tensor | None, ...]:
        """What is kept from step to step beside histories, keys and values."""
        labels_GN = None if self.labels is None else self.labels[0]
        return (*self.before, self.last_GN, self.error_GN, self.selected_GN, labels_GN)

    def _start(self, run: Run, tokens: int) -> None:
        """State after the first step of a run, when shapes are known."""
        samples, B = run.clock.samples, run.outputs[0].shape[0]
        shared = self.target.adapter.shared_plan or samples is None or B % samples
        self.rows = 1 if shared or samples is None else samples
        self._check_clusters(tokens)  # for compiled calls
        self.history = History(self.config.order, lambda x_GN: self._spread(x_GN, B))
        self.history.start(run.outputs, run.time, (self.rows, tokens))
        self.last_GN = torch.zeros(self.rows, tokens, dtype=torch.int64, device=run.outputs[0].device)
        self.selected_GN = torch.zeros(self.rows, tokens, device=run.outputs[0].device)
        if self.config.score == "change":
            self.before = run.outputs

    def _learn(self, run: Run) -> None:
        """After a step that computed something: what the forecasts would have missed, and the history."""
        assert self.history is not None
        assert self.last_GN is not None
        computed_GN = None if self.plan is None else self.plan.owner[: self.rows] >= 0
        if self.config.score == "error":
            missed = [v.float() - f.float() for v, f in zip(run.outputs, self.forecasts, strict=True)]
            error_GN = self._magnitude(missed) / growth(self.history.age(run.time), self.config.order)
            if computed_GN is not None and self.error_GN is not None:
                error_GN = torch.where(computed_GN, error_GN, self.error_GN)
            self.error_GN = error_GN
        elif self.config.score == "change" and self.plan is None:
            self.before = tuple(values[0] for values in self.history.values)
        self.history.add(run.outputs, run.time, computed_GN)
        step = torch.full_like(self.last_GN, run.clock.step)
        self.last_GN = step if computed_GN is None else torch.where(computed_GN, step, self.last_GN)

    # Which tokens

    def _select(self, run: Run) -> None:
        assert run.grid is not None
        assert self.last_GN is not None
        assert self.selected_GN is not None
        N, B = self.last_GN.shape[1], self.forecasts[0].shape[0]
        count = slots(N, run.phase.budget, 16 if self.last_GN.is_cuda else 1)
        score_GN = self._score(run)
        if self.config.max_age is not None:
            until = selection.next_opportunity(run.phases, run.clock.step) - 1
            score_GN = score_GN.masked_fill(until - self.last_GN > self.config.max_age, torch.inf)
        fresh = round(count * self.config.fresh_share)
        chosen_GK = self._best(run, score_GN, count - fresh)
        if fresh:
            rest_GN = score_GN.scatter(1, chosen_GK, -torch.inf)
            often_GN = self.selected_GN.masked_fill(rest_GN.isposinf(), -1.0).scatter(1, chosen_GK, torch.inf)
            # Without clusters: a small cluster's quota could be zero at every step, its tokens never fresh.
            fresh_GK = selection.best_first(rest_GN, often_GN)[:, :fresh]
            chosen_GK = torch.cat([chosen_GK, fresh_GK], 1)
        self.selected_GN = (self.selected_GN / 2).scatter_add(
            1, chosen_GK, torch.ones_like(chosen_GK, dtype=self.selected_GN.dtype)
        )
        plan = selection.plan_of(chosen_GK, N)
        self.computed = self._spread(plan.owner >= 0, B)
        self.plan = plan.repeat(B // self.rows)
        if self.kept.layers:
            self.kept.plan = self.plan
        run.correct = self._correct

    def _score(self, run: Run) -> Tensor:
        assert run.grid is not None
        assert self.history is not None
        age_GN = self.history.age(run.time)
        if self.config.score == "age":
            return age_GN
        latest = [values[0] for values in self.history.values]
        if self.config.score == "change":
            return self._magnitude([v.float() - b.float() for v, b in zip(latest, self.before, strict=True)])
        if (
            self.error_GN is None
        ):  # a single step so far: no forecast could be checked, so where there is detail
            detail = [importance.local_detail(self._tokens(v), run.grid) for v in latest]
            return torch.stack(detail).mean(0).unflatten(0, (-1, self.rows)).mean(0)
        return selection.pool(self.error_GN * growth(age_GN, self.config.order), run.grid)

    def _best(self, run: Run, score_GN: Tensor, count: int) -> Tensor:
        order_GN = selection.best_first(score_GN)
        if not self.config.clusters:
            return order_GN[:, :count]
        if self.labels is None:
            self.labels = self._cluster(run)
        labels_GN, clusters = self.labels
        return selection.balanced(order_GN, score_GN, labels_GN, clusters, count)

    def _cluster(self, run: Run) -> tuple[Tensor, int]:
        """CAT Pruning, section 3.2: clusters of [0.05 x predicted noise, row, column], the latter in [0, 1]."""
        assert run.grid is not None
        assert self.history is not None
        device = self.history.stamps[0].device
        if self.config.clustering == "grid":
            labels_1N, clusters = selection.grid_clusters(run.grid, self.config.clusters, device)
            return labels_1N.expand(self.rows, -1), clusters
        height, width = run.grid
        row, column = torch.meshgrid(
            torch.linspace(0, 1, height, device=device),
            torch.linspace(0, 1, width, device=device),
            indexing="ij",
        )
        place_GN2 = torch.stack([row, column], -1).view(1, -1, 2).expand(self.rows, -1, -1)
        noise_GNc = self._tokens(self.history.values[0][0]).float().unflatten(0, (-1, self.rows)).mean(0)
        features_GNF = torch.cat([0.05 * noise_GNc, place_GN2], -1)
        return selection.kmeans(features_GNF, self.config.clusters), self.config.clusters

    # Between tokens and predictions

    def _tokens(self, prediction: Tensor) -> Tensor:
        return self.target.adapter.output_tokens(self.target.denoiser, prediction)

    def _magnitude(self, differences: list[Tensor]) -> Tensor:
        """(G, N): norm per token, over all calls and over the images that share a plan row."""
        norms_BN = torch.stack([self._tokens(d).norm(dim=-1) for d in differences]).mean(0)
        return norms_BN.unflatten(0, (-1, self.rows)).mean(0)

    def _spread(self, x_GN: Tensor, batch: int) -> Tensor:
        """(G, N) -> broadcasts to a prediction of this batch."""
        assert self.run.grid is not None
        x_BN = x_GN if self.rows == 1 else x_GN.repeat(batch // self.rows, 1)
        return self.target.adapter.per_token(self.target.denoiser, x_BN, self.run.grid)

    def _check_clusters(self, tokens: int) -> None:
        if self.config.clusters > tokens:
            raise UnsupportedError(
                f"clusters={self.config.clusters} are more than the {tokens} tokens of this size; "
                f"valid: 0 to {tokens}"
            )

    # Inside the denoiser, possibly traced.

    def _plan_for(self, x_BNC: Tensor) -> TokenPlan | None:
        if not torch.compiler.is_compiling():
            self._check_clusters(x_BNC.shape[1])
        return self.plan

    def _correct(self, prediction: Tensor) -> Tensor:
        call = len(self.run.outputs)
        self.run.check_calls(max(call + 1, len(self.forecasts)), len(self.forecasts))
        assert self.computed is not None
        return torch.where(self.computed, prediction, self.forecasts[call])
