"""Dynamic chunking at work: what is scored when, the plans of a step, and how results come back.

Shapes: B batch, N tokens, K slots, C channels, c channels of a prediction, G plan rows.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from accel.core.capability import require
from accel.core.graphs import Held
from accel.core.history import History, memory
from accel.core.plan import TokenPlan
from accel.core.readback import put_into
from accel.core.run import Run, StepMethod
from accel.core.schedule import slots
from accel.core.span import Span
from accel.core.target import Target
from accel.core.weighted_attention import weighed
from accel.errors import UnsupportedError
from accel.methods import decoder, windows
from accel.methods.learned import Adapter
from accel.stats import Stats, StepStats

from .config import DynamicChunkingConfig
from .dechunk import kept_plan
from .routers import TRAINING_FREE, Router


class DynamicChunking(StepMethod):
    """Chunking of one denoiser."""

    name = "dynamic_chunking"

    def __init__(self, target: Target, config: DynamicChunkingConfig, stats: Stats) -> None:
        self.target, self.config = target, config
        require(self.name, {"tokens", "span"}, target.adapter, target.denoiser)
        assert target.adapter.tokens is not None
        self.tokens = target.adapter.tokens
        self.sites = list(self.tokens.sites(target.denoiser))
        first, last = config.dense_blocks_first, len(self.sites) - config.dense_blocks_last
        count = max(len(config.depth), 1)
        if last - first < count:
            raise UnsupportedError(
                f"nothing to chunk: of the model's {len(self.sites)} blocks, dense_blocks_first={first} and "
                f"dense_blocks_last={config.dense_blocks_last} leave {max(last - first, 0)} for {count} parts of depth."
            )
        if config.unconditional is not None and target.adapter.branches.calls is None:
            raise UnsupportedError(
                f"unconditional={config.unconditional}: {type(target.denoiser).__name__} computes both branches of guidance "
                "in one call, or it is not known which is which. Use unconditional=None."
            )
        self.bias = config.in_windows and "key bias" in target.adapter.has(target.denoiser)
        self.router = self._router()
        budgets = config.full_schedule.budgets
        self.adapter = None if config.adapter is None else Adapter(config.adapter, self._share, budgets)
        self.decoding = None if self.adapter is None else self.adapter.decoding
        self.carries = config.dechunk == "carry"
        cuts = [first + (last - first) * i // count for i in range(count + 1)]
        factors = config.depth or (1.0,)
        self.parts = [
            _Part(self, range(a, b), factor) for a, b, factor in zip(cuts, cuts[1:], factors, strict=False)
        ]
        self.run = Run(target, config.full_schedule, self, stats, span=True)
        self.run.keep_outputs = True
        self.score: Tensor | None = None
        self.maps: list[Tensor | None] = []
        self.forget()

    def _router(self) -> Router:
        if self.config.router in TRAINING_FREE:
            return TRAINING_FREE[self.config.router]()
        from accel.methods.learned import load

        return load(self.config.router, self.target.denoiser)

    def attach(self, stack: ExitStack) -> None:
        if self.adapter is not None:
            self.adapter.attach(self.target.alone("adapter"), stack)
        for part in self.parts:
            for module in self.target.modules:
                part.span.attach(module, [self.sites[i] for i in part.blocks], stack, bias=self.bias)
        self.run.attach(stack)

    def _reduces(self) -> bool:
        """The running call is one on fewer tokens."""
        return self.run.serves() and not self.run.phase.dense and self.run.grid is not None

    def _share(self) -> float:
        return self.run.phase.budget if self._reduces() else 1.0

    # Between steps (see StepMethod).

    def forget(self) -> None:
        self.history: History | None = None
        self.forecasts: list[Tensor] = []
        self.noise: str | None = None
        if self.decoding is not None:
            self.decoding.last_BNc = None
        for part in self.parts:
            part.forget()

    def entering(self, run: Run) -> None:
        if self.bias and run.clock.step == 0:
            windows.check_processors(self.target, self.sites)

    def prepare(self, run: Run) -> None:
        self._weighed = weighed()
        if run.clock.step == 0:
            self.maps = []
            if self.config.in_windows and not self.bias:
                run.stats.notes.append(windows.NO_BIAS)
            if self.decoding is not None and not self.carries:
                run.stats.notes.append(decoder.NOTHING_CARRIED)
        run.correct, self.forecasts = None, []
        for part in self.parts:
            part.plans = {}
        if run.phase.dense:
            return
        if self.history is not None and self.carries:
            self.forecasts = self.history.forecasts(run.time)
            run.correct = self._carry
        decoding = None if self.adapter is None else self.adapter.decodes(run)
        if decoding is not None or not self.router.needs_tokens:
            picture_BNc = windows.picture(run, run.clock.step - 1)
            if decoding is not None:
                decoding.last_BNc = picture_BNc
            if not self.router.needs_tokens:
                self._score(self.router(picture_BNc, None, _known(run.grid)))

    def stepping(self, run: Run) -> None:
        if self.adapter is not None:
            self.adapter.stepping(run, self.parts[-1].plan_of(0))

    def noisy(self, run: Run, reason: str) -> None:
        """Deviations of an older step hold old noise: chunks' results are copied."""
        if self.carries and self.noise is None:
            self.history, self.noise = None, reason
            run.stats.notes.append(
                f"dechunk='carry' became 'copy': {type(self.target.scheduler).__name__} {reason}"
            )
            if self.decoding is not None:
                run.stats.notes.append(decoder.NOTHING_CARRIED)

    def check_grid(self, grid: tuple[int, int]) -> None:
        if self.run.references:
            raise UnsupportedError(
                f"{self.run.references} tokens of reference images stand behind the {grid[0]}x{grid[1]} grid, and chunking "
                "takes one image's alone. Use TokenMergingConfig or TokenPruningConfig."
            )

    def held(self, run: Run) -> Held:
        if run.phase.dense:
            return Held()
        branch = self.parts[0].branch(run.seen - 1)
        plans = tuple((part, "plans") for part in self.parts)
        return Held((run.phase.budget, run.samples, branch), ((self, "score"), *plans))

    def keep(self, run: Run) -> None:
        for part in self.parts:
            part.plans = {branch: plan.clone() for branch, plan in part.plans.items()}

    def account(self, run: Run) -> StepStats:
        self._learn(run)
        total = run.tokens
        plans = [(part, plan) for part in self.parts for plan in part.plans.values()]
        if self.bias and plans:
            windows.tell_bias(run, self._weighed, self.sites, self.config.in_windows)
        self.maps.append(_sizes(plans[0][1], _known(run.grid)) if plans else None)
        calls = max((len(part.plans) for part in self.parts), default=1) or 1
        saved = sum(len(part.blocks) * (plan.tokens - plan.slots) for part, plan in plans) // calls
        return StepStats(total - saved, total, built=len(plans), cache_bytes=memory(self.history))

    def _learn(self, run: Run) -> None:
        """Keep what the step predicted, for the deviations of the steps after it."""
        if not self.carries or self.noise is not None:
            return
        if self.history is None or run.changed:
            self.history = History(0)
            self.history.start(run.outputs, run.time)
        else:
            run.check_calls(len(run.outputs), len(self.history.values))
            self.history.add(run.outputs, run.time)

    def _score(self, score_BN: Tensor) -> None:
        """Of images that share a plan, the highest. In place, at one address in every run: a CUDA graph reads it there."""
        score_GN = score_BN.amax(0, keepdim=True) if self.tokens.shared_plan else score_BN
        self.score = put_into(self.score, score_GN)

    # Inside the denoiser, possibly traced.

    def build(self, x_BNC: Tensor, budget: float) -> TokenPlan | None:
        """The plan of a part of the blocks in one call, from the scores."""
        grid, config = _known(self.run.grid), self.config
        if grid[0] * grid[1] != x_BNC.shape[1]:
            raise UnsupportedError(
                f"{x_BNC.shape[1]} image tokens are not the {grid[0]}x{grid[1]} grid the model was told of"
            )
        score_GN = self._from_tokens(x_BNC, grid) if self.router.needs_tokens else self.score
        assert score_GN is not None
        multiple = 16 if x_BNC.is_cuda else 1
        if config.in_windows:
            counts = windows.counts(grid, budget, multiple)
            if counts.slots == counts.tokens:
                return None
            plan = windows.plan(score_GN, grid, counts)
        else:
            keep = slots(x_BNC.shape[1], budget, multiple)
            if keep == x_BNC.shape[1]:
                return None
            plan = kept_plan(score_GN, grid, keep, config.sigma if config.dechunk == "gaussian" else None)
        return plan.repeat(x_BNC.shape[0] // len(score_GN)) if len(score_GN) > 1 else plan

    def _from_tokens(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Scores of the tokens themselves, the same for both halves of guidance."""
        with torch.no_grad():
            score_BN = self.router(x_BNC, x_BNC, grid)
        samples = self.run.samples
        if self.tokens.shared_plan or samples is None or x_BNC.shape[0] % samples:
            return score_BN.amax(0, keepdim=True)
        return score_BN.unflatten(0, (-1, samples)).amax(0)

    def _carry(self, prediction: Tensor) -> Tensor:
        """What the chunks say about the forecast, on top of it: see `TokenMergingConfig.unmerge`."""
        denoiser, grid, call = self.target.denoiser, self.run.grid, len(self.run.outputs)
        self.run.check_calls(max(call + 1, len(self.forecasts)), len(self.forecasts))
        plan = self.parts[-1].plan_of(call)
        if plan is None or grid is None or self.run.changed:
            return prediction
        old_BNc = self.tokens.of(denoiser, self.forecasts[call], grid)
        new_BNc = self.tokens.of(denoiser, prediction, grid)
        gather = plan.reduce if self.config.in_windows else plan.take
        carried_BNc = old_BNc + plan.expand(gather(new_BNc - old_BNc))
        return self.tokens.put(denoiser, prediction, carried_BNc, grid)


class _Part:
    """Consecutive blocks with plans of their own: one for all calls of a step, or one for each branch of guidance."""

    def __init__(self, method: DynamicChunking, blocks: range, factor: float) -> None:
        self.method, self.blocks, self.factor = method, blocks, factor
        self.plans: dict[int, TokenPlan] = {}
        self.span = Span(
            self.plan_for,
            pick=not method.config.in_windows,
            tokens=lambda: method.run.image_tokens,
            serves=lambda: method.run.serves(),
        )

    def forget(self) -> None:
        self.plans = {}
        self.span.clear()

    def branch(self, call: int) -> int:
        return min(call, 1) if self.method.config.unconditional is not None else 0

    def plan_of(self, call: int) -> TokenPlan | None:
        return self.plans.get(self.branch(call))

    def plan_for(self, x_BNC: Tensor) -> TokenPlan | None:
        run, config = self.method.run, self.method.config
        if not self.method._reduces():
            return None
        branch = self.branch(run.seen - 1)
        if branch not in self.plans:
            budget = run.phase.budget if branch == 0 else config.unconditional
            assert budget is not None
            with torch.no_grad():
                plan = self.method.build(x_BNC, min(1.0, budget * self.factor))
            if plan is None:
                return None
            self.plans[branch] = plan
        return self.plans[branch]


def _known(grid: tuple[int, int] | None) -> tuple[int, int]:
    assert grid is not None
    return grid


def _sizes(plan: TokenPlan, grid: tuple[int, int]) -> Tensor:
    """How many tokens share each token's slot: (P, H, W)."""
    return plan.size.gather(1, plan.owner).unflatten(1, grid)
