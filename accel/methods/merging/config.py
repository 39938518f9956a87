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

from accel.core.checks import check, is_number, is_whole, is_wholes
from accel.core.schedule import Schedule
from accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenMergingConfig:
    """Settings of cached token merging. Steps and blocks count from 0.

    Attributes:
        ratio: share of the image tokens merged away, in [0, 1).
        threshold: merge only tokens whose cosine similarity reaches this value, in [-1, 1], and at most
            `ratio` of them. How many that are is read from the device once per plan; it cannot be compiled
            with fullgraph=True. None: always `ratio`.
        groups: which tokens are merged. "matching": those whose features are alike (ToMe). "windows": whole cells of 2x2
            and 4x4 tokens where the picture that the last step predicted varies least; `protect`, `importance`,
            `destinations`, `cell`, `threshold` and `seed` are matching's.
        adapter: side-car (safetensors) of the model upcycled for windows, on at reduced steps only; see
            examples/upcycle_chunking.py. None: the model as it is.
        scope: "span" keeps tokens merged from the first to the last reduced block; "block" merges before and
            unmerges after every block, which costs more and lets every block see all positions.
        protect: share of the tokens that are never merged into another, the most important ones.
        importance: what makes a token important: "guidance" (how much guidance changes its prediction),
            "detail" (local variance and edges of its features), "auto" (guidance where the last step had it,
            else detail).
        destinations: which token of each cell others are merged into: "random", "important", "unimportant".
        cell: side of the cells, at least 2; None: the smallest that leaves room for `ratio` and `protect`.
        merge: "mean" computes the mean of the merged tokens, "pick" only the destination.
        unmerge: "carry" gives every token the prediction of its group and, on top, its own deviation from the
            group's mean as forecast from the steps before; "copy" the prediction of its group alone.
        order: degree of the polynomial that forecasts continue, 0 (hold), 1 or 2.
        cycle: budgets of the steps between the dense first and last ones, repeated: 1 is a dense step, 0
            forecasts all tokens, anything between merges and keeps that share. None: (1 - ratio,).
        refresh_every: build a new plan at every n-th reduced step; 0: only at the first one.
        refresh_at: the steps at which to build a new plan, instead of `refresh_every`.
        refresh_layers: blocks at which another plan is built from the features there; "all": at each.
        drift: also rebuild when the merging error has grown by this share since the plan was built (0.2: by
            20 %), with one step's delay. None: never.
        dense_steps_first, dense_steps_last: steps at either end that compute all tokens.
        dense_blocks_first, dense_blocks_last: blocks at either end that compute all tokens.
        resolutions: of a model with attention at several (U-Nets), at how many of the highest ones tokens are merged.
            Its convolutions take whole grids: tokens stay merged from one convolution to the next at most, and
            unmerge="carry" is "copy", since the convolutions have seen to every token already.
        proportional: proportional attention (ToMe, eq. 1): a merged token weighs as many as it stands for. Needs an
            attention that takes a bias. None: with windows, where the model's attention takes one.
        seed: of the random destinations; the pipeline's own random numbers are not touched.

    Raises:
        ConfigError: a value is outside its range, or the values leave nothing to merge.
    """

    ratio: float = 0.5
    groups: Literal["matching", "windows"] = "matching"
    threshold: float | None = None
    adapter: str | None = None
    scope: Literal["span", "block"] = "span"
    protect: float = 0.1
    importance: Literal["auto", "guidance", "detail"] = "auto"
    destinations: Literal["random", "important", "unimportant"] = "random"
    cell: int | None = None
    merge: Literal["mean", "pick"] = "mean"
    unmerge: Literal["carry", "copy"] = "carry"
    order: int = 0
    cycle: tuple[float, ...] | None = None
    refresh_every: int = 5
    refresh_at: tuple[int, ...] = ()
    refresh_layers: tuple[int, ...] | Literal["all"] = ()
    drift: float | None = None
    dense_steps_first: int = 1
    dense_steps_last: int = 1
    dense_blocks_first: int = 1
    dense_blocks_last: int = 0
    resolutions: int = 2
    proportional: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("cycle", "refresh_at", "refresh_layers"):  # YAML has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check(is_number(self.ratio) and 0 <= self.ratio < 1, "ratio", "in [0, 1)", self.ratio)
        check(is_number(self.protect) and 0 <= self.protect < 1, "protect", "in [0, 1)", self.protect)
        if self.threshold is not None:
            valid = is_number(self.threshold) and -1 <= self.threshold <= 1
            check(valid, "threshold", "in [-1, 1] or None", self.threshold)
        if self.drift is not None:
            check(is_number(self.drift) and self.drift > 0, "drift", "> 0 or None", self.drift)
        if self.cell is not None:
            check(is_whole(self.cell) and self.cell >= 2, "cell", "a whole number >= 2 or None", self.cell)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check(value in choices, name, f"one of {', '.join(choices)}", value)
        for name in _COUNTS:
            value = getattr(self, name)
            check(is_whole(value) and value >= 0, name, "a whole number >= 0", value)
        check(self.resolutions > 0, "resolutions", "a whole number >= 1", self.resolutions)
        check(is_wholes(self.refresh_at), "refresh_at", "a list of whole numbers >= 0", self.refresh_at)
        valid = self.refresh_layers == "all" or is_wholes(self.refresh_layers)
        check(valid, "refresh_layers", 'a list of whole numbers >= 0 or "all"', self.refresh_layers)
        known = self.proportional is None or isinstance(self.proportional, bool)
        check(known, "proportional", "true, false or None", self.proportional)
        if self.windows:
            self._check_windows()
        if self.adapter is not None:
            check(isinstance(self.adapter, str), "adapter", "a path or None", self.adapter)
            check(self.windows, "adapter", 'None with groups="matching"', self.adapter)
        check(
            is_whole(self.seed) and 0 <= self.seed < 2**63,
            "seed",
            "a whole number from 0 to 2^63 - 1",
            self.seed,
        )
        check(is_whole(self.order) and 0 <= self.order <= 2, "order", "0, 1 or 2", self.order)
        if self.cycle is not None:
            valid = isinstance(self.cycle, tuple) and len(self.cycle) > 0
            valid = valid and all(is_number(b) and 0 <= b <= 1 for b in self.cycle)
            check(valid, "cycle", "a list of budgets in [0, 1] or None", self.cycle)
            forecasts_first = 0 in self.cycle and self.dense_steps_first < 1
            check(
                not forecasts_first,
                "dense_steps_first",
                ">= 1 if the cycle forecasts",
                self.dense_steps_first,
            )
        if self.windows:
            return  # what they can keep depends on the grid
        least = self.protect + (1 / self.cell**2 if self.cell else 0)
        budget = min((b for b in self.budgets if b > 0), default=1)
        if budget < min(1, least - 1e-9):
            raise ConfigError(
                f"{self.source} leaves {budget:.3g} of the tokens, but protect={self.protect}"
                + (f" and one destination per {self.cell}x{self.cell} cell keep" if self.cell else " keeps")
                + f" {least:.3g}. Lower one of them; the largest ratio here is {1 - least:.3g}."
            )

    @property
    def windows(self) -> bool:
        return self.groups == "windows"

    def _check_windows(self) -> None:
        """Which windows merge is told by the picture that an earlier step predicted."""
        check(
            self.dense_steps_first >= 1,
            "dense_steps_first",
            '>= 1 with groups="windows"',
            self.dense_steps_first,
        )
        for name in ("threshold", "cell", "drift"):
            value = getattr(self, name)
            check(value is None, name, 'None with groups="windows"', value)
        check(self.refresh_layers == (), "refresh_layers", 'empty with groups="windows"', self.refresh_layers)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The cycle of budgets, given or from the ratio."""
        return (1 - self.ratio,) if self.cycle is None else self.cycle

    @property
    def source(self) -> str:
        """The setting that the budgets come from, for messages."""
        return f"ratio={self.ratio}" if self.cycle is None else f"cycle={self.cycle}"

    @classmethod
    def tomesd(cls, ratio: float = 0.5) -> TokenMergingConfig:
        """ToMeSD's scheme, for comparison: one random destination per 2x2 cell, plans from every block's own
        input at every step, merged and unmerged around each block, nothing protected, nothing cached.

        Two differences: blocks are merged as a whole (as with ToMeSD's `merge_mlp`, `merge_crossattn`), and
        the halves of guidance, and images that share a rotary table, share a plan.
        """
        return cls(
            ratio=ratio,
            scope="block",
            protect=0.0,
            unmerge="copy",
            cell=2,
            refresh_every=1,
            refresh_layers="all",
            dense_steps_first=0,
            dense_steps_last=0,
            dense_blocks_first=0,
            dense_blocks_last=0,
            resolutions=1,
        )

    def schedule(self) -> Schedule:
        return Schedule(
            cycle=self.budgets,
            dense_first=self.dense_steps_first,
            dense_last=self.dense_steps_last,
            refresh_every=self.refresh_every,
            refresh_at=self.refresh_at,
        )


_CHOICES = {
    "groups": ("matching", "windows"),
    "scope": ("span", "block"),
    "importance": ("auto", "guidance", "detail"),
    "destinations": ("random", "important", "unimportant"),
    "merge": ("mean", "pick"),
    "unmerge": ("carry", "copy"),
}
_COUNTS = (
    "refresh_every",
    "dense_steps_first",
    "dense_steps_last",
    "dense_blocks_first",
    "dense_blocks_last",
    "resolutions",
)
