"""Forecasts of a prediction, and what they missed, made up for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op

from . import reference


def stamps_layout(value: Tensor, stamp: Tensor) -> tuple[int, int] | None:
    """(how many numbers follow each other under one run of stamps, how many of those stamps there are): () and
    (B, N, 1) and (B, 1, H, W) against (B, N, C) and (B, C, H, W) are of that form. None: this stamp is not."""
    if stamp.numel() == 1:
        return value.numel(), 1
    if stamp.ndim != value.ndim:
        return None
    own = [s == v for s, v in zip(stamp.shape, value.shape, strict=True)]
    spread = [i for i, same in enumerate(own) if not same]
    if any(stamp.shape[i] != 1 for i in spread) or (
        spread and spread != list(range(spread[0], spread[-1] + 1))
    ):
        return None
    inner = math.prod(value.shape[spread[-1] + 1 :]) if spread else 1
    return math.prod(value.shape[i] for i in spread) * inner, inner


def _suits(values: Sequence[Tensor], stamps: Sequence[Tensor], now: float, trend: float) -> bool:
    return (
        2 <= len(values) <= 3
        and values[0].dtype in FLOATS
        and values[0].numel() < 2**31
        and all(v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)
        and all(s.dtype == torch.float32 and s.shape == stamps[0].shape for s in stamps)
        and stamps_layout(values[0], stamps[0]) is not None
    )


_FORECAST = Op(
    "forecast",
    "(Tensor[] values, Tensor[] stamps, float now, float trend) -> Tensor",
    reference.forecast,
    suits=_suits,
    fuses=True,
)
_CORRECT = Op(
    "correct",
    "(Tensor prediction, Tensor latest, Tensor missed, Tensor share) -> Tensor",
    reference.correct,
    suits=lambda prediction, latest, missed, share: (
        prediction.dtype in FLOATS
        and latest.dtype == prediction.dtype
        and missed.dtype == share.dtype == torch.float32
        and prediction.shape == latest.shape == missed.shape
        and share.numel() == 1
        and prediction.numel() < 2**31
    ),
    fuses=True,
)


def forecast(values: Sequence[Tensor], stamps: Sequence[Tensor], now: float, trend: float = 1.0) -> Tensor:
    """The polynomial through (stamps[i], values[i]) at time `now`, in Newton's form; exact for polynomials of
    degree < len(values).

    Newton's form, because equal values then give exactly that value: all differences are zero.

    Args:
        values: newest first.
        stamps: when each value was computed; NaN: not there (yet), nor any after it, and its value is ignored.
        now: time to forecast.
        trend: share of the extrapolated change that is believed.

    Returns:
        The forecast, in the dtype of the values; computed in float32.
    """
    return _FORECAST(list(values), list(stamps), now, trend)


def correct(prediction: Tensor, latest: Tensor, missed: Tensor, share: Tensor) -> Tensor:
    """prediction + share * (prediction - latest) - missed, in float32.

    Args:
        missed: float32, as large as the prediction.
        share: () float32.
    """
    return _CORRECT(prediction, latest, missed, share)
