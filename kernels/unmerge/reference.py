"""full + expand(y - reduced), in plain operations.

Shapes: B batch, N tokens, K slots, C channels, P plan rows (1 or B).
"""

from __future__ import annotations

from torch import Tensor

from accel.kernels.indexing import rows


def unmerge(
    full_BNC: Tensor, y_BKC: Tensor, reduced_BKC: Tensor | None, owner_PN: Tensor, complete: bool
) -> Tensor:
    return full_BNC + expand(y_BKC if reduced_BKC is None else y_BKC - reduced_BKC, owner_PN, complete)


def expand(y_BKC: Tensor, owner_PN: Tensor, complete: bool) -> Tensor:
    """(B, K, C) -> (B, N, C): each token reads its slot; tokens with owner -1 read zero."""
    if complete:
        return rows(y_BKC, owner_PN)
    return rows(y_BKC, owner_PN.clamp(min=0)) * (owner_PN >= 0)[..., None].to(y_BKC.dtype)
