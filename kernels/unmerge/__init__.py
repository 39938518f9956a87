"""full + expand(y - reduced): where tokens leave a span."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op

from . import reference
from .reference import expand

__all__ = ["expand", "unmerge"]


def _suits(
    full_BNC: Tensor, y_BKC: Tensor, reduced_BKC: Tensor | None, owner_PN: Tensor, complete: bool
) -> bool:
    same = (y_BKC,) if reduced_BKC is None else (y_BKC, reduced_BKC)
    B = full_BNC.shape[0]
    return (
        full_BNC.dtype in FLOATS
        and full_BNC.ndim == 3
        and all(t.dtype == full_BNC.dtype and t.shape == y_BKC.shape and t.shape[0] == B for t in same)
        and owner_PN.dtype == torch.int64
        and owner_PN.shape[0] in (1, B)
    )


_OP = Op(
    "unmerge",
    "(Tensor full, Tensor y, Tensor? reduced, Tensor owner, bool complete) -> Tensor",
    reference.unmerge,
    suits=_suits,
    indices=lambda full, y, reduced, owner, complete: [(owner, 0 if complete else -1, y.shape[1])],
    fuses=True,
)


def unmerge(
    full_BNC: Tensor, y_BKC: Tensor, reduced_BKC: Tensor | None, owner_PN: Tensor, *, complete: bool
) -> Tensor:
    """Add to every token what changed in its slot.

    Args:
        reduced_BKC: what y was; None: y is the change.
        owner_PN: int64, each token's slot; -1: none, nothing is added.
        complete: no owner is -1.
    """
    return _OP(full_BNC, y_BKC, reduced_BKC, owner_PN, complete)
