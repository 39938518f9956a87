"""Masks of computed steps, priced from plain runs alone: no candidate calls the model.

A sampler that adds length x prediction at every step ends where the sum of those says. What a gap of forecast steps
changes in that sum is a combination of plain predictions, so its size follows from their inner products (their Gram
matrix), and the best masks of every number of computed steps from dynamic programming over the last two of them.

Shapes: N steps, P prompts; a gap goes from the computed step a, with b computed before it, to c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Masks kept of every number of computed steps and of every last two of them.
BEAM = 5


@dataclass(frozen=True)
class Plain:
    """What plain runs say.

    Attributes:
        times_N: what forecasts run along, rising: the steps' log signal-to-noise ratio.
        lengths_N: what each step multiplies the prediction with before it adds it to the sample.
        grams_PNN: inner products of the predictions of all steps, of every prompt.
        corrects: what forecasts miss is made up for at the next computed step.
    """

    times_N: Array
    lengths_N: Array
    grams_PNN: Array
    corrects: bool = True

    @property
    def total(self) -> int:
        return len(self.times_N)

    def at(self, times_M: Array, lengths_M: Array) -> Plain:
        """The same for a run of M steps, as far as it can be told: predictions interpolated along time, so that the
        Gram matrix becomes W G W'. Ends are held."""
        eye = np.eye(self.total)
        weights_MN = np.stack([np.interp(times_M, self.times_N, row) for row in eye], axis=1)
        return replace(
            self,
            times_N=times_M,
            lengths_N=lengths_M,
            grams_PNN=weights_MN @ self.grams_PNN @ weights_MN.T,
        )


@dataclass(frozen=True)
class Gaps:
    """Squared errors of gaps, of every prompt, in the sample: `forecast` until c is computed, `line` after what was
    missed has been made up for."""

    forecast_PBAC: Array
    line_PAC: Array

    def prices(self, amplification_A: Array) -> Array:
        """(N + 1, N, N + 1) prices of (b, a, c): the geometric mean over prompts of A(a)^2 forecast + line, and forecast
        alone where the run ends, c = N. b = N: none is computed before a, whose prediction is held.

        A wrong sample changes the predictions that come after it, early in the run above all: A says by how much more
        the end is off than the forecast was (`accel.evaluation.tune.measure`).
        """
        squares = amplification_A[:, None] ** 2 * self.forecast_PBAC + self.line_PAC[:, None]
        squares[..., -1] = self.forecast_PBAC[..., -1]
        total = squares.shape[2]
        tiny = 1e-14 * max(float(squares.max()), 1e-30)
        prices = np.exp(np.log(np.maximum(squares, tiny)).mean(0))
        steps = np.arange(total)
        prices[:, steps, steps + 1] = 0  # the next step: no gap
        return prices


