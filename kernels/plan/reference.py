"""The tables of a plan, in plain operations.

Shapes: G and P plan rows, N tokens, K kept slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plan(best_GN: Tensor, target_GN: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    merged_GR = best_GN.topk(best_GN.shape[1] - keep, dim=1, sorted=False).indices
    is_merged = torch.zeros_like(best_GN, dtype=torch.bool).scatter(1, merged_GR, True)
    return tables(is_merged, target_GN, keep)


def tables(is_merged_GN: Tensor, target_GN: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dst, owner, size, segments) of a choice."""
    slot_GN = (~is_merged_GN).long().cumsum(1) - 1
    position = torch.arange(slot_GN.shape[1], device=slot_GN.device).expand_as(slot_GN)
    # Merged tokens write to a slot past the end, which is cut off: no data-dependent shape.
    dst_GK = slot_GN.new_zeros(slot_GN.shape[0], keep + 1).scatter(
        1, slot_GN.masked_fill(is_merged_GN, keep), position
    )
    owner_GN = torch.where(is_merged_GN, slot_GN.gather(1, target_GN), slot_GN)
    return (dst_GK[:, :keep].contiguous(), owner_GN, *segments(owner_GN, keep))


def segments(owner_PN: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Of a table of owners: (how many tokens each slot has, (P, K) float32; where each slot's list of tokens begins,
    and then those lists, (P, K + 1 + N) int32). Tokens without a slot (-1) come last."""
    owner_PN = torch.where(owner_PN < 0, slots, owner_PN)
    size_PK = torch.zeros(owner_PN.shape[0], slots + 1, dtype=torch.int32, device=owner_PN.device)
    size_PK = size_PK.scatter_add(1, owner_PN, torch.ones_like(owner_PN, dtype=torch.int32))[:, :slots]
    begin_PK = torch.nn.functional.pad(size_PK.cumsum(1, dtype=torch.int32), (1, 0))
    member_PN = owner_PN.argsort(dim=1, stable=True).int()
    return size_PK.float(), torch.cat([begin_PK, member_PN], 1)
