"""Dynamic chunking for diffusion transformers: a router says which tokens say something new, the others are computed together,
and the results are handed back to all.

DC-DiT (arXiv:2603.06351) and H-Net (arXiv:2507.07955), which train for it; here by default without training, with a router that
measures better (docs/measured/few-step.md), budgets that change as noise falls, and over depth as in FlexDiT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from accel.core.checks import check, check_choice, is_number, is_whole, settings
from accel.core.schedule import Phase, Schedule, Scheduled

ROUTERS = ("windows", "cosine", "predictability")


@settings
@dataclass(frozen=True, kw_only=True)
class DynamicChunkingConfig(Scheduled):
    """Settings of dynamic chunking. Steps and blocks count from 0.

    Attributes:
        router: what scores the tokens. "windows": the local variance of the picture that the last step predicted. "cosine" and
            "predictability": DC-DiT's two routers as they are before training, from the tokens themselves (measured to rank
            noise, for comparison). A path: a learned one (.safetensors, as `accel.methods.learned.save` writes it).
        adapter: side-car (safetensors) of the model upcycled for windows, on at reduced steps only; see
            examples/upcycle_chunking.py. None: the model as it is.
        chunks: "windows" computes the mean of whole 2x2 and 4x4 cells of low scores, at their centre and with their weight in
            attention; "tokens" the tokens of highest scores (DC-DiT), whose result the nearest other tokens take over.
            None: windows for the windows router and for learned ones.
        dechunk: "carry" gives every token its chunk's result and, on top, its own deviation as forecast from the steps
            before; "copy" the chunk's result alone; "gaussian" first smooths among kept tokens, by distance and score
            (DC-DiT, chunks="tokens" only).
        sigma: of the Gaussian, in tokens.
        budget: share of the tokens to compute at the first reduced step, in (0, 1].
        last_budget: at the last one, reached in equal parts; less than the first measured better than more. None: the same at all.
        depth: factors on the budget for equal parts of the blocks, from the first on; (): the same everywhere. Each part has
            a plan of its own, and tokens are whole between two.
        unconditional: budget of the unconditional branch of guidance, where that is a call of its own (Lite-CFG); None: the
            same, and the same plan. Measured to be much worse without training: errors cancel only with equal plans.
        schedule: its dense_first, by default and at least 1, and dense_last, by default 0.
        dense_blocks_first, dense_blocks_last: blocks at either end that compute all tokens.

    Raises:
        ConfigError: a value is outside its range, or together they leave out nothing.
    """

    DEFAULT = Schedule(dense_first=1, dense_last=0)
    TAKES = ("dense_first", "dense_last")

    router: str = "windows"
    adapter: str | None = None
    chunks: Literal["windows", "tokens"] | None = None
    dechunk: Literal["carry", "copy", "gaussian"] = "carry"
    sigma: float = 1.0
    budget: float = 0.5
    last_budget: float | None = None
    depth: tuple[float, ...] = ()
    unconditional: float | None = None
    dense_blocks_first: int = 1
    dense_blocks_last: int = 0

    def _check(self) -> None:
        for name in ("budget", "last_budget", "unconditional"):
            value = getattr(self, name)
            valid = is_number(value) and 0 < value <= 1
            check(valid or (value is None and name != "budget"), name, "in (0, 1]", value)
        check(is_number(self.sigma) and self.sigma > 0, "sigma", "> 0", self.sigma)
        valid = isinstance(self.depth, tuple) and all(is_number(f) and f > 0 for f in self.depth)
        check(valid, "depth", "a list of factors > 0", self.depth)
        self._check_leaves_out()
        for name in ("dense_blocks_first", "dense_blocks_last"):
            value = getattr(self, name)
            check(is_whole(value) and value >= 0, name, "a whole number >= 0", value)
        self._check_first()
        check_choice(self, "dechunk", ("carry", "copy", "gaussian"))
        check_choice(self, "chunks", (None, "windows", "tokens"))
        for name in ("router", "adapter"):
            value = getattr(self, name)
            path = isinstance(value, str) and value.endswith(".safetensors")
            known = value in ROUTERS if name == "router" else value is None
            what = (
                "a .safetensors file" if name == "adapter" else f"{', '.join(ROUTERS)} or a .safetensors file"
            )
            check(known or path, name, what, value)
        trained = self.in_windows and not self.depth and self.unconditional is None
        what = "None but with windows, and one plan for all blocks and calls: so it was trained"
        check(trained or self.adapter is None, "adapter", what, self.adapter)
        valid = self.dechunk != "gaussian" or not self.in_windows
        check(valid, "dechunk", 'not "gaussian" with windows', self.dechunk)

    def _check_leaves_out(self) -> None:
        """At least one step of one call computes fewer tokens in one part of the blocks."""
        least, factor = min(self.budget, self.last_budget or 1.0), min(self.depth, default=1.0)
        # A step whose budget is 1 is dense, whatever depth and the other branch would make of it.
        check(least < 1, "budget" if self.last_budget is None else "last_budget", "below 1", least)
        branches = (least, self.unconditional or 1.0)
        below = "factors of which one times the least budget is below 1"
        check(min(branches) * factor < 1, "depth", below, self.depth)

    @property
    def in_windows(self) -> bool:
        if self.chunks is None:
            return self.router not in ("cosine", "predictability")
        return self.chunks == "windows"

    @classmethod
    def dc_dit(
        cls, budget: float = 0.5, *, router: str = "cosine", sigma: float = 1.0
    ) -> DynamicChunkingConfig:
        """DC-DiT's scheme without its training: tokens kept by its router, Gaussian smoothing, nearest kept token."""
        return cls(router=router, chunks="tokens", dechunk="gaussian", budget=budget, sigma=sigma)

    @property
    def full_schedule(self) -> Schedule:
        return _Growing(
            (self.budget,),
            self.schedule.dense_first,
            self.schedule.dense_last,
            refresh_every=1,
            last=self.budget if self.last_budget is None else self.last_budget,
        )


@dataclass(frozen=True)
class _Growing(Schedule):
    """From the cycle's one budget to `last`, in equal parts of 1/16 of the tokens, so that few different shapes occur."""

    last: float = 1.0

    @property
    def budgets(self) -> tuple[float, ...]:
        return (*super().budgets, self.last)

    def phases(self, total: int) -> tuple[Phase, ...]:
        phases = super().phases(total)
        first, end = self.budgets
        middle = range(self.dense_first or 0, total - (self.dense_last or 0))
        if first == end or len(middle) < 2:
            return phases
        grown = list(phases)
        for i, step in enumerate(middle):
            budget = first + (end - first) * i / (len(middle) - 1)
            budget = budget if i in (0, len(middle) - 1) else round(budget * 16) / 16
            grown[step] = Phase(1.0) if budget >= 1 else replace(phases[step], budget=budget, refresh=True)
        return tuple(grown)
