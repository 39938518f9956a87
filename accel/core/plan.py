"""Index data that says which tokens are computed and which slot every token reads back from.

Shapes: B batch, N tokens, K computed slots, C channels, P plan rows (1: shared by the batch, or B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.kernels.indexing import rows
from accel.kernels.merge import merge
from accel.kernels.plan import segments
from accel.kernels.unmerge import expand, unmerge


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
        segments: (P, K + 1 + N) int32, every slot's list of tokens (`accel.kernels.plan`); None: whoever needs it
            makes it.
    """

    dst: Tensor
    owner: Tensor
    size: Tensor
    complete: bool = True
    centroid: bool = False
    classes: tuple[tuple[int, int], ...] = ()
    segments: Tensor | None = None

    @staticmethod
    def build(dst: Tensor, owner: Tensor, *, complete: bool = True) -> TokenPlan:
        """A plan from its two index tables; counts the tokens of each slot."""
        size, lists = segments(owner, dst.shape[1])
        return TokenPlan(dst, owner, size, complete, segments=lists)

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
        return rows(x_BN, self.dst)

    def reduce(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C): the mean of the tokens of each slot, accumulated in float32."""
        return merge(x_BNC, self.owner, self.size, self.segments)

    def expand(self, y_BKC: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C): each token reads its slot; tokens with owner -1 read zero."""
        return expand(y_BKC, self.owner, self.complete)

    def change(self, x_BNC: Tensor, y_BKC: Tensor, reduced_BKC: Tensor | None = None) -> Tensor:
        """x + expand(y - reduced), or x + expand(y): each token takes over what changed in its slot."""
        return unmerge(x_BNC, y_BKC, reduced_BKC, self.owner, complete=self.complete)

    def write(self, x_BN: Tensor, y_BK: Tensor) -> None:
        """Put each slot's row of (B, K, ...) at its own position of (B, N, ...), in place."""
        if self.dst.shape[0] == 1:
            x_BN.index_copy_(1, self.dst[0], y_BK)
        else:
            row_B1 = torch.arange(x_BN.shape[0], device=x_BN.device)[:, None]
            x_BN.index_put_((row_B1, self.dst), y_BK)

    def before(self, references: int, *, computed: bool = True) -> TokenPlan:
        """The plan for these tokens and `references` more behind them, each of which is computed, or keeps what it is."""
        if not references:
            return self
        behind = torch.arange(references, device=self.dst.device).expand(self.dst.shape[0], -1)
        if not computed:
            owner = torch.cat([self.owner, torch.full_like(behind, -1)], 1)
            return replace(self, owner=owner, complete=False, segments=None)
        dst = torch.cat([self.dst, behind + self.tokens], 1)
        owner = torch.cat([self.owner, behind + self.slots], 1)
        size = torch.cat([self.size, torch.ones_like(behind, dtype=self.size.dtype)], 1)
        classes = (*self.classes, (1, references)) if self.classes else ()
        return replace(self, dst=dst, owner=owner, size=size, classes=classes, segments=None)

    def of_images(self, count: int) -> TokenPlan:
        """The rows of the first images: those of one of guidance's branches."""
        return self if self.dst.shape[0] <= count else self._each(lambda table: table[:count])

    def clone(self) -> TokenPlan:
        return self._each(Tensor.clone)

    def repeat(self, times: int) -> TokenPlan:
        """The plan for `times` copies of the batch laid one after the other (the halves of guidance)."""
        if times == 1:
            return self
        return self._each(lambda table: table.repeat(times, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenPlan:
        lists = None if self.segments is None else change(self.segments)
        return replace(
            self, dst=change(self.dst), owner=change(self.owner), size=change(self.size), segments=lists
        )
