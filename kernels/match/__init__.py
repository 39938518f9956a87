"""Each token's most similar destination."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op, close

from . import reference


def _suits(x_BNC: Tensor, dst_GD: Tensor, exempt_GN: Tensor | None) -> bool:
    return x_BNC.dtype in FLOATS and dst_GD.dtype == torch.int64 and x_BNC.shape[1] * x_BNC.shape[2] < 2**31


def _agrees(args: Sequence[Any], found: Any, truth: Any) -> str | None:
    """By how similar the choice is, never by which it is: two destinations may be equally near."""
    x_BNC, dst_GD = args[:2]
    (best_GN, target_GN), (truth_GN, _) = found, truth
    if not bool((target_GN[..., None] == dst_GD[:, None]).any(2).all()):
        return "a target that is no destination"
    unit_GNC = reference.features(x_BNC, dst_GD.shape[0])
    chosen_GN = (unit_GNC * unit_GNC.gather(1, target_GN[..., None].expand_as(unit_GNC))).sum(2)
    source_GN = truth_GN.isfinite()
    # The reference's products are TF32's where that is allowed: good enough to judge a choice, not to judge a value.
    missed = float(torch.where(source_GN, truth_GN - chosen_GN, 0.0).max())
    if missed > 5e-3:
        return f"a destination less similar by {missed:.2g} than the best"
    return close(best_GN, chosen_GN.masked_fill(~source_GN, -math.inf))


_OP = Op(
    "match",
    "(Tensor x, Tensor dst, Tensor? exempt) -> (Tensor, Tensor)",
    reference.match,
    suits=_suits,
    agrees=_agrees,
    indices=lambda x, dst, exempt: [(dst, 0, x.shape[1])],
)


def match(x_BNC: Tensor, dst_GD: Tensor, exempt_GN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarity of every token to the nearest of its row's destinations: (similarity (G, N) float32,
    position (G, N) int64). Destinations and exempt tokens get -inf: they are no sources.

    Args:
        x_BNC: the batch is B / G copies (the halves of guidance, whose similarities are averaged) of G plan rows.
        dst_GD: positions in [0, N).
        exempt_GN: bool.
    """
    return _OP(x_BNC, dst_GD, exempt_GN)
