"""JoyImage-Edit Plus: patches of the image, then of its references, padded to one length; text apart at every block's border.

Rotary rows are of each sample. References and padding are never reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows
from accel.errors import UnsupportedError

from .common import Grid, blocks, one_frame

_SITE = Site(
    "",
    keys=Keys(("attn.img_attn_k_norm",), first=True),
    image="first",
    output=0,
    sides=(
        rotary("image_rotary_emb", image="first"),
        rows("attention_mask", image="first", dims=(-1,)),  # (B, 1, 1, image and text)
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "double_blocks", _SITE)


def _source(arguments: Mapping[str, Any]) -> tuple[list[Any], int]:
    """(shapes of each sample's images, patches of a sample)"""
    return arguments["shape_list"], arguments["hidden_states"].shape[1]


def _grid(denoiser: nn.Module, source: tuple[list[Any], int]) -> Grid:
    first = {tuple(int(side) for side in shapes[0]) for shapes in source[0]}
    if len(first) > 1:
        raise UnsupportedError("images of several sizes in one batch: token reduction needs one grid")
    ((frames, height, width),) = first
    one_frame(frames)
    return height, width


def _references(denoiser: nn.Module, source: tuple[list[Any], int]) -> int:
    return source[1] - prod(_grid(denoiser, source))


def _of(denoiser: nn.Module, prediction: Tensor, grid: Grid) -> Tensor:
    return prediction[:, : prod(grid)].flatten(2)


def _put(denoiser: nn.Module, prediction: Tensor, x_BNc: Tensor, grid: Grid) -> Tensor:
    image = x_BNc.unflatten(2, prediction.shape[2:])
    return torch.cat([image, prediction[:, prod(grid) :]], 1)


ADAPTER = Adapter(
    name="JoyImage-Edit Plus",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        grid_source=_source,
        grid=_grid,
        references=_references,
        of=_of,
        put=_put,
        spread=lambda denoiser, x_BN, grid: x_BN[..., None, None, None, None],
        shared_plan=False,
    ),
)
