"""Drawing tokens for a window: pure functions of distributions and noise.

Shapes: B images, W slots of a window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(weight: Tensor, uniform: Tensor) -> Tensor:
    """Draw by inverting the cumulative distribution: one uniform number per token instead of V exponentials.

    Args:
        weight: (..., V) weights >= 0, of any sum.
        uniform: (...) in [0, 1).

    Returns:
        (...) int64 tokens, never one of weight 0 unless all weights are.
    """
    cumulative = weight.cumsum(-1)
    at = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)
    at = at.clamp(max=weight.shape[-1] - 1)
    # A parallel sum need not be monotone in its last bits, and could point at a token of weight 0.
    best = weight.argmax(-1, keepdim=True)
    return torch.where(weight.gather(-1, at) > 0, at, best)[..., 0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(..., V) weights [p - q]+ to draw from after a rejection (arXiv:2211.17192, theorem 1), unnormalised.

    Where nothing is left (p = q, so that nothing was rejected but by rounding), p.
    """
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def carry(p_BWV: Tensor, enters_BWV: Tensor, advance_B: Tensor) -> Tensor:
    """What the drafts of the next window are drawn from (B, W - 1, V), when `advance_B` slots have become final.

    A draft that stays in the window has just been drawn from the p of its slot, by whichever coupling, so its q
    is that p: also if the coupling kept the token, which otherwise would be verified against a q that it no
    longer follows. Slots that enter have theirs.
    """
    width, vocabulary = p_BWV.shape[1:]
    index_BW = advance_B[:, None] + torch.arange(width - 1, device=p_BWV.device)
    return torch.cat([p_BWV, enters_BWV], 1).gather(1, index_BW[..., None].expand(-1, -1, vocabulary))


def above(width: int, row: int, device: torch.device) -> Tensor:
    """(W,) for the W slots behind a window: where, from the window's first slot on, the token right above stands.

    One row up, or more rows until it is not behind the window itself. Negative: before the window.
    """
    behind_W = torch.arange(width, device=device)
    return width + behind_W - row * (behind_W // row + 1)
