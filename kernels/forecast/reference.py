"""Forecasts by divided differences, in plain operations.

Shapes: any, as long as time stamps broadcast to values: () for a whole step, (B, N, 1) for one per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def forecast(values: Sequence[Tensor], stamps: Sequence[Tensor], now: float, trend: float) -> Tensor:
    differences = [v.float() for v in values]
    result, reach = differences[0], torch.ones_like(stamps[0])
    for k in range(1, len(values)):
        differences = [
            (newer - older) / (stamps[i] - stamps[i + k])
            for i, (newer, older) in enumerate(pairwise(differences))
        ]
        reach = reach * (now - stamps[k - 1])
        result = result + torch.where(stamps[k].isnan(), 0.0, differences[0] * reach)
    result = result.to(values[0].dtype)
    return result if trend == 1 else torch.lerp(values[0], result, trend)


def correct(prediction: Tensor, latest: Tensor, missed: Tensor, share: Tensor) -> Tensor:
    now = prediction.float()
    return (now + (share * (now - latest.float()) - missed)).to(prediction.dtype)
