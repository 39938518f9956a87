"""Intervals must cover what they claim to, and treat the images of one prompt as one observation."""

import numpy as np
import pytest
from scipy import stats

from accel.evaluation.bootstrap import jackknife_interval, mean_interval
from accel.evaluation.report.summary import median_interval


def test_paired_interval_covers_a_known_difference():
    """Accelerated minus plain, 60 prompts x 4 seeds, prompts of very different difficulty.

    The true difference is -0.05. A 95 % interval must cover it in at least 90 of 100 repetitions.
    The seeds are fixed; over 2000 repetitions the coverage was 94.1 %.
    """
    covered = naive = 0
    for repetition in range(100):
        rng = np.random.default_rng(repetition)
        effect = np.repeat(-0.05 + 0.15 * rng.standard_normal(60), 4)
        difference = effect + 0.1 * rng.standard_normal(240)
        clusters = np.repeat(np.arange(60), 4).tolist()
        interval = mean_interval(difference, clusters, resamples=500)
        covered += interval.low <= -0.05 <= interval.high
        single = mean_interval(difference, list(range(240)), resamples=500)
        naive += single.low <= -0.05 <= single.high
    assert covered >= 90
    assert naive < 85  # the negative control: resampling images instead of prompts is too sure


def test_strata_are_weighted_equally_and_resampled_within():
    values = [1.0] * 30 + [0.0] * 10
    strata = ["a"] * 30 + ["b"] * 10
    interval = mean_interval(values, list(range(40)), strata)
    # Each stratum is constant: nothing varies if strata are kept, everything if they are mixed.
    assert (interval.value, interval.low, interval.reason) == (0.5, None, "all equal within tasks")
    # What 30 of 30 and 0 of 10 leave possible, by Clopper and Pearson, averaged.
    bounded = mean_interval(values, list(range(40)), strata, bounds=(0, 1))
    assert (bounded.low, bounded.high) == (
        pytest.approx((0.025 ** (1 / 30) + 0) / 2),
        pytest.approx((1 + 1 - 0.025**0.1) / 2),
    )
    mixed = mean_interval(values, list(range(40)))
    assert mixed.value == 0.75
    assert mixed.high - mixed.low > 0.1


def test_the_same_prompt_text_in_two_tasks_is_two_clusters():
    interval = mean_interval([1.0, 0.0, 1.0, 0.0], ["p", "q", "p", "q"], ["a", "a", "b", "b"])
    assert interval.clusters == 4


def test_one_prompt_gives_no_interval():
    interval = mean_interval([1.0, 0.0, 1.0], ["p", "p", "p"])
    assert interval.value == pytest.approx(2 / 3)
    assert (interval.low, interval.high, interval.reason) == (None, None, "one prompt")
    tasks = mean_interval([1.0, 0.0, 1.0], list("pqr"), ["a", "a", "b"])
    assert (tasks.low, tasks.reason) == (None, "one prompt in a task")


def test_all_equal_is_not_certainty():
    perfect = mean_interval([1.0] * 4, list("abcd"), bounds=(0, 1))
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.025**0.25)  # Clopper-Pearson for 4 of 4: 0.398
    no_flips = mean_interval([0.0] * 100, list(range(100)), bounds=(-1, 1))
    assert (no_flips.low, no_flips.high) == (
        pytest.approx(-0.0362, abs=1e-4),
        pytest.approx(0.0362, abs=1e-4),
    )
    for unbounded in ({}, {"bounds": (0, np.inf)}):  # nothing is known of what the next one may be
        none = mean_interval([0.1 + 0.2, 0.3] * 5, list(range(10)), **unbounded)
        assert (none.value, none.low, none.high, none.reason) == (pytest.approx(0.3), None, None, "all equal")


def test_intervals_of_few_prompts_are_students():
    """By hand: two values, one degree of freedom, t = 12.706; and scipy's own interval for five."""
    two = mean_interval([30.0, 32.0], ["a", "b"])
    assert (two.low, two.high) == (pytest.approx(31 - 12.7062), pytest.approx(31 + 12.7062))
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    five = mean_interval(values, list("abcde"))
    expected = stats.t.interval(0.95, 4, loc=4, scale=stats.sem(values))
    assert (five.low, five.high) == pytest.approx(expected)
    clipped = mean_interval([0.0, 1.0], ["a", "b"], bounds=(0, 1))
    assert (clipped.low, clipped.high) == (0, 1)
    # Two tasks of equal spread: Welch's degrees of freedom are those of both together.
    strata = mean_interval([1.0, 2.0, 3.0, 11.0, 12.0, 13.0], list(range(6)), ["a"] * 3 + ["b"] * 3)
    error = np.sqrt((1 / 3 + 1 / 3) / 4)  # variances 1 of 3 values each, the mean of two means
    assert (strata.value, strata.high) == (7.0, pytest.approx(7 + stats.t.ppf(0.975, 4) * error))


@pytest.mark.parametrize("prompts", [2, 3, 5, 7, 8])
def test_small_sets_cover_what_they_claim(prompts):
    """Nominal 95 %; the bootstrap alone covers 49, 74, 92 % of sets of 2, 3, 5."""
    covered = 0
    for repetition in range(300):
        values = np.random.default_rng(repetition).standard_normal(prompts)
        interval = mean_interval(values, list(range(prompts)), resamples=300)
        covered += interval.low <= 0 <= interval.high
    assert covered >= 0.92 * 300


def test_a_jackknife_of_two_groups_has_one_degree_of_freedom():
    low, high = jackknife_interval(1.0, [0.9, 1.1])
    assert (low, high) == pytest.approx((1 - 1.27062, 1 + 1.27062), abs=1e-5)
    with pytest.raises(ValueError, match="finite"):
        jackknife_interval(1.0, [0.9, float("nan")])


def test_many_prompts_stay_within_memory_and_match_theory():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(30_000)
    interval = mean_interval(values, list(range(30_000)), resamples=400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(30_000), rel=0.2)


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], ["a", "b"])])
def test_bad_input(values, clusters):
    with pytest.raises(ValueError, match="values"):
        mean_interval(values, clusters)


def test_median_interval_covers_without_assuming_a_shape():
    covered = 0
    for repetition in range(200):
        sample = np.random.default_rng(repetition).lognormal(size=25)
        interval = median_interval(sample.tolist())
        covered += interval["low"] <= 1.0 <= interval["high"]
    assert covered >= 185  # at least 95 % by construction
    assert median_interval([1, 2, 3, 4, 5])["low"] is None  # 5 values cannot give 95 %
    assert median_interval([1, 2, 3, 4, 5, 6])["low"] == 1
    assert median_interval([]) is None


def test_jackknife_interval_covers_a_statistic_that_is_no_mean():
    """A variance, 100 repetitions of 80 images, a tenth left out at a time; nominal 95 %."""
    covered = 0
    for repetition in range(100):
        x = np.random.default_rng(repetition).standard_normal(80)
        left_out = [np.var(np.delete(x, slice(8 * g, 8 * g + 8)), ddof=1) for g in range(10)]
        low, high = jackknife_interval(float(np.var(x, ddof=1)), left_out)
        covered += low <= 1.0 <= high
    assert 88 <= covered <= 99
    assert jackknife_interval(0.1, [0.0, 0.3], bounds=(0, 1)) == (0, 1)
    with pytest.raises(ValueError, match="at least 2 groups"):
        jackknife_interval(0.1, [0.0])
