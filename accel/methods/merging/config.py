"""Cached token merging: similar tokens are computed once, and which ones are similar is decided rarely.

Matching as in ToMe (arXiv:2210.09461) and ToMeSD (arXiv:2303.17604); plans kept over steps as in CA-ToMe
(arXiv:2501.00946) and over layers as in LiteVGGT; importance as in arXiv:2411.16720. What is added here: the
span (tokens stay merged from one block to the next), one plan for both halves of guidance, static shapes, and
unmerging that carries detail on: a merged step measures the mean of each group of tokens, and how a token
differs from that mean continues from its own earlier predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accel.core.checks import check, check_choice, check_used, is_number, is_whole, is_wholes, settings
from accel.core.schedule import Schedule, Scheduled
from accel.errors import ConfigError


@settings
@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which tokens are alike enough to be merged, and into which: of `groups="matching"` alone.

    Attributes:
        threshold: merge only tokens whose cosine similarity reaches this value, in [-1, 1], and at most
            `ratio` of them. How many that are is read from the device once per plan; it cannot be compiled
            with fullgraph=True. None: always `ratio`.
        protect: share of the tokens that are never merged into another, the most important ones.
        importance: what makes a token important: "guidance" (how much guidance changes its prediction),
            "detail" (local variance and edges of its features), "auto" (guidance where the last step had it,
            else detail).
        destinations: which token of each cell others are merged into: "random", "important", "unimportant".
        cell: side of the cells, at least 2; None: the smallest that leaves room for `ratio` and `protect`.
        merge: "mean" computes the mean of the merged tokens, "pick" only the destination.
        seed: of the random destinations; the pipeline's own random numbers are not touched.

    Raises:
        ConfigError: a value is outside its range.
    """

    threshold: float | None = None
    protect: float = 0.1
    importance: Literal["auto", "guidance", "detail"] = "auto"
    destinations: Literal["random", "important", "unimportant"] = "random"
    cell: int | None = None
    merge: Literal["mean", "pick"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        valid = self.threshold is None or (is_number(self.threshold) and -1 <= self.threshold <= 1)
        check(valid, "matching.threshold", "in [-1, 1] or None", self.threshold)
        valid = is_number(self.protect) and 0 <= self.protect < 1
        check(valid, "matching.protect", "in [0, 1)", self.protect)
        check_choice(self, "importance", ("auto", "guidance", "detail"), "matching.")
        check_choice(self, "destinations", ("random", "important", "unimportant"), "matching.")
        check_choice(self, "merge", ("mean", "pick"), "matching.")
        valid = self.cell is None or (is_whole(self.cell) and self.cell >= 2)
        check(valid, "matching.cell", "a whole number >= 2 or None", self.cell)
        valid = is_whole(self.seed) and 0 <= self.seed < 2**63
        check(valid, "matching.seed", "a whole number from 0 to 2^63 - 1", self.seed)


@settings
@dataclass(frozen=True, kw_only=True)
class TokenMergingConfig(Scheduled):
    """Settings of cached token merging. Steps and blocks count from 0.

    Attributes:
        ratio: share of the image tokens merged away, in [0, 1).
        groups: which tokens are merged. "matching": those whose features are alike (ToMe). "windows": whole cells of 2x2
            and 4x4 tokens where the picture that the last step predicted varies least.
        matching: how those that are alike are found.
        schedule: of its cycle, 1 is a dense step, 0 forecasts all tokens, anything between merges and keeps that share; by
            default (1 - ratio,). Plans are built anew at every `refresh_every`-th reduced step, by default the fifth, or at
            those of `refresh_at`. dense_first and dense_last are 1 by default.
        adapter: side-car (safetensors) of the model upcycled for windows, on at reduced steps only; see
            examples/upcycle_chunking.py. None: the model as it is.
        scope: "span" keeps tokens merged from the first to the last reduced block; "block" merges before and
            unmerges after every block, which costs more and lets every block see all positions.
        unmerge: "carry" gives every token the prediction of its group and, on top, its own deviation from the
            group's mean as forecast from the steps before; "copy" the prediction of its group alone.
        order: degree of the polynomial that forecasts continue, 0 (hold), 1 or 2.
        refresh_layers: blocks at which another plan is built from the features there; "all": at each.
        drift: also rebuild when the merging error has grown by this share since the plan was built (0.2: by
            20 %), with one step's delay. None: never.
        dense_blocks_first, dense_blocks_last: blocks at either end that compute all tokens.
        resolutions: of a model with attention at several (U-Nets), at how many of the highest ones tokens are merged.
            Its convolutions take whole grids: tokens stay merged from one convolution to the next at most, and
            unmerge="carry" is "copy", since the convolutions have seen to every token already.
        proportional: proportional attention (ToMe, eq. 1): a merged token weighs as many as it stands for. Needs an
            attention that takes a bias. None: with windows, where the model's attention takes one.
        made_for: the side-car of a tuned preset, as a ForecastConfig's.

    Raises:
        ConfigError: a value is outside its range, or the values leave nothing to merge.
    """

    DEFAULT = Schedule(dense_first=1, dense_last=1, refresh_every=5)
    TAKES = ("cycle", "late_cycle", "late_from", "dense_first", "dense_last", "refresh_every", "refresh_at")

    ratio: float = 0.5
    groups: Literal["matching", "windows"] = "matching"
    matching: Matching = Matching()
    adapter: str | None = None
    scope: Literal["span", "block"] = "span"
    unmerge: Literal["carry", "copy"] = "carry"
    order: int = 0
    refresh_layers: tuple[int, ...] | Literal["all"] = ()
    drift: float | None = None
    dense_blocks_first: int = 1
    dense_blocks_last: int = 0
    resolutions: int = 2
    proportional: bool | None = None
    made_for: str | None = None

    def _check(self) -> None:
        check(is_number(self.ratio) and 0 <= self.ratio < 1, "ratio", "in [0, 1)", self.ratio)
        check_choice(self, "groups", ("matching", "windows"))
        check_choice(self, "scope", ("span", "block"))
        check_choice(self, "unmerge", ("carry", "copy"))
        for name in ("dense_blocks_first", "dense_blocks_last", "resolutions"):
            value, lowest = getattr(self, name), int(name == "resolutions")
            check(is_whole(value) and value >= lowest, name, f"a whole number >= {lowest}", value)
        valid = self.refresh_layers == "all" or is_wholes(self.refresh_layers)
        check(valid, "refresh_layers", 'a list of whole numbers >= 0 or "all"', self.refresh_layers)
        valid = self.drift is None or (is_number(self.drift) and self.drift > 0)
        check(valid, "drift", "> 0 or None", self.drift)
        known = self.proportional is None or isinstance(self.proportional, bool)
        check(known, "proportional", "true, false or None", self.proportional)
        for name in ("adapter", "made_for"):
            path = getattr(self, name)
            check(path is None or isinstance(path, str), name, "a path or None", path)
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        cycle = self.schedule.cycle
        check_used(self, ("ratio",), cycle is None, f"schedule.cycle={cycle} says the shares")
        if 0 in self.budgets:
            self._check_first(" if the cycle forecasts")
        if self.windows:
            # Which windows merge is told by the picture that an earlier step predicted; what they can keep depends on the grid.
            self._check_first(' with groups="windows"')
            for name in ("matching", "drift", "refresh_layers"):
                check_used(self, (name,), False, 'groups="windows" matches nothing')
            return
        check(self.adapter is None, "adapter", 'None with groups="matching"', self.adapter)
        protect, cell = self.matching.protect, self.matching.cell
        least = protect + (1 / cell**2 if cell else 0)
        budget = min((b for b in self.budgets if b > 0), default=1.0)
        if budget < min(1, least - 1e-9):
            raise ConfigError(
                f"{self.source} leaves {budget:.3g} of the tokens, but matching.protect={protect}"
                + (f" and one destination per {cell}x{cell} cell keep" if cell else " keeps")
                + f" {least:.3g}. Lower one of them; the largest ratio here is {1 - least:.3g}."
            )

    @property
    def windows(self) -> bool:
        return self.groups == "windows"

    @property
    def full_schedule(self) -> Schedule:
        return self.schedule.over(Schedule(cycle=(1 - self.ratio,)))

    @property
    def budgets(self) -> tuple[float, ...]:
        """The cycle of budgets, given or from the ratio."""
        return self.full_schedule.budgets

    @property
    def source(self) -> str:
        """The setting that the budgets come from, for messages."""
        cycle = self.schedule.cycle
        return f"ratio={self.ratio}" if cycle is None else f"cycle={cycle}"

    @classmethod
    def tomesd(cls, ratio: float = 0.5) -> TokenMergingConfig:
        """ToMeSD's scheme, for comparison: one random destination per 2x2 cell, plans from every block's own
        input at every step, merged and unmerged around each block, nothing protected, nothing cached.

        Two differences: blocks are merged as a whole (as with ToMeSD's `merge_mlp`, `merge_crossattn`), and
        the halves of guidance, and images that share a rotary table, share a plan.
        """
        return cls(
            ratio=ratio,
            matching=Matching(protect=0.0, cell=2),
            schedule=Schedule(dense_first=0, dense_last=0, refresh_every=1),
            scope="block",
            unmerge="copy",
            refresh_layers="all",
            dense_blocks_first=0,
            dense_blocks_last=0,
            resolutions=1,
        )
