"""From similarities to the tables of a plan: which tokens stay, and where the others go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.kernels.dispatch import Op, close

from . import reference

#: One program holds a plan's tokens in its registers; beyond, they do not fit, and the reference runs.
MOST = 4096


def _suits(best_GN: Tensor, target_GN: Tensor, keep: int) -> bool:
    N = best_GN.shape[1]
    return best_GN.dtype == torch.float32 and target_GN.dtype == torch.int64 and 0 < keep < N <= MOST


def _agrees(args: Sequence[Any], found: Any, truth: Any) -> str | None:
    """Equally similar tokens may be chosen otherwise; everything else follows from the choice."""
    best_GN, target_GN, keep = args
    chosen, wanted = (_merged(dst_GK, best_GN) for dst_GK in (found[0], truth[0]))
    scores = (best_GN.masked_fill(~m, torch.inf).sort(1).values for m in (chosen, wanted))
    if not torch.equal(*scores):
        return "other tokens are merged than the most similar"
    return close(found, reference.tables(chosen, target_GN, keep))


def _merged(dst_GK: Tensor, best_GN: Tensor) -> Tensor:
    return torch.ones_like(best_GN, dtype=torch.bool).scatter(1, dst_GK, False)


_OP = Op(
    "plan",
    "(Tensor best, Tensor target, SymInt keep) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.plan,
    suits=_suits,
    agrees=_agrees,
    indices=lambda best, target, keep: [(target, 0, best.shape[1])],
)


def plan(best_GN: Tensor, target_GN: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the N - keep most similar tokens into their targets: ToMe's bipartite soft matching
    (arXiv:2210.09461, section 3.2, steps 3 and 4). Slots keep the order of the tokens.

    Args:
        best_GN: float32; -inf: never merged.
        target_GN: int64, a token that is not merged.
        keep: K, less than N by no more than the tokens that may be merged.

    Returns:
        (dst (G, K) int64, owner (G, N) int64, size (G, K) float32, segments (G, K + 1 + N) int32): the tables of a
        plan, see `accel.core.plan.TokenPlan`.
    """
    return _OP(best_GN, target_GN, keep)


_SEGMENTS = Op(
    "segments",
    "(Tensor owner, SymInt slots) -> (Tensor, Tensor)",
    reference.segments,
    suits=lambda owner, slots: (
        owner.dtype == torch.int64 and slots > 0 and (slots + 2) * owner.shape[1] < 2**31
    ),
    indices=lambda owner, slots: [(owner, -1, slots)],
)


def segments(owner_PN: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Of a table of owners, the last two of the tables of `plan`. Tokens without a slot (-1) come last.

    Args:
        owner_PN: int64, each token's slot in [0, slots), or -1.
    """
    return _SEGMENTS(owner_PN, slots)
