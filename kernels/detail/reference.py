"""Local variance and edges, in plain operations.

Shapes: B batch, N = H*W tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def detail(x_BNC: Tensor, height: int, width: int) -> Tensor:
    map_BCHW = x_BNC.float().transpose(1, 2).unflatten(2, (height, width))
    padded = F.pad(map_BCHW, (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(padded, 3, stride=1)
    variance = (F.avg_pool2d(padded.square(), 3, stride=1) - mean.square()).sum(1)
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    edge = (dx.square() + dy.square()).sum(1).sqrt()
    return (0.3 * _scaled(variance) + 0.7 * _scaled(edge)).flatten(1)


def _scaled(score_BHW: Tensor) -> Tensor:
    return score_BHW / score_BHW.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
