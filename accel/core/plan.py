"""Index data that says which tokens are computed and which slot every token reads back from.

Shapes: B batch, N tokens, K computed slots, C channels, P plan rows (1: shared by the batch, or B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPlan:
    """K computed slots standing for N tokens. Merging, pruning and chunking each *produce* one.

    Attributes:
        dst: (P, K) int64, the position each slot stands for; it picks the rows of rotary tables, masks and
            anything else that is given per token.
        owner: (P, N) int64, the slot each token reads back from; -1 reads nothing and keeps its residual.
        size: (P, K) float32, how many tokens each slot stands for.
        complete: no owner is -1. A host-side fact given by whoever builds the plan, because asking the
            tensor would wait for the device.
        centroid: each slot stands at the centre of its tokens, not at `dst`: rotary tables are averaged.
        classes: where slots are in order of size, (size, how many slots) in that order: a host-side copy of `size`.
            Empty: in no order.
    """

    dst: Tensor
    owner: Tensor
    size: Tensor
    complete: bool = True
    centroid: bool = False
    classes: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def build(dst: Tensor, owner: Tensor, *, complete: bool = True) -> TokenPlan:
        """A plan from its two index tables; counts the tokens of each slot."""
        size_PK = _segment_sum(torch.ones_like(owner, dtype=torch.float32)[..., None], owner, dst.shape[1])
        return TokenPlan(dst, owner, size_PK[..., 0], complete)

    @staticmethod
    def permutation(order: Tensor) -> TokenPlan:
        """The plan that computes all tokens in another order, (N,) or (P, N): a model that knows where its
        tokens are must not notice. This is what every adapter is tested with."""
        dst = order if order.ndim == 2 else order[None]
        return TokenPlan.build(dst, dst.argsort(dim=1))

    @property
    def slots(self) -> int:
        return self.dst.shape[1]

    @property
    def tokens(self) -> int:
        return self.owner.shape[1]

    def take(self, x_BN: Tensor) -> Tensor:
        """(B, N, ...) -> (B, K, ...): the row of each slot's own position."""
        return _rows(x_BN, self.dst)

    def reduce(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C): the mean of the tokens of each slot, accumulated in float32."""
        sum_BKC = _segment_sum(x_BNC, self.owner, self.slots)
        return (sum_BKC / self.size.clamp(min=1)[..., None]).to(x_BNC.dtype)

    def expand(self, y_BKC: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C): each token reads its slot; tokens with owner -1 read zero."""
        if self.complete:
            return _rows(y_BKC, self.owner)
        return _rows(y_BKC, self.owner.clamp(min=0)) * (self.owner >= 0)[..., None].to(y_BKC.dtype)

    def write(self, x_BN: Tensor, y_BK: Tensor) -> None:
        """Put each slot's row of (B, K, ...) at its own position of (B, N, ...), in place."""
        if self.dst.shape[0] == 1:
            x_BN.index_copy_(1, self.dst[0], y_BK)
        else:
            row_B1 = torch.arange(x_BN.shape[0], device=x_BN.device)[:, None]
            x_BN.index_put_((row_B1, self.dst), y_BK)

    def clone(self) -> TokenPlan:
        return replace(self, dst=self.dst.clone(), owner=self.owner.clone(), size=self.size.clone())

    def repeat(self, times: int) -> TokenPlan:
        """The plan for `times` copies of the batch laid one after the other (the halves of guidance)."""
        if times == 1:
            return self
        dst, owner, size = (t.repeat(times, 1) for t in (self.dst, self.owner, self.size))
        return replace(self, dst=dst, owner=owner, size=size)


def _rows(x_BN: Tensor, index_PK: Tensor) -> Tensor:
    """x[b, index[b or 0]]. index_select copies whole rows; `gather` would need an index of x's own size."""
    if index_PK.shape[0] == 1:
        return x_BN.index_select(1, index_PK[0])
    B, N = x_BN.shape[:2]
    return x_BN.flatten(0, 1).index_select(0, _flat(index_PK, N)).unflatten(0, (B, index_PK.shape[1]))


def _segment_sum(x_BNC: Tensor, owner_PN: Tensor, slots: int) -> Tensor:
    """Sum of the rows of each slot in float32; rows with owner -1 go to an extra slot that is dropped.

    `index_put_(accumulate=True)` sorts its indices on CUDA and adds in a fixed order; `index_add_` uses
    atomics there, so two equal runs would differ in their last bits.
    """
    B, _, C = x_BNC.shape
    owner_PN = torch.where(owner_PN < 0, slots, owner_PN)
    index = _flat(owner_PN.expand(B, -1), slots + 1)
    out = torch.zeros(B * (slots + 1), C, dtype=torch.float32, device=x_BNC.device)
    x = x_BNC.flatten(0, 1).float()
    out = out.index_put((index,), x, accumulate=True) if x.is_cuda else out.index_add(0, index, x)
    return out.view(B, slots + 1, C)[:, :slots]


def _flat(index_BK: Tensor, rows: int) -> Tensor:
    offset_B1 = torch.arange(index_BK.shape[0], device=index_BK.device)[:, None] * rows
    return (index_BK + offset_B1).flatten()
