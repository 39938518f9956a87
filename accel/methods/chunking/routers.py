"""Scores of tokens: high for those that say what their neighbours do not. Pure functions, and the form a learned one has.

Shapes: B batch, N = H*W tokens, C channels.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.methods import windows


class Router(Protocol):
    """What scores tokens; a learned one is loaded from a file by `accel.methods.learned`.

    Attributes:
        needs_tokens: it wants the tokens at the entry of the reduced blocks, and is called there, inside of the denoiser.
            Otherwise it is called between steps, with the picture that the last step predicted.
    """

    needs_tokens: bool

    def __call__(self, x0_BNC: Tensor, tokens_BNC: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """(B, N) scores. `x0_BNC`: the picture, as tokens; of a router that needs the tokens, these again."""


class Variance:
    """The local variance of the predicted picture."""

    needs_tokens = False

    def __call__(self, x0_BNC: Tensor, tokens_BNC: Tensor | None, grid: tuple[int, int]) -> Tensor:
        return windows.variance(x0_BNC, grid)


class Cosine:
    """DC-DiT's first router with its projections at their start, the identity (arXiv:2603.06351, section 3): half of one minus
    the cosine to the mean of the 3x3 neighbourhood."""

    needs_tokens = True

    def __call__(self, x0_BNC: Tensor, tokens_BNC: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x_BNC = (x0_BNC if tokens_BNC is None else tokens_BNC).float()
        map_BCHW = x_BNC.transpose(1, 2).unflatten(2, grid)
        mean = F.avg_pool2d(map_BCHW, 3, stride=1, padding=1, count_include_pad=False)
        return (1 - F.cosine_similarity(x_BNC, mean.flatten(2).transpose(1, 2), dim=-1)) / 2


class Predictability:
    """DC-DiT's second router, what a 3x3 predictor leaves, with the mean of the eight neighbours for the predictor: through
    a sigmoid, and the corners of the picture are always kept."""

    needs_tokens = True

    def __call__(self, x0_BNC: Tensor, tokens_BNC: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x_BNC = (x0_BNC if tokens_BNC is None else tokens_BNC).float()
        x_BNC = F.layer_norm(x_BNC, x_BNC.shape[-1:])
        map_BCHW = F.pad(x_BNC.transpose(1, 2).unflatten(2, grid), (1, 1, 1, 1), mode="replicate")
        eight = (F.avg_pool2d(map_BCHW, 3, stride=1) * 9 - map_BCHW[:, :, 1:-1, 1:-1]) / 8
        residual_BN = (x_BNC - eight.flatten(2).transpose(1, 2)).square().mean(-1)
        score_BHW = torch.sigmoid(residual_BN).unflatten(1, grid)
        score_BHW[:, :: max(grid[0] - 1, 1), :: max(grid[1] - 1, 1)] = 1.0  # corners
        return score_BHW.flatten(1)


TRAINING_FREE: dict[str, type[Router]] = {
    "windows": Variance,
    "cosine": Cosine,
    "predictability": Predictability,
}
