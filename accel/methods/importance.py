"""Which tokens matter: they are protected from being merged.

Shapes: B batch, N = H*W tokens, C channels. Scores are (B, N), larger is more important.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def guidance_magnitude(outputs: tuple[Tensor, ...], samples: int) -> Tensor | None:
    """|v_cond - v_uncond| per token: Importance-based Token Merging (arXiv:2411.16720), section 4.

    Args:
        outputs: predictions (B, N, C) of one step: two calls, or one with both halves of guidance.
        samples: images per step.

    Returns:
        (samples, N), or None if the step had no guidance to compare.
    """
    if len(outputs) == 2 and outputs[0].shape == outputs[1].shape:
        a, b = outputs
    elif len(outputs) == 1 and outputs[0].shape[0] == 2 * samples:
        a, b = outputs[0].chunk(2)
    else:
        return None
    return (a - b).float().norm(dim=-1)


def local_detail(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """0.3 * local variance + 0.7 * edge strength of the features, each scaled to mean 1.

    The importance map of LiteVGGT (weights from the paper), with the edge as a central difference: on feature
    maps a Sobel kernel per channel costs three times as much and ranks tokens almost alike.
    """
    map_BCHW = x_BNC.float().transpose(1, 2).unflatten(2, grid)
    padded = F.pad(map_BCHW, (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(padded, 3, stride=1)
    variance = (F.avg_pool2d(padded.square(), 3, stride=1) - mean.square()).sum(1)
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    edge = (dx.square() + dy.square()).sum(1).sqrt()
    return (0.3 * _scaled(variance) + 0.7 * _scaled(edge)).flatten(1)


def _scaled(score_BHW: Tensor) -> Tensor:
    return score_BHW / score_BHW.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
