"""Nucleus-Image: image tokens only; the text gives keys and values. Its experts choose their tokens, a share of those
they are given, so that reduced tokens go to as many experts each as all of them do."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import PACKED, Grid, blocks, one_frame

_SITE = Site(
    "",
    keys=Keys(("attn.norm_k|attn.to_k",), first=True),
    sides=(
        rotary("image_rotary_emb", dims=(0,), item=0),  # (of the image, of the text)
        rows("attention_kwargs", image="first", item="attention_mask"),
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", _SITE)


def _grid(denoiser: nn.Module, shapes: Any) -> Grid:
    frames, height, width = shapes[0] if isinstance(shapes, list) else shapes
    one_frame(frames)
    return height, width


ADAPTER = Adapter(
    name="Nucleus-Image",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=lambda arguments: arguments["img_shapes"],
        grid=_grid,
        **PACKED,
        shared_plan=True,
    ),
)
