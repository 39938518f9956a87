"""Bipartite soft matching on a grid: from similarities (`accel.kernels.match`) to a `TokenPlan`. Pure functions.

Shapes: G plan rows, N = H*W tokens, D destinations, K kept slots.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.core.plan import TokenPlan
from accel.kernels.plan import plan


def cell_size(grid: tuple[int, int], room: int) -> int | None:
    """Side of the smallest square cell, at least 2, with at most `room` destinations; None if none has."""
    height, width = grid
    for cell in range(2, max(height, width) + 1):
        if math.ceil(height / cell) * math.ceil(width / cell) <= room:
            return cell
    return None


def destinations(score_GN: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """(G, D): the position with the highest score in each square cell; cells at the edge may be cut.

    With uniform noise as the score: one random destination per cell, a jittered grid.
    """
    map_G1HW = score_GN.view(-1, 1, *grid)
    _, index = F.max_pool2d(map_G1HW, cell, stride=cell, ceil_mode=True, return_indices=True)
    return index.flatten(1)


def merge_plan(best_GN: Tensor, target_GN: Tensor, keep: int) -> TokenPlan:
    """Merge the N - keep most similar sources into their destinations: ToMe's bipartite soft matching
    (arXiv:2210.09461, section 3.2, steps 3 and 4). Slots keep the order of the grid."""
    dst_GK, owner_GN, size_GK, segments = plan(best_GN, target_GN, keep)
    return TokenPlan(dst_GK, owner_GN, size_GK, segments=segments)


def top_mask(score_GN: Tensor, count: int) -> Tensor:
    """(G, N) bool: the `count` highest scores of each row."""
    index = score_GN.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(score_GN, dtype=torch.bool).scatter(1, index, True)
