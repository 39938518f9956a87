"""JoyImage-Edit: text and image apart at every block's border; one rotary table for the batch.

Samples are (B, items, C, 1, H, W), the image last after its references; the model moves it to the front of the tokens.
References are never reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary
from accel.errors import UnsupportedError

from .common import Grid, blocks, image_of, one_frame, patches

_SITE = Site(
    "",
    keys=Keys(("attn.img_attn_k_norm",), first=True),
    image="first",
    output=0,
    sides=(
        rotary("image_rotary_emb", image="first", dims=(0,), item=0),
    ),  # (of the images, of the text or None)
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "double_blocks", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.patch_size[1]


def _grid(denoiser: nn.Module, samples: Tensor) -> Grid:
    if samples.ndim != 6:
        raise UnsupportedError("hidden_states without a dimension of items are of video, not of an image")
    one_frame(samples.shape[3])
    return samples.shape[-2] // _patch(denoiser), samples.shape[-1] // _patch(denoiser)


def _back(x_BcHW: Tensor, prediction: Tensor | None) -> Tensor:
    image = x_BcHW[:, None, :, None]
    return image if prediction is None else torch.cat([prediction[:, :-1], image], 1)


ADAPTER = Adapter(
    name="JoyImage-Edit",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=lambda arguments: arguments["hidden_states"],
        grid=_grid,
        **image_of(patches(_patch), image=lambda prediction: prediction[:, -1, :, 0], back=_back),
        shared_plan=True,
    ),
)
