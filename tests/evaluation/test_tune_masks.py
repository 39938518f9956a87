"""The prices of masks against a sampler written out, and dynamic programming against all masks there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from accel.core.history import History
from accel.evaluation.tune.masks import Plain, cheapest, gaps, price
from accel.methods.forecasting.correction import Correction

STEPS, PROMPTS, NUMBERS = 8, 3, 5


def runs(seed=0):
    """Predictions (P, N, L) that change smoothly, and their times and lengths."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.normal(size=STEPS)) * 3
    smooth = np.stack([times**k / (k + 1) for k in range(4)])
    values = np.einsum("pkl,kn->pnl", rng.normal(size=(PROMPTS, 4, NUMBERS)), smooth)
    return times, -rng.uniform(0.05, 0.3, STEPS), values + 0.1 * rng.normal(size=values.shape)


def plain_of(times, lengths, values, **options):
    return Plain(times, lengths, values @ values.transpose(0, 2, 1), **options)


def missed(times, lengths, values_NL, gap, trend):
    """What a gap changes in the sum of length x prediction, by the library's own forecast and correction: until the
    next step is computed, and after it."""
    b, a, c = gap
    history = History(1, trend=trend)
    v = torch.from_numpy(values_NL).float()
    if b is not None:
        history.start([v[b]], times[b])
        history.add([v[a]], times[a])
    else:
        history.start([v[a]], times[a])
    correction, before = Correction(), torch.zeros(NUMBERS)
    for j in range(a + 1, c):
        (forecast,) = history.forecasts(times[j])
        before += lengths[j] * (forecast - v[j])
        correction.add([forecast], [v[a]], times[j] - times[a], lengths[j])
    if c == len(times):
        return before, before
    correction.prepare(times[c] - times[a], lengths[c])
    after = before + lengths[c] * (correction.apply(0, v[c], v[a]) - v[c])
    return before, after


@pytest.mark.parametrize("trend", [1.0, 0.5])
@pytest.mark.parametrize("gap", [(None, 0, 3), (0, 1, 4), (1, 3, 6), (2, 5, 8), (None, 0, 8), (0, 6, 8)])
def test_a_gap_costs_what_the_forecast_and_the_correction_leave(gap, trend):
    times, lengths, values = runs()
    found = gaps(plain_of(times, lengths, values), trend)
    b, a, c = gap
    for p in range(PROMPTS):
        before, after = missed(times, lengths, values[p], gap, trend)
        expected = before.double().square().sum().item()
        got = found.forecast_PBAC[p, STEPS if b is None else b, a, c]
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-9)
        if c < STEPS:
            assert found.line_PAC[p, a, c] == pytest.approx(
                after.double().square().sum().item(), rel=1e-3, abs=1e-9
            )
    if trend == 1.0 and b is not None:
        assert not np.allclose(found.forecast_PBAC, gaps(plain_of(times, lengths, values), 0.5).forecast_PBAC)


def test_prices_amplify_the_forecast_alone_and_nothing_at_the_end():
    times, lengths, values = runs(1)
    found = gaps(plain_of(times, lengths, values), 1.0)
    amplification = np.linspace(3, 0.5, STEPS)
    prices = found.prices(amplification)
    b, a, c = 1, 3, 6
    squares = 3 + (0.5 - 3) * 3 / 7
    squares = squares**2 * found.forecast_PBAC[:, b, a, c] + found.line_PAC[:, a, c]
    assert prices[b, a, c] == pytest.approx(np.exp(np.log(squares).mean()))
    last = found.forecast_PBAC[:, 2, 5, STEPS]
    assert prices[2, 5, STEPS] == pytest.approx(np.exp(np.log(last).mean()))
    assert prices[0, 2, 3] == prices[4, 7, 8] == 0  # the next step: nothing is left out


def test_without_a_correction_what_the_forecast_missed_stays():
    times, lengths, values = runs(2)
    found = gaps(plain_of(times, lengths, values, corrects=False), 1.0)
    assert not found.line_PAC.any()
    assert found.forecast_PBAC[0, 0, 1, 4] > 0


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programming_finds_what_trying_all_masks_finds(seed):
    times, lengths, values = runs(seed)
    prices = gaps(plain_of(times, lengths, values), 0.75).prices(np.linspace(2, 0.5, STEPS))
    found = cheapest(prices, 0.75)
    assert sorted(found) == list(range(1, STEPS + 1))
    for count, masks in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        best = sorted(every, key=lambda steps: price(steps, prices))[:5]
        assert [mask.steps for mask in masks] == best
        for mask in masks:
            assert mask.price == pytest.approx(price(mask.steps, prices), abs=1e-12)


def test_another_number_of_steps_is_interpolated_in_time():
    times, lengths = np.linspace(-3, 3, STEPS), np.full(STEPS, -0.1)
    rng = np.random.default_rng(0)
    start, slope = rng.normal(size=(2, PROMPTS, 1, NUMBERS))
    line = start + slope * times[None, :, None]
    denser = np.linspace(-3, 3, 13)
    got = plain_of(times, lengths, line).at(denser, np.full(13, -0.06))
    expected = start + slope * denser[None, :, None]
    np.testing.assert_allclose(got.grams_PNN, expected @ expected.transpose(0, 2, 1), rtol=1e-9, atol=1e-9)
    assert got.total == 13
