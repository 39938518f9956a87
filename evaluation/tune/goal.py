"""What tuning is asked for, how it is done, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from accel import generation
from accel.evaluation.scorers import Scorer

from .masks import Mask, Plain


@dataclass(frozen=True)
class Goal:
    """What is asked for: the fastest mask that stays this close, or the closest that is this fast.

    Attributes:
        metric: `psnr` (dB, at least), `lpips` (at most), both to the plain pictures at the 10th percentile over prompts
            (of closeness); or `speedup`, all steps over computed steps.
    """

    metric: Literal["psnr", "lpips", "speedup"]
    value: float

    @property
    def measured(self) -> str:
        return "lpips" if self.metric == "lpips" else "psnr"

    def closeness(self, values: Sequence[float], quantile: float = 0.1) -> float:
        """The 10th percentile of it, higher is closer."""
        sign = -1 if self.metric == "lpips" else 1
        return float(np.quantile(sign * np.asarray(values), quantile))

    def is_met(self, values: Sequence[float]) -> bool:
        wanted = -self.value if self.metric == "lpips" else self.value
        return self.metric == "speedup" or self.closeness(values) >= wanted

    def said(self, values: Sequence[float]) -> str:
        """The 10th percentile in words."""
        p10 = abs(self.closeness(values))
        return f"LPIPS {p10:.4f}" if self.metric == "lpips" else f"{p10:.1f} dB"

    def __str__(self) -> str:
        return {"psnr": f"at least {self.value:g} dB", "lpips": f"an LPIPS of at most {self.value:g}"}.get(
            self.metric, f"{self.value:g} times as fast"
        )


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        call: of the pipeline; its `steps` given.
        prompts: at least four. A third of them is held back, both parts are at most 12.
        seed: of the first prompt's noise; each further one adds one.
        batch: images per call.
        minutes: after this long, no more masks are tried than are needed.
        lpips: the scorer, if the goal is one.
        also: other numbers of steps to name a mask for, unseen.
    """

    call: generation.Settings
    prompts: tuple[str, ...]
    seed: int = 0
    batch: int = 4
    minutes: float = 15.0
    lpips: Scorer | None = None
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """What a configuration gave on a part of the prompts: PSNR or LPIPS of each, seconds in the denoiser and in all."""

    name: str
    computed: float
    split: str
    values: dict[str, list[float]]
    denoiser_seconds: float
    seconds: float


@dataclass
class Tuned:
    """The result: the mask, what it gave, and everything that was measured on the way. `others`: number of steps -> a mask
    for it that was not run: the sparsest whose price is no higher."""

    mask: Mask
    goal: Goal
    rows: list[Row]
    plain: Plain
    described: dict[str, Any]
    call: dict[str, Any]
    masks: dict[int, list[Mask]]
    shape: list[int]
    others: dict[int, Mask]
    seconds: dict[str, float] = field(default_factory=dict)

    def row(self, name: str, split: str) -> Row | None:
        return next((r for r in self.rows if (r.name, r.split) == (name, split)), None)


def name_of(mask: Mask) -> str:
    how = f"with the tokens of {mask.thin}" if mask.thin else f"t{mask.trend:g}"
    return f"{','.join(map(str, mask.steps))} {how}"
