"""Cached token merging at work: when plans are built, from what, and how predictions are unmerged.

Shapes: B batch, N tokens, K slots, C channels, c channels of a prediction, G plan rows.
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from accel.core.capability import require
from accel.core.graphs import Held
from accel.core.history import History, memory
from accel.core.made_for import MadeFor
from accel.core.plan import TokenPlan
from accel.core.readback import Readback, put_into
from accel.core.run import Run, StepMethod
from accel.core.schedule import slots
from accel.core.site import Site
from accel.core.span import Span
from accel.core.target import Target
from accel.core.weighted_attention import weighed
from accel.errors import AccelWarning, UnsupportedError
from accel.kernels.detail import detail
from accel.kernels.match import match
from accel.methods import decoder, importance, windows
from accel.methods.learned import Adapter
from accel.stats import Stats, StepStats

from . import matching, noise
from .config import TokenMergingConfig


@dataclass
class _State:
    """What one run has learnt.

    Attributes:
        draw: number of the last random draw, on the device.
        guidance: how much guidance changed each token's prediction, (images, N); None: not known.
        history: the last predictions; None before the first step.
        forecasts: of the running step.
        growths: of the merging errors of all groups, on their way to the host.
        noise: why nothing can be carried from step to step; None: it can.
        weighed: how often keys had been weighed before the running step.
    """

    draw: Tensor
    guidance: Tensor | None = None
    history: History | None = None
    forecasts: list[Tensor] = field(default_factory=list)
    growths: list[Readback] = field(default_factory=list)
    noise: str | None = None
    weighed: Counter[str] = field(default_factory=Counter)


class TokenMerging(StepMethod):
    """Cached merging at work on one denoiser: a plan per group of layers, and when to rebuild them."""

    name = "token_merging"

    def __init__(self, target: Target, config: TokenMergingConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        self.made_for = MadeFor.of(config.made_for, target)
        needs = {"tokens"} | ({"key bias"} if config.proportional else set())
        require(self.name, needs, target.adapter, target.denoiser)
        takes_bias = "key bias" in target.adapter.has(target.denoiser)
        self.bias = config.windows and takes_bias if config.proportional is None else config.proportional
        assert target.adapter.tokens is not None
        self.tokens = target.adapter.tokens
        sites = list(self.tokens.sites(target.denoiser))
        scales = sorted({site.scale for site in sites})[: config.resolutions]
        self.sites = [site for site in sites if site.scale in scales]
        first, last = config.dense_blocks_first, len(self.sites) - config.dense_blocks_last
        if first >= last:
            raise UnsupportedError(
                f"nothing to merge: dense_blocks_first={first} and "
                f"dense_blocks_last={config.dense_blocks_last} leave none of the model's "
                f"{len(self.sites)} blocks."
            )
        if min(config.budgets) >= 1:
            warnings.warn(
                f"{config.source} merges nothing: the pipeline is not accelerated.",
                AccelWarning,
                stacklevel=3,
            )
        # Behind convolutions, which compute every token, a group's mean says less of a token than they do.
        self.unmerge = "copy" if self.tokens.convolutional else config.unmerge
        self.carries = self.unmerge == "carry" or 0 in config.budgets
        self.groups = [
            _Group(self, part)
            for blocks in _layer_groups(first, last, config.refresh_layers)
            for part in self._alike(blocks, "scale")
        ]
        self.run = Run(target, config.full_schedule, self, stats, span=config.scope == "span")
        guided = not config.windows and config.matching.protect > 0 and config.matching.importance != "detail"
        self.run.keep_outputs = self.carries or guided
        self.adapter = (
            None if config.adapter is None else Adapter(config.adapter, self._share, config.budgets)
        )
        self.decoding = None if self.adapter is None else self.adapter.decoding
        # Written in place, at the same address in every run: what is captured in a CUDA graph reads it there.
        self.score: Tensor | None = None
        self.forget()

    def _alike(self, blocks: range, attribute: str) -> list[range]:
        """The blocks cut where the next one's site has another value."""
        value = [getattr(site, attribute) for site in self.sites]
        cuts = [blocks.start, *(b for b in blocks[1:] if value[b] != value[b - 1]), blocks.stop]
        return [range(a, b) for a, b in pairwise(cuts)]

    def attach(self, stack: ExitStack) -> None:
        for group in self.groups:
            for span, blocks in group.spans:
                sites = [self.sites[i] for i in blocks]
                for module in self.target.modules:
                    span.attach(module, sites, stack, bias=self.bias)
        if self.adapter is not None:
            self.adapter.attach(self.target.alone("adapter"), stack)
        self.run.attach(stack)

    def merges_now(self) -> bool:
        """Whether the running call is one on merged tokens."""
        return self.run.serves() and not self.run.phase.dense and self.run.grid is not None

    def _share(self) -> float:
        return self.run.phase.budget if self.merges_now() else 1.0

    # Between steps (see StepMethod).

    def forget(self) -> None:
        # On the device, so that compiled code can number its draws without a new graph for each.
        device = next(self.target.denoiser.parameters()).device
        if device.type == "meta":  # sequential offloading: `build` takes it along
            device = torch.device("cpu")
        self.state = _State(torch.zeros((), dtype=torch.int64, device=device))
        if self.decoding is not None:
            self.decoding.last_BNc = None
        for group in self.groups:
            group.forget()

    def prepare(self, run: Run) -> None:
        self.state.weighed = weighed()
        if run.clock.step == 0 and self.config.windows and not self.bias:
            run.stats.notes.append(windows.NO_BIAS)
        if run.clock.step == 0 and self.decoding is not None and self.unmerge == "copy":
            run.stats.notes.append(decoder.NOTHING_CARRIED)
        if run.clock.step == 0 and (self.config.order > 0 or 0 in self.config.budgets):
            run.check_sampler()
        run.correct, self.state.forecasts = None, []
        if self.state.history is not None and not run.phase.dense and self.state.noise is None:
            self.state.forecasts = self.state.history.forecasts(run.time)
            if run.phase.budget == 0:
                run.answer(self.state.forecasts)
                return
            if self.unmerge == "carry":
                run.correct = self._carry
        refresh = run.phase.refresh
        if self.config.windows and not run.phase.dense:
            self._look(run)
        if self.config.drift is not None:
            refresh = self._drifted() or refresh
        if refresh and run.outputs and run.grid is not None and not self.config.windows:
            tokens = tuple(self.tokens.of(run.target.denoiser, o, run.grid) for o in run.outputs)
            self.state.guidance = importance.guidance_magnitude(tokens, run.samples or tokens[0].shape[0])
        for group in self.groups:
            group.stale = (
                group.stale or refresh or (0 < run.phase.budget < 1 and group.budget != run.phase.budget)
            )
            group.built = False

    def stepping(self, run: Run) -> None:
        if self.adapter is not None:
            self.adapter.stepping(run, self.groups[-1].plan)

    def noisy(self, run: Run, reason: str) -> None:
        """What tokens deviated by at an older step holds old noise: with fresh noise they get their group's
        prediction alone. Forecasts cannot be had at all."""
        if self.config.order > 0 or 0 in self.config.budgets:
            super().noisy(run, reason)
        if self.state.noise is None and self.carries:
            self.state.history, self.state.noise = None, reason
            run.stats.notes.append(
                f"unmerge='carry' became 'copy': {type(self.target.scheduler).__name__} {reason}"
            )
            if self.decoding is not None:
                run.stats.notes.append(decoder.NOTHING_CARRIED)

    def entering(self, run: Run) -> None:
        if self.bias and run.clock.step == 0:
            windows.check_processors(self.target, self.sites)

    def held(self, run: Run) -> Held:
        if run.phase.dense:
            return Held()
        of_groups = [(group, name) for group in self.groups for name in group.written]
        return Held(
            (run.phase.budget, run.samples),
            ((self.state, "draw"), (self.state, "guidance"), (self, "score"), *of_groups),
        )

    def keep(self, run: Run) -> None:
        self.state.draw = self.state.draw.clone()
        for group in self.groups:
            if group.built and group.plan is not None:
                group.plan = group.plan.clone()
            if group.growth is not None and group.baseline is not None:
                group.growth, group.baseline = group.growth.clone(), group.baseline.clone()

    def _drifted(self) -> bool:
        limit = 1 + (self.config.drift or 0)
        drifted = any(growth.read() > limit for growth in self.state.growths)
        current = [] if drifted else [g.growth for g in self.groups if g.growth is not None]
        self.state.growths = [Readback(growth) for growth in current]
        return drifted

    def account(self, run: Run) -> StepStats:
        total = run.tokens
        if self.made_for is not None and run.clock.step == 0:
            self.made_for.check_size(run.clock.model_output)
        self._learn(run)
        held = memory(self.state.history)
        if not run.computed:
            return StepStats(0, total, forecast=total, cache_bytes=held)
        active = [g for g in self.groups if g.plan is not None and not run.phase.dense]
        saved = sum(len(g.blocks) * (g.plan.tokens - g.plan.slots) for g in active if g.plan is not None)
        if self.bias and saved:
            windows.tell_bias(run, self.state.weighed, self.sites, self.config.windows)
        built = sum(g.built for g in active)
        return StepStats(total - saved, total, built, len(active) - built, cache_bytes=held)

    def _learn(self, run: Run) -> None:
        """Keep what the step predicted, for the deviations and forecasts of the steps after it."""
        if not self.carries or not run.computed or self.state.noise is not None:
            return
        if self.state.history is not None and not run.changed:
            run.check_calls(len(run.outputs), len(self.state.history.values))
        if self.state.history is None or run.changed:
            self.state.history = History(self.config.order)
            self.state.history.start(run.outputs, run.time)
        else:
            self.state.history.add(run.outputs, run.time)

    # Inside the denoiser, possibly traced.

    def build(self, x_BNC: Tensor, site: Site) -> TokenPlan | None:
        """A plan from the tokens at the entry of a group, whose first site this is; None if a threshold finds nothing
        similar enough."""
        assert self.run.grid is not None
        config, N, grid = self.config, x_BNC.shape[1], site.grid(self.run.grid)
        if grid[0] * grid[1] != N:
            raise UnsupportedError(
                f"{N} image tokens are not the {grid[0]}x{grid[1]} grid the model was told of"
            )
        if config.windows:
            return self._windows(x_BNC, site)
        keep, protected, cell = _sizes(
            config, self.run.phase.budget, grid, multiple=16 if x_BNC.is_cuda else 1
        )
        # One plan for all, unless the model allows one per image and the number of images is known: before
        # the first step is over it is not, because the batch may hold both halves of guidance.
        samples = self.run.samples
        shared = self.tokens.shared_plan or samples is None or x_BNC.shape[0] % samples
        rows = 1 if shared or samples is None else samples

        score_GN = exempt_GN = None
        if protected or config.matching.destinations != "random":
            score_GN = self._importance(x_BNC, grid, rows)
        if config.matching.destinations == "random" or score_GN is None:
            self.state.draw = self.state.draw.to(x_BNC.device) + 1
            wish_GN = noise.uniform(N, config.matching.seed, self.state.draw).expand(rows, -1)
        else:
            wish_GN = score_GN if config.matching.destinations == "important" else -score_GN
        if protected and score_GN is not None:
            exempt_GN = matching.top_mask(score_GN, protected)

        dst_GD = matching.destinations(wish_GN, grid, cell)
        best_GN, target_GN = match(x_BNC, dst_GD, exempt_GN)
        if config.matching.threshold is not None:
            # The only wait for the device, once per plan. Rounded so that few different shapes occur.
            similar = int((best_GN >= config.matching.threshold).sum(1).min())
            keep = max(keep, slots(N, 1 - similar / N, multiple=16))
            if keep >= N:
                return None
        return matching.merge_plan(best_GN, target_GN, keep).repeat(x_BNC.shape[0] // rows if rows > 1 else 1)

    def _windows(self, x_BNC: Tensor, site: Site) -> TokenPlan | None:
        assert self.score is not None
        assert self.run.grid is not None
        grid = site.grid(self.run.grid)
        counts = windows.counts(grid, self.run.phase.budget, 16 if x_BNC.is_cuda else 1)
        if counts.slots == counts.tokens:
            return None
        plan = windows.plan(windows.coarser(self.score, self.run.grid, site.scale), grid, counts)
        return plan if self.tokens.shared_plan else plan.repeat(x_BNC.shape[0] // len(self.score))

    def _look(self, run: Run) -> None:
        """How much the picture that the last step predicted varies around each token: (images, N), or of all images
        the most where they share a plan."""
        assert run.grid is not None
        picture_BNc = windows.picture(run, run.clock.step - 1)
        if self.decoding is not None:
            self.decoding.last_BNc = picture_BNc
        score_BN = windows.variance(picture_BNc, run.grid)
        score_GN = score_BN.amax(0, keepdim=True) if self.tokens.shared_plan else score_BN
        self.score = put_into(self.score, score_GN)

    def _carry(self, prediction: Tensor) -> Tensor:
        """Forecast + what the groups' means say about it: the mean of each group as computed, and within the
        group every token's own deviation as forecast."""
        denoiser, plan, grid = self.target.denoiser, self.groups[-1].plan, self.run.grid
        call = len(self.run.outputs)
        self.run.check_calls(max(call + 1, len(self.state.forecasts)), len(self.state.forecasts))
        if plan is None or grid is None or self.run.changed:
            return prediction
        old_BNc = self.tokens.of(denoiser, self.state.forecasts[call], grid)
        new_BNc = self.tokens.of(denoiser, prediction, grid)
        gather = plan.take if self.config.matching.merge == "pick" else plan.reduce
        carried_BNc = plan.change(old_BNc, gather(new_BNc - old_BNc))
        return self.tokens.put(denoiser, prediction, carried_BNc, grid)

    def _importance(self, x_BNC: Tensor, grid: tuple[int, int], rows: int) -> Tensor:
        score_BN = self.state.guidance if self.config.matching.importance != "detail" else None
        if score_BN is None or score_BN.shape[1] != x_BNC.shape[1]:
            score_BN = detail(x_BNC, grid)
        return score_BN.unflatten(0, (-1, rows)).mean(0)


class _Group:
    """Consecutive blocks that share a plan, built from the tokens at the entry of the first of them."""

    #: What a call of the denoiser changes.
    written = ("plan", "stale", "built", "budget", "baseline", "growth")

    def __init__(self, method: TokenMerging, blocks: range) -> None:
        self.method, self.blocks = method, blocks
        config = method.config
        spans = method._alike(blocks, "stretch")
        stretches = spans if config.scope == "span" else [range(b, b + 1) for b in blocks]
        observe = self._observe if config.drift is not None else None
        self.spans = [
            (
                Span(
                    self.plan_for,
                    pick=config.matching.merge == "pick",
                    observe=None if i else observe,
                    tokens=lambda: method.run.image_tokens,
                    serves=lambda: method.run.serves(),
                ),
                stretch,
            )
            for i, stretch in enumerate(stretches)
        ]

    def forget(self) -> None:
        self.plan: TokenPlan | None = None
        self.stale, self.built = True, False
        self.budget = 1.0  # of the plan
        self.baseline: Tensor | None = None  # merging error when the plan was new
        self.growth: Tensor | None = None  # merging error / baseline
        for span, _ in self.spans:
            span.clear()

    def plan_for(self, x_BNC: Tensor) -> TokenPlan | None:
        run = self.method.run
        if not self.method.merges_now() or run.grid is None:
            return None
        if self.stale:
            image_BNC = x_BNC[:, : x_BNC.shape[1] - run.references]
            with torch.no_grad():
                self.plan = self.method.build(image_BNC, self.method.sites[self.blocks.start])
            self.stale, self.built, self.budget = False, True, run.phase.budget
        return None if self.plan is None else self.plan.before(run.references)

    def _observe(self, x_BNC: Tensor, reduced_BKC: Tensor, plan: TokenPlan) -> None:
        """How much worse the plan fits than when it was new: merging error relative to the tokens' size."""
        error = (x_BNC - plan.expand(reduced_BKC)).float().square().mean() / x_BNC.float().square().mean()
        if self.built or self.baseline is None:
            self.baseline = error
        self.growth = error / self.baseline


def _layer_groups(first: int, last: int, refresh: tuple[int, ...] | Literal["all"]) -> list[range]:
    """Blocks first..last-1 cut where a new plan is due."""
    inner = range(first + 1, last) if refresh == "all" else sorted({b for b in refresh if first < b < last})
    cuts = [first, *inner, last]
    return [range(a, b) for a, b in pairwise(cuts)]


def _sizes(
    config: TokenMergingConfig, budget: float, grid: tuple[int, int], multiple: int
) -> tuple[int, int, int]:
    """(tokens kept, tokens protected, cell side) for a grid; raises if that leaves nothing to merge."""
    tokens = grid[0] * grid[1]
    keep = slots(tokens, budget, multiple)
    protected = int(config.matching.protect * tokens)
    fitting = matching.cell_size(grid, keep - protected)
    if keep >= tokens or fitting is None:
        raise UnsupportedError(
            f"{config.source} merges nothing at this size: of {grid[0]}x{grid[1]} = {tokens} tokens "
            f"{keep} would be kept (a multiple of {multiple}), {protected} of them protected. Use a larger "
            "image, or another ratio."
        )
    if config.matching.cell is not None and config.matching.cell < fitting:
        raise UnsupportedError(
            f"matching.cell={config.matching.cell} has too many destinations for {config.source} and "
            f"matching.protect={config.matching.protect} on a {grid[0]}x{grid[1]} grid; use {fitting} or None."
        )
    return keep, protected, config.matching.cell or fitting
