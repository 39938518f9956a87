"""What token pruning does at every step of one denoiser; its settings are in `pruning`.

Shapes: B batch, N tokens, G plan rows (1, or one per image), c channels of a prediction.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from accel.core.capability import require
from accel.core.graphs import Held
from accel.core.guidance import Guidance
from accel.core.history import History, growth, memory
from accel.core.keyvalues import Attention, KeyValues
from accel.core.plan import TokenPlan
from accel.core.run import Run, StepMethod
from accel.core.schedule import slots
from accel.core.site import Side, Site
from accel.core.span import Span
from accel.core.target import Target
from accel.errors import AccelWarning, UnsupportedError
from accel.kernels.detail import detail
from accel.stats import Stats, StepStats

from . import references, selection
from .config import TokenPruningConfig


@dataclass
class _State:
    """What one run has learnt.

    Attributes:
        plan: of the running step, for the image's tokens; None: dense.
        sent: the same, and what becomes of the references behind.
        refreshes: the steps at which references are computed.
        history: the last computed prediction of every token; None before the first step.
        rows: G, plans of a batch.
        last_GN: step at which each token was computed last.
        error_GN: measured forecast error per growth(age).
        selected_GN: how often selected of late, halved at every selection.
        labels: cluster of each token, and how many there are.
        before: predictions of the step before the last dense one.
        forecasts: of the running step.
        computed: mask that broadcasts to a prediction.
    """

    plan: TokenPlan | None = None
    sent: TokenPlan | None = None
    refreshes: frozenset[int] = frozenset()
    history: History | None = None
    rows: int = 1
    last_GN: Tensor | None = None
    error_GN: Tensor | None = None
    selected_GN: Tensor | None = None
    labels: tuple[Tensor, int] | None = None
    before: tuple[Tensor, ...] = ()
    forecasts: list[Tensor] = field(default_factory=list)
    computed: Tensor | None = None


class TokenPruning(StepMethod):
    """Token pruning at work on one denoiser."""

    name = "token_pruning"
    alone = True

    def __init__(self, target: Target, config: TokenPruningConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        self._keeps, self.reduces = config.keeps, config.references != 1
        needs = {"tokens", "span", "tokens alone"} | ({"keys and values"} if self._keeps else set())
        require(self.name, needs, target.adapter, target.denoiser)
        assert target.adapter.tokens is not None
        self.tokens = target.adapter.tokens
        self.sites = list(self.tokens.sites(target.denoiser))
        self.run = Run(target, config.full_schedule, self, stats, span=True)
        self.run.keep_outputs = True
        self.guidance = Guidance(self.run, min(config.order, 1), halves=False)
        self.span = Span(
            self._plan_for, pick=True, tokens=lambda: self.run.image_tokens, serves=self.run.serves
        )
        self.kept = KeyValues(self.run.serves)
        attentions = target.adapter.attentions if self._keeps else None
        self.attentions = [] if attentions is None else list(attentions(target.denoiser))
        if isinstance(config.keys_values, float):
            self.attentions = _spread(self.attentions, config.keys_values)
        for attention in self.attentions:
            attention.check(target.denoiser)
        if not (config.full_schedule.reduces or self.reduces):
            warnings.warn("every budget is 1: the pipeline is not accelerated.", AccelWarning, stacklevel=3)
        self.forget()

    def attach(self, stack: ExitStack) -> None:
        denoiser = self.target.denoiser
        if self._keeps:
            self.kept.attach(denoiser, self.attentions, stack)
        # After the hooks on the attentions: those are inside.
        sites = [replace(site, sides=self._sides(site)) for site in self.sites]
        self.span.attach(denoiser, sites, stack, bias=False)
        self.run.attach(stack)

    def _sides(self, site: Site) -> tuple[Side, ...]:
        """What follows the computed tokens into a block: masks over all keys do not, where all keys are kept."""
        inside = [a for a in self.attentions if a.path.startswith(f"{site.path}.")]
        masks = {name for attention in inside for name in attention.masks}
        return tuple(side for side in site.sides if side.name not in masks)

    def compile(self, how: bool | str, stack: ExitStack) -> None:
        super().compile(how, stack)
        stack.callback(self.kept.fix, False)
        self.kept.fix(self.run.compilation is not None and self.run.compilation.graphs is not None)

    # Between steps (see StepMethod).

    def forget(self) -> None:
        self.state = _State()
        self.guidance.forget()
        self.span.clear()
        self.kept.clear()

    def prepare(self, run: Run) -> None:
        step = run.clock.step
        if step == 0:
            run.check_sampler()
            if self._keeps:
                self.kept.follow()
            if self.config.selection.max_age is not None:
                run.phases = selection.bounded(run.phases, self.config.selection.max_age)
            self.state.refreshes = references.refreshes(run.phases, self.config.references)
        run.phase = run.phases[step]
        self.state.plan = self.state.sent = self.kept.plan = run.correct = self.state.computed = None
        self.state.forecasts = []
        computing = [s for s in range(step + 1, len(run.phases)) if run.phases[s].budget > 0]
        # Of each branch, the next step that computes it: a partial one needs what this one makes.
        following = [next(iter(s), None) for s in (computing, [s for s in computing if run.phases[s].guided])]
        partial = any(s is not None and self._leaves_out(s) for s in following)
        self.kept.storing = bool(self.kept.layers) and partial and not self._leaves_out(step)
        if not any(self._leaves_out(s) for s in [step, *computing]):
            self.kept.free()
        if step == 0:
            return
        assert self.state.history is not None
        if not run.phase.dense or self.config.selection.score == "error":
            self.state.forecasts = self.state.history.forecasts(run.time)
        if run.phase.budget == 0:
            run.answer(self.state.forecasts)
            return
        self.guidance.prepare()
        if not run.phase.dense:
            self._select(run)
        self._send(run)

    def _leaves_out(self, step: int) -> bool:
        """Whether tokens are not computed at a step that computes some; before the first is over, there may be
        references."""
        there = self.state.history is None or self.run.references > 0
        return not self.run.phases[step].dense or (there and step not in self.state.refreshes)

    def _send(self, run: Run) -> None:
        assert run.grid is not None
        self.state.sent = references.sent(
            self.state.plan,
            prod(run.grid),
            run.references,
            computed=run.clock.step in self.state.refreshes,
            device=run.outputs[0].device,
        )
        if self.kept.layers:
            self.kept.plan = self.state.sent

    def account(self, run: Run) -> StepStats:
        assert run.grid is not None
        tokens = prod(run.grid)
        computed = (
            0 if run.phase.budget == 0 else tokens if self.state.plan is None else self.state.plan.slots
        )
        beside = run.references if computed and run.clock.step in self.state.refreshes else 0
        if computed:
            self.guidance.account()
        if self.state.history is None:
            self._start(run, tokens)
        elif computed:
            run.check_calls(len(run.outputs), len(self.state.history.values))
            self._learn(run)
        if self.kept.storing:
            self.kept.check(len(run.outputs) - run.branch_skipped)
        assert self.state.history is not None
        assert self.state.last_GN is not None
        blocks = len(self.sites)
        return StepStats(
            blocks * (computed + beside),
            run.tokens,
            built=int(self.state.sent is not None),
            forecast=blocks * (tokens - computed),
            cache_bytes=memory(self.state.history, self.guidance.history, *self._held) + self.kept.bytes,
            oldest_age=(run.clock.step - self.state.last_GN).max(),
        )

    @property
    def _held(self) -> tuple[Tensor | None, ...]:
        """What is kept from step to step beside histories, keys and values."""
        labels_GN = None if self.state.labels is None else self.state.labels[0]
        return (
            *self.state.before,
            self.state.last_GN,
            self.state.error_GN,
            self.state.selected_GN,
            labels_GN,
        )

    def _start(self, run: Run, tokens: int) -> None:
        """State after the first step of a run, when shapes are known."""
        samples, B = run.clock.samples, run.outputs[0].shape[0]
        shared = self.tokens.shared_plan or samples is None or B % samples
        self.state.rows = 1 if shared or samples is None else samples
        self.state.history = History(self.config.order, lambda x_GN: self._spread(x_GN, B))
        self.state.history.start(run.outputs, run.time, (self.state.rows, tokens))
        self.state.last_GN = torch.zeros(
            self.state.rows, tokens, dtype=torch.int64, device=run.outputs[0].device
        )
        self.state.selected_GN = torch.zeros(self.state.rows, tokens, device=run.outputs[0].device)
        if self.config.selection.score == "change":
            self.state.before = run.outputs
        if self.config.references != 1 and not run.references:
            warnings.warn(
                f"references={self.config.references} has nothing to leave out: there are no reference images.",
                AccelWarning,
                stacklevel=2,
            )

    def _learn(self, run: Run) -> None:
        """After a step that computed something: what the forecasts would have missed, and the history."""
        assert self.state.history is not None
        assert self.state.last_GN is not None
        computed_GN = None if self.state.plan is None else self.state.plan.owner[: self.state.rows] >= 0
        if self.config.selection.score == "error":
            missed = [v.float() - f.float() for v, f in zip(run.outputs, self.state.forecasts, strict=True)]
            error_GN = self._magnitude(missed) / growth(self.state.history.age(run.time), self.config.order)
            if computed_GN is not None and self.state.error_GN is not None:
                error_GN = torch.where(computed_GN, error_GN, self.state.error_GN)
            self.state.error_GN = error_GN
        elif self.config.selection.score == "change" and self.state.plan is None:
            self.state.before = tuple(values[0] for values in self.state.history.values)
        self.state.history.add(run.outputs, run.time, computed_GN)
        step = torch.full_like(self.state.last_GN, run.clock.step)
        self.state.last_GN = (
            step if computed_GN is None else torch.where(computed_GN, step, self.state.last_GN)
        )

    # Which tokens

    def _select(self, run: Run) -> None:
        assert run.grid is not None
        assert self.state.last_GN is not None
        assert self.state.selected_GN is not None
        N, B = self.state.last_GN.shape[1], self.state.forecasts[0].shape[0]
        count = slots(N, run.phase.budget, 16 if self.state.last_GN.is_cuda else 1)
        score_GN = self._score(run)
        if self.config.selection.max_age is not None:
            until = selection.next_opportunity(run.phases, run.clock.step) - 1
            score_GN = score_GN.masked_fill(
                until - self.state.last_GN > self.config.selection.max_age, torch.inf
            )
        fresh = round(count * self.config.selection.fresh_share)
        chosen_GK = self._best(run, score_GN, count - fresh)
        if fresh:
            rest_GN = score_GN.scatter(1, chosen_GK, -torch.inf)
            often_GN = self.state.selected_GN.masked_fill(rest_GN.isposinf(), -1.0).scatter(
                1, chosen_GK, torch.inf
            )
            # Without clusters: a small cluster's quota could be zero at every step, its tokens never fresh.
            fresh_GK = selection.best_first(rest_GN, often_GN)[:, :fresh]
            chosen_GK = torch.cat([chosen_GK, fresh_GK], 1)
        self.state.selected_GN = (self.state.selected_GN / 2).scatter_add(
            1, chosen_GK, torch.ones_like(chosen_GK, dtype=self.state.selected_GN.dtype)
        )
        plan = selection.plan_of(chosen_GK, N)
        self.state.computed = self._spread(plan.owner >= 0, B)
        self.state.plan = plan if self.state.rows == 1 else plan.repeat(B // self.state.rows)
        run.correct = self._correct

    def _score(self, run: Run) -> Tensor:
        assert run.grid is not None
        assert self.state.history is not None
        age_GN = self.state.history.age(run.time)
        if self.config.selection.score == "age":
            return age_GN
        latest = [values[0] for values in self.state.history.values]
        if self.config.selection.score == "change":
            return self._magnitude(
                [v.float() - b.float() for v, b in zip(latest, self.state.before, strict=True)]
            )
        if (
            self.state.error_GN is None
        ):  # a single step so far: no forecast could be checked, so where there is detail
            local = [detail(self._tokens(v), run.grid) for v in latest]
            return torch.stack(local).mean(0).unflatten(0, (-1, self.state.rows)).mean(0)
        return selection.pool(self.state.error_GN * growth(age_GN, self.config.order), run.grid)

    def _best(self, run: Run, score_GN: Tensor, count: int) -> Tensor:
        order_GN = selection.best_first(score_GN)
        if not self.config.selection.clusters:
            return order_GN[:, :count]
        if self.state.labels is None:
            self.state.labels = self._cluster(run)
        labels_GN, clusters = self.state.labels
        return selection.balanced(order_GN, score_GN, labels_GN, clusters, count)

    def _cluster(self, run: Run) -> tuple[Tensor, int]:
        """CAT Pruning, section 3.2: clusters of [0.05 x predicted noise, row, column], the latter in [0, 1]."""
        assert run.grid is not None
        assert self.state.history is not None
        device = self.state.history.stamps[0].device
        if self.config.selection.clustering == "grid":
            labels_1N, clusters = selection.grid_clusters(run.grid, self.config.selection.clusters, device)
            return labels_1N.expand(self.state.rows, -1), clusters
        height, width = run.grid
        row, column = torch.meshgrid(
            torch.linspace(0, 1, height, device=device),
            torch.linspace(0, 1, width, device=device),
            indexing="ij",
        )
        place_GN2 = torch.stack([row, column], -1).view(1, -1, 2).expand(self.state.rows, -1, -1)
        noise_GNc = (
            self._tokens(self.state.history.values[0][0]).float().unflatten(0, (-1, self.state.rows)).mean(0)
        )
        features_GNF = torch.cat([0.05 * noise_GNc, place_GN2], -1)
        return selection.kmeans(features_GNF, self.config.selection.clusters), self.config.selection.clusters

    # Between tokens and predictions

    def _tokens(self, prediction: Tensor) -> Tensor:
        assert self.run.grid is not None
        return self.tokens.of(self.target.denoiser, prediction, self.run.grid)

    def _magnitude(self, differences: list[Tensor]) -> Tensor:
        """(G, N): norm per token, over all calls and over the images that share a plan row."""
        norms_BN = torch.stack([self._tokens(d).norm(dim=-1) for d in differences]).mean(0)
        return norms_BN.unflatten(0, (-1, self.state.rows)).mean(0)

    def _spread(self, x_GN: Tensor, batch: int) -> Tensor:
        """(G, N) -> broadcasts to a prediction of this batch."""
        assert self.run.grid is not None
        x_BN = x_GN if self.state.rows == 1 else x_GN.repeat(batch // self.state.rows, 1)
        if self.run.references:  # nobody reads what is predicted for them: as for the last token
            x_BN = torch.cat([x_BN, x_BN[:, -1:].expand(-1, self.run.references)], 1)
        assert self.tokens.spread is not None
        return self.tokens.spread(self.target.denoiser, x_BN, self.run.grid)

    def calls_changed(self, run: Run) -> None:
        raise UnsupportedError(
            f"step {run.clock.step} calls the model in another way than the steps before it (guidance over a part of the "
            "steps): what is kept for each token belongs to other calls. Token pruning needs the same calls at every "
            "step; forecasts (the presets quality, balanced, fast and draft) and merging follow."
        )

    def entering(self, run: Run) -> None:
        self.kept.enter(len(run.outputs))

    def leaving(self, run: Run) -> None:
        self.kept.leave()

    def held(self, run: Run) -> Held:
        key = (len(run.outputs), self.kept.storing)
        attributes = ((self.state, "sent"), (self.kept, "plan"), (self.kept, "passed"))
        return Held(key, attributes, lambda: self.kept.running)

    def keep(self, run: Run) -> None:
        self.kept.clone()

    def check_grid(self, grid: tuple[int, int]) -> None:
        tokens = grid[0] * grid[1]
        if self.config.selection.clusters > tokens:
            raise UnsupportedError(
                f"clusters={self.config.selection.clusters} are more than the {tokens} tokens of this size; "
                f"valid: 0 to {tokens}"
            )

    # Inside the denoiser, possibly traced.

    def _plan_for(self, x_BNC: Tensor) -> TokenPlan | None:
        return self.state.sent if self.run.serves() else None

    def _correct(self, prediction: Tensor) -> Tensor:
        call = len(self.run.outputs)
        self.run.check_calls(max(call + 1, len(self.state.forecasts)), len(self.state.forecasts))
        assert self.state.computed is not None
        return torch.where(self.state.computed, prediction, self.state.forecasts[call])


def _spread(attentions: list[Attention], share: float) -> list[Attention]:
    """This share of them, at least one, at equal distances."""
    count = max(1, round(share * len(attentions)))
    return [attentions[(2 * i + 1) * len(attentions) // (2 * count)] for i in range(count)]
