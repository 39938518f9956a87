"""Bipartite soft matching on a grid: from token features to a `TokenPlan`. Pure functions.

Shapes: G plan rows, B batch, N = H*W tokens, D destinations, K kept slots, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.core.plan import TokenPlan


def features(x_BNC: Tensor, rows: int) -> Tensor:
    """(B, N, C) -> (rows, N, B/rows * C), whose inner product is the mean cosine similarity in a row.

    The batch is B/rows copies (the halves of guidance) of `rows` images, or rows is 1.
    """
    x = F.normalize(x_BNC.float(), dim=-1)
    copies = x.shape[0] // rows
    x = x.unflatten(0, (copies, rows)).permute(1, 2, 0, 3).flatten(2)
    return x / math.sqrt(copies)


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


def match(unit_GNC: Tensor, dst_GD: Tensor, exempt_GN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's best destination: (similarity (G, N), destination position (G, N)).

    Destinations and exempt tokens get similarity -inf: they are no sources.
    """
    dst_GDC = unit_GNC.gather(1, dst_GD[..., None].expand(-1, -1, unit_GNC.shape[2]))
    best_GN, arg_GN = (unit_GNC @ dst_GDC.transpose(1, 2)).max(dim=2)
    best_GN = best_GN.scatter(1, dst_GD, -math.inf)
    if exempt_GN is not None:
        best_GN = best_GN.masked_fill(exempt_GN, -math.inf)
    return best_GN, dst_GD.gather(1, arg_GN)


def merge_plan(best_GN: Tensor, target_GN: Tensor, keep: int) -> TokenPlan:
    """Merge the N - keep most similar sources into their destinations: ToMe's bipartite soft matching
    (arXiv:2210.09461, section 3.2, steps 3 and 4). Slots keep the order of the grid."""
    N = best_GN.shape[1]
    merged_GR = best_GN.topk(N - keep, dim=1, sorted=False).indices
    is_merged = torch.zeros_like(best_GN, dtype=torch.bool).scatter(1, merged_GR, True)
    slot_GN = (~is_merged).long().cumsum(1) - 1
    position = torch.arange(N, device=best_GN.device).expand_as(slot_GN)
    # Merged tokens write to a slot past the end, which is cut off: no data-dependent shape.
    dst_GK = slot_GN.new_zeros(slot_GN.shape[0], keep + 1).scatter(
        1, slot_GN.masked_fill(is_merged, keep), position
    )
    owner_GN = torch.where(is_merged, slot_GN.gather(1, target_GN), slot_GN)
    return TokenPlan.build(dst_GK[:, :keep].contiguous(), owner_GN)


def top_mask(score_GN: Tensor, count: int) -> Tensor:
    """(G, N) bool: the `count` highest scores of each row."""
    index = score_GN.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(score_GN, dtype=torch.bool).scatter(1, index, True)
