"""Bootstrap intervals that resample prompts, not images.

The images of one prompt (several seeds) succeed and fail together, so resampling single images
would give intervals that are too narrow. Whole prompts ("clusters") are drawn with replacement;
where a score is an unweighted mean over tasks ("strata", GenEval's overall), within each task.
A paired comparison is the same function on per-sample differences.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_BLOCK = 1 << 22  # resample weights held at once: 16 MB as int32, at any number of prompts


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval; `low` and `high` are None below two prompts."""

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` (n) with a percentile interval from resampling `clusters` (n labels).

    With `strata` (n labels; a cluster lies in one stratum) the statistic is the unweighted mean of
    the strata's means, resampled within each. `resamples` draws come from a generator of their own.

    Values that are all equal would give an interval without width, as if 4 of 4 were certainty. With
    `bounds`, which no value can leave, such an interval is drawn from what n prompts can exclude (the
    binomial "rule of three"): another value in at most 1 - ((1 - level) / 2)^(1/n) of all prompts.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no values to take a mean of")
    if len(clusters) != len(values) or (strata is not None and len(strata) != len(values)):
        raise ValueError("values, clusters and strata must have one length")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), not {level}")
    keys = list(clusters) if strata is None else list(zip(strata, clusters, strict=True))
    position: dict[Hashable, int] = {}
    index = np.fromiter((position.setdefault(key, len(position)) for key in keys), np.int64, len(keys))
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index).astype(np.float64)
    stratum = [None if strata is None else key[0] for key in position]  # type: ignore[index]
    groups = [
        np.array([i for i, label in enumerate(stratum) if label == name]) for name in dict.fromkeys(stratum)
    ]

    value = float(np.mean([sums[group].sum() / counts[group].sum() for group in groups]))
    if min(len(group) for group in groups) < 2:
        return Interval(value, None, None, len(values), len(position), level)
    if bounds is not None and np.ptp(values) == 0:
        share = 1 - ((1 - level) / 2) ** (1 / len(position))
        low, high = value - share * (value - bounds[0]), value + share * (bounds[1] - value)
        return Interval(value, float(low), float(high), len(values), len(position), level)
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled(sums[group], counts[group], resamples, rng) for group in groups], axis=0)
    low, high = np.quantile(draws, _tails(level, min(len(group) for group in groups)))
    return Interval(value, float(low), float(high), len(values), len(position), level)


def jackknife_interval(
    value: float,
    replicates: Sequence[float],
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of a statistic of whole sets (FID, KID, ...) from a delete-a-group jackknife.

    `replicates` are the statistic without each of the equal groups in turn. A bootstrap would not do:
    it repeats images, and a repeated image is its own nearest neighbour. What is covered is the mean of
    the statistic *at this n*; measured on 100 simulated pairs of sets of 200, between 90 and 100 times.
    """
    left_out = np.asarray(replicates, dtype=np.float64)
    groups = len(left_out)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, not {groups}")
    error = math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    reach = _student(level, groups - 1) * error
    return max(value - reach, bounds[0]), min(value + reach, bounds[1])


def _student(level: float, dof: int) -> float:
    """Two-sided quantile of Student's t, from its expansion in 1 / degrees of freedom."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)


def _tails(level: float, clusters: int) -> tuple[float, float]:
    """Quantiles to read off, widened for few clusters (Hesterberg 2015, "expanded percentile").

    A plain percentile interval is as narrow as a normal one with the biased variance: measured here
    on 2000 simulated comparisons it covered 88.2 % of the time at 8 prompts and 93.2 % at 60, for a
    nominal 95 %; widened it covers 93.3 % and 94.1 %.
    """
    tail = NormalDist().cdf(-_student(level, clusters - 1) * math.sqrt(clusters / (clusters - 1)))
    return tail, 1 - tail


def _resampled(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    size = len(sums)
    block = max(1, _BLOCK // size)
    uniform = np.full(size, 1 / size)
    parts = []
    for start in range(0, resamples, block):
        weights = rng.multinomial(size, uniform, size=min(block, resamples - start))
        parts.append((weights @ sums) / (weights @ counts))
    return np.concatenate(parts)
