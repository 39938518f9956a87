"""LongCat-Image and Ovis-Image: FLUX's blocks without pooled text and guidance; one rotary table for the batch."""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rows

from .common import PACKED, blocks, id_grid


def _sites(denoiser: nn.Module) -> list[Site]:
    site = Site("", output=1, sides=(rows("image_rotary_emb", image="last", dims=(0,)),))
    return [
        *blocks(denoiser, "transformer_blocks", site),
        *blocks(denoiser, "single_transformer_blocks", site),
    ]


ADAPTER = Adapter(
    name="LongCat-Image, Ovis-Image",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "reference images, as in LongCat-Image-Edit, or custom img_ids"),
        **PACKED,
        shared_plan=True,
    ),
)
