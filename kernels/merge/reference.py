"""Means of segments, in plain operations.

Shapes: B batch, N tokens, K slots, C channels, P plan rows (1 or B).
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.indexing import flat


def merge(x_BNC: Tensor, owner_PN: Tensor, size_PK: Tensor, segments: Tensor | None) -> Tensor:
    sum_BKC = segment_sum(x_BNC, owner_PN, size_PK.shape[1])
    return (sum_BKC / size_PK.clamp(min=1)[..., None]).to(x_BNC.dtype)


def segment_sum(x_BNC: Tensor, owner_PN: Tensor, slots: int) -> Tensor:
    """Sum of the rows of each slot in float32; rows with owner -1 go to an extra slot that is dropped.

    `index_put_(accumulate=True)` sorts its indices on CUDA and adds in a fixed order; `index_add_` uses
    atomics there, so two equal runs would differ in their last bits.
    """
    B, _, C = x_BNC.shape
    owner_PN = torch.where(owner_PN < 0, slots, owner_PN)
    index = flat(owner_PN.expand(B, -1), slots + 1)
    out = torch.zeros(B * (slots + 1), C, dtype=torch.float32, device=x_BNC.device)
    x = x_BNC.flatten(0, 1).float()
    out = out.index_put((index,), x, accumulate=True) if x.is_cuda else out.index_add(0, index, x)
    return out.view(B, slots + 1, C)[:, :slots]
