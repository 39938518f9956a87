"""Kept tokens and their way back: the tokens of highest scores are computed, every other one takes the nearest one's result.

Shapes: G plan rows, B batch, N = H*W tokens, K kept ones, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.core.plan import TokenPlan


@dataclass(frozen=True)
class KeptPlan(TokenPlan):
    """Tokens that are computed for others.

    Attributes:
        mixing: (G, K, K), rows sum to one: what becomes of the results before they are handed back; None: they stay.
    """

    mixing: Tensor | None = None

    def expand(self, y_BKC: Tensor) -> Tensor:
        if self.mixing is not None:
            y_BKC = torch.matmul(self.mixing, y_BKC.float()).to(y_BKC.dtype)
        return super().expand(y_BKC)

    def change(self, x_BNC: Tensor, y_BKC: Tensor, reduced_BKC: Tensor | None = None) -> Tensor:
        """x + expand(y - reduced), or x + expand(y)."""
        return x_BNC + self.expand(y_BKC if reduced_BKC is None else y_BKC - reduced_BKC)

    def clone(self) -> TokenPlan:
        mixing = None if self.mixing is None else self.mixing.clone()
        return KeptPlan(**{**vars(super().clone()), "mixing": mixing})

    def repeat(self, times: int) -> TokenPlan:
        mixing = None if self.mixing is None else self.mixing.repeat(times, 1, 1)
        return KeptPlan(**{**vars(super().repeat(times)), "mixing": mixing})


def kept_plan(score_GN: Tensor, grid: tuple[int, int], keep: int, sigma: float | None = None) -> TokenPlan:
    """The `keep` tokens of highest scores, in the order of the grid; every token reads back from the nearest, of equally near ones
    from the first. Of equal scores the first token is kept.

    Args:
        sigma: DC-DiT's smoothing among kept tokens before that (arXiv:2603.06351): p y + (1 - p) W y, where p is the
            score and W_ij is proportional to exp(-d_ij^2 / 2 sigma^2) p_j; None: none.
    """
    dst_GK = score_GN.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values
    place_N2 = torch.cartesian_prod(
        *(torch.arange(n, device=score_GN.device, dtype=torch.float32) for n in grid)
    )
    kept_GK2 = place_N2[dst_GK]
    # Squared distances are whole numbers: ties are exact.
    distance_GNK = (place_N2[None, :, None] - kept_GK2[:, None]).square().sum(-1)
    owner_GN = distance_GNK.argmin(2)
    plan = TokenPlan.build(dst_GK, owner_GN)
    mixing = None
    if sigma is not None:
        p_GK = score_GN.gather(1, dst_GK).float()
        apart_GKK = (kept_GK2[:, :, None] - kept_GK2[:, None]).square().sum(-1)
        weight_GKK = (-apart_GKK / (2 * sigma**2)).exp() * p_GK[:, None]
        weight_GKK = weight_GKK / weight_GKK.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        mixing = torch.diag_embed(p_GK) + (1 - p_GK)[..., None] * weight_GKK
    return KeptPlan(**vars(plan), mixing=mixing)
