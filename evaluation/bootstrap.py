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
from typing import Any

import numpy as np
from scipy import stats

_FEW = 8  # clusters (of a stratum) below which the interval is Student's, not the bootstrap's
_BLOCK = 1 << 22  # resample weights held at once: 16 MB as int32, at any number of prompts


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; where none can be given, `low` and `high` are None and `reason` says why."""

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    level: float = 0.95
    reason: str = ""

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
    """Mean of `values` (n) with an interval from resampling `clusters` (n labels).

    With `strata` (n labels; a cluster lies in one stratum) the statistic is the unweighted mean of
    the strata's means, resampled within each. `resamples` draws come from a generator of their own.

    Of fewer than 8 clusters (in a stratum) a bootstrap cannot say how far the next one may lie: what it draws
    never leaves the values seen. Measured on 600 simulated sets of 2, 3, 4 and 6 normal values it covers 49, 74,
    87 and 93 % of the time for a nominal 95 %; Student's interval, with Welch's degrees of freedom over strata,
    covers 94 to 96 % and is used there.

    Values that are all equal would give an interval without width, as if 4 of 4 were certainty. With
    `bounds`, which no value can leave, such an interval is drawn from what n prompts can exclude (the
    binomial "rule of three"): another value in at most 1 - ((1 - level) / 2)^(1/n) of all prompts. Without
    bounds there is no interval.
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
    fewest = min(len(group) for group in groups)

    def interval(low: float, high: float) -> Interval:
        ends = (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))
        return Interval(value, float(ends[0]), float(ends[1]), len(values), len(position), level)

    def none(reason: str) -> Interval:
        return Interval(value, None, None, len(values), len(position), level, reason)

    if fewest < 2:
        return none("one prompt" if strata is None else "one prompt in a task")
    if _do_not_vary(sums, counts, groups):
        if bounds is None or not all(map(math.isfinite, bounds)):
            return none("all equal" if len(groups) == 1 else "all equal within tasks")
        return interval(*_excluded(sums, counts, groups, bounds, level))
    if fewest < _FEW:
        return interval(*_students(value, sums, counts, groups, level))
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled(sums[group], counts[group], resamples, rng) for group in groups], axis=0)
    low, high = np.quantile(draws, _tails(level, fewest))
    return interval(low, high)


Groups = Sequence[np.ndarray]  # indices of the clusters of each stratum


def _do_not_vary(sums: np.ndarray, counts: np.ndarray, groups: Groups) -> bool:
    """Whether no resampling could change the mean, up to rounding."""
    means = sums / counts
    return all(np.ptp(means[group]) <= 1e-12 * max(1.0, np.abs(means[group]).max()) for group in groups)


def _excluded(
    sums: np.ndarray, counts: np.ndarray, groups: Groups, bounds: tuple[float, float], level: float
) -> tuple[float, float]:
    """What equal values in every stratum leave possible, by the rule of three."""
    ends = []
    for group in groups:
        mean = sums[group].sum() / counts[group].sum()
        share = 1 - ((1 - level) / 2) ** (1 / len(group))
        ends.append((mean - share * (mean - bounds[0]), mean + share * (bounds[1] - mean)))
    low, high = np.mean(ends, axis=0)
    return low, high


def _students(
    value: float, sums: np.ndarray, counts: np.ndarray, groups: Groups, level: float
) -> tuple[float, float]:
    """Interval from the clusters' deviations: the mean is a ratio (sum of values over their number), whose
    variance is that of each cluster's residuals; strata add up, with degrees of freedom after Welch."""
    variances, weights = [], []
    for group in groups:
        residuals = sums[group] - counts[group] * sums[group].sum() / counts[group].sum()
        size = len(group)
        spread = float((residuals**2).sum()) / (size - 1)
        variances.append(spread * size / float(counts[group].sum()) ** 2 / len(groups) ** 2)
        weights.append(size - 1)
    total = sum(variances)
    freedom = total**2 / sum(v**2 / w for v, w in zip(variances, weights, strict=True))
    reach = _student(level, freedom) * math.sqrt(total)
    return value - reach, value + reach


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
    if groups < 2 or not np.isfinite(left_out).all():
        raise ValueError(f"a jackknife needs at least 2 groups and finite values, not {left_out.tolist()}")
    error = math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    reach = _student(level, groups - 1) * error
    return max(value - reach, bounds[0]), min(value + reach, bounds[1])


def _student(level: float, freedom: float) -> float:
    """Two-sided quantile of Student's t: 12.7 at one degree of freedom and 95 %, 1.96 at infinitely many."""
    return float(stats.t.ppf((1 + level) / 2, freedom))


def _tails(level: float, clusters: int) -> tuple[float, float]:
    """Quantiles to read off, widened for few clusters (Hesterberg 2015, "expanded percentile").

    A plain percentile interval is as narrow as a normal one with the biased variance: measured here
    on 2000 simulated comparisons it covered 88.2 % of the time at 8 prompts and 93.2 % at 60, for a
    nominal 95 %; widened it covers 93.3 % and 94.1 %.
    """
    tail = float(stats.norm.cdf(-_student(level, clusters - 1) * math.sqrt(clusters / (clusters - 1))))
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
