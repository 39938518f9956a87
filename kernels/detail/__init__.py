"""How much detail there is around each token."""

from __future__ import annotations

from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op

from . import reference

_OP = Op(
    "detail",
    "(Tensor x, SymInt height, SymInt width) -> Tensor",
    reference.detail,
    suits=lambda x, height, width: x.dtype in FLOATS and x.shape[1] == height * width,
)


def detail(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """0.3 * local variance + 0.7 * edge strength of the features, each scaled to mean 1: (B, N) float32.

    The importance map of LiteVGGT (weights from the paper), with the edge as a central difference: on feature
    maps a Sobel kernel per channel costs three times as much and ranks tokens almost alike.
    """
    return _OP(x_BNC, *grid)
