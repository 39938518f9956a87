"""The last computed values of a prediction, from which it is forecast (`accel.kernels.forecast`).

TaylorSeer (arXiv:2503.06923, eq. 5) forecasts features with finite differences at a fixed interval. Here every
token has its own time stamps, which are irregular once tokens are computed at different steps, so that the
differences are Newton's divided differences; and only the denoiser's final output is forecast.

Shapes: any, as long as time stamps broadcast to values: () for a whole step, (B, N, 1) for one per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.kernels.forecast import forecast


def growth(age: Tensor | float, order: int) -> Any:
    """How the error of a forecast grows with the time since the last computed value: age^(order + 1), the
    remainder of a Taylor series."""
    return age ** (order + 1)


class History:
    """The last computed predictions of a denoising loop: values per call of a step, time stamps for all calls.

    Guidance that runs two calls a step has two lists of values and one of time stamps, because both calls
    compute the same tokens.

    Args:
        order: of the forecast; order + 1 values are kept.
        spread: time stamps -> the same, broadcasting to a prediction. The identity for stamps of shape ().
        trend: share of the extrapolated change that is believed: a damped trend, as in exponential smoothing.
    """

    def __init__(
        self, order: int, spread: Callable[[Tensor], Tensor] = lambda stamps: stamps, *, trend: float = 1.0
    ) -> None:
        self.order, self._spread, self._trend = order, spread, trend
        self.values: list[list[Tensor]] = []
        self.stamps: list[Tensor] = []

    def age(self, now: float) -> Tensor:
        """Time since each token was computed."""
        return (now - self.stamps[0]).abs()

    def forecasts(self, now: float) -> list[Tensor]:
        """The prediction of each call at time `now`."""
        stamps = [self._spread(s) for s in self.stamps]
        return [forecast(values, stamps, now, self._trend) for values in self.values]

    def start(self, outputs: Sequence[Tensor], now: float, shape: tuple[int, ...] = ()) -> None:
        """The first predictions of a loop, with time stamps of this shape."""
        self.values = [
            [v] * (self.order + 1) for v in outputs
        ]  # the older ones are not there: their stamp is NaN
        times = [now] + [math.nan] * self.order
        self.stamps = [torch.full(shape, t, device=outputs[0].device) for t in times]

    def add(self, outputs: Sequence[Tensor], now: float, computed: Tensor | None = None) -> None:
        """Predictions of a step, where `computed` (in the shape of the time stamps; None: everywhere)."""
        where = None if computed is None else self._spread(computed)
        self.values = [_push(old, new, where) for old, new in zip(self.values, outputs, strict=True)]
        self.stamps = _push(self.stamps, torch.full_like(self.stamps[0], now), computed)


def memory(*held: History | Tensor | None) -> int:
    """Bytes that histories, and tensors beside them, hold, counting once what they share."""
    # Storages, not tensors: half of a batch keeps the whole of it.
    storages = [t.untyped_storage() for item in held for t in _tensors(item)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _tensors(item: History | Tensor | None) -> Sequence[Tensor]:
    if item is None or isinstance(item, Tensor):
        return () if item is None else (item,)
    return (*item.stamps, *(v for values in item.values for v in values))


def _push(entries: list[Tensor], new: Tensor, where: Tensor | None) -> list[Tensor]:
    shifted = [new, *entries[:-1]]
    if where is None:
        return shifted
    return [torch.where(where, s, e) for s, e in zip(shifted, entries, strict=True)]