def gaps(plain: Plain, trend: float) -> Gaps:
    """All gaps, of forecasts of order 1 with this share of the trend (`accel.core.history`)."""
    total, lengths = plain.total, plain.lengths_N
    times = np.append(plain.times_N, np.nan)
    a, c = np.arange(total)[:, None], np.arange(total + 1)[None, :]
    b = np.arange(total + 1)[:, None, None]
    after = np.minimum(a + 1, c)  # an empty gap where c is a or before
    length_sums = np.append(0.0, np.cumsum(lengths))
    moment_sums = np.append(0.0, np.cumsum(lengths * plain.times_N))
    length_AC = length_sums[c] - length_sums[after]
    moment_AC = moment_sums[c] - moment_sums[after] - times[a] * length_AC  # sum of length x age
    # What the gap adds is (length + slope) v_a - slope v_b when forecast, first v_a + last v_c along the line.
    slope_BAC = np.where(b < a, trend * moment_AC / np.where(b < a, times[a] - times[b], 1), 0)
    last_AC = np.where((a < c) & (c < total), moment_AC / np.where(a < c, times[c] - times[a], 1), 0)
    first_AC = length_AC - last_AC

    sums = np.tril(np.ones((total + 1, total)), -1) * lengths  # row j: the steps before j
    forecast, line = [], []
    for plain_gram in plain.grams_PNN:
        gram = np.pad(plain_gram, (0, 1))  # step N: no prediction
        own = np.diag(gram)
        products = np.pad(sums, ((0, 0), (0, 1))) @ gram
        squares = sums @ plain_gram @ sums.T
        diagonal = np.diag(squares)
        missed_AC = diagonal[c] - 2 * squares[c, after] + diagonal[after]
        with_KAC = products.T[:, c] - products.T[:, after]  # the skipped steps with the prediction of k
        with_a, with_c = with_KAC[a, a, c], with_KAC[c, a, c]
        ahead = length_AC + slope_BAC
        forecast.append(
            missed_AC
            - 2 * ahead * with_a
            + 2 * slope_BAC * with_KAC
            + ahead**2 * own[a]
            - 2 * ahead * slope_BAC * gram[:, :total, None]
            + slope_BAC**2 * own[b]
        )
        made_up = missed_AC - 2 * (first_AC * with_a + last_AC * with_c)
        made_up = made_up + first_AC**2 * own[a] + 2 * first_AC * last_AC * gram[a, c] + last_AC**2 * own[c]
        line.append(made_up * plain.corrects)
    return Gaps(np.maximum(np.stack(forecast), 0), np.maximum(np.stack(line), 0))


@dataclass(frozen=True)
class Mask:
    """Computed steps, the share of the trend that forecasts between them believe, and what the price says; `thin`: the
    preset whose shares of the tokens they keep, in windows, which no price knows of ("": all tokens)."""

    steps: tuple[int, ...]
    trend: float
    price: float
    thin: str = ""


def price(steps: Sequence[int], prices: Array) -> float:
    """Of a mask: the sum over its gaps."""
    total = prices.shape[1]
    befores, afters = [total, *steps[:-1]], [*steps[1:], total]
    return float(sum(prices[b, a, c] for b, a, c in zip(befores, steps, afters, strict=True)))


def cheapest(prices: Array, trend: float) -> dict[int, list[Mask]]:
    """Number of computed steps -> its cheapest masks, best first, by dynamic programming over (b, a)."""
    total = prices.shape[1]
    costs = np.full((total, total, BEAM), np.inf)  # (b, a): the cheapest so far
    costs[0, 1:, 0] = prices[total, 0, 1:total]
    parents: list[NDArray[np.int64]] = []
    found = {1: [Mask((0,), trend, price((0,), prices))]}
    for count in range(2, total + 1):
        ends = costs + prices[:total, :, total, None]
        order = np.argsort(ends, axis=None)[:BEAM]
        kept = [np.unravel_index(i, ends.shape) for i in order if np.isfinite(ends.flat[i])]
        found[count] = [Mask(_trace(parents, *map(int, at)), trend, float(ends[at])) for at in kept]
        following = np.full_like(costs, np.inf)
        parent = np.zeros((total, total, BEAM), np.int64)
        for a in range(1, total - 1):
            options = (costs[:a, a, :, None] + prices[:a, a, None, a + 1 : total]).reshape(a * BEAM, -1)
            rows = np.argsort(options, axis=0)[:BEAM]
            following[a, a + 1 :, : len(rows)] = np.take_along_axis(options, rows, axis=0).T
            parent[a, a + 1 :, : len(rows)] = rows.T
        costs = following
        parents.append(parent)
    return found


def _trace(parents: Sequence[NDArray[np.int64]], b: int, a: int, slot: int) -> tuple[int, ...]:
    steps = [a]
    for parent in reversed(parents):
        steps.append(b)
        (before, slot), a = divmod(int(parent[b, a, slot]), BEAM), b
        b = before
    return tuple(reversed([*steps, b]))
