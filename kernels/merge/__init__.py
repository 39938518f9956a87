"""The mean of each slot's tokens: where tokens enter a span."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op

from . import reference


def _suits(x_BNC: Tensor, owner_PN: Tensor, size_PK: Tensor, segments: Tensor | None) -> bool:
    P, N = owner_PN.shape
    return (
        x_BNC.dtype in FLOATS
        and x_BNC.ndim == 3
        and owner_PN.dtype == torch.int64
        and P in (1, x_BNC.shape[0])
        and size_PK.shape[1] * N < 2**31 - N
    )


_OP = Op(
    "merge",
    "(Tensor x, Tensor owner, Tensor size, Tensor? segments) -> Tensor",
    reference.merge,
    suits=_suits,
    indices=lambda x, owner, size, segments: [(owner, -1, size.shape[1])],
)


def merge(x_BNC: Tensor, owner_PN: Tensor, size_PK: Tensor, segments: Tensor | None = None) -> Tensor:
    """(B, N, C) -> (B, K, C): the mean of the tokens of each slot, accumulated in float32; 0 for a slot without any.

    Args:
        owner_PN: int64, each token's slot; -1: none.
        size_PK: float32, how many tokens each slot has.
        segments: (P, K + 1 + N) int32, every slot's list of tokens, as `accel.kernels.plan` makes it; None: it is
            made here where it is needed.
    """
    return _OP(x_BNC, owner_PN, size_PK, segments)
