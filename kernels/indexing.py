"""Rows by index where one table of indices may serve the whole batch.

Shapes: B batch, N rows, K chosen rows, P rows of indices (1: shared by the batch, or B).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x_BN: Tensor, index_PK: Tensor) -> Tensor:
    """x[b, index[b or 0]]. index_select copies whole rows; `gather` would need an index of x's own size."""
    if index_PK.shape[0] == 1:
        return x_BN.index_select(1, index_PK[0])
    B, N = x_BN.shape[:2]
    return x_BN.flatten(0, 1).index_select(0, flat(index_PK, N)).unflatten(0, (B, index_PK.shape[1]))


def flat(index_BK: Tensor, rows: int) -> Tensor:
    """Indices into B * rows rows."""
    offset_B1 = torch.arange(index_BK.shape[0], device=index_BK.device)[:, None] * rows
    return (index_BK + offset_B1).flatten()
