"""LongCat-Image and Ovis-Image: FLUX's blocks and attention, without pooled text and guidance at the entry."""

from __future__ import annotations

from dataclasses import replace

from accel.core.capability import Adapter, Branches

from .common import id_grid
from .flux import ADAPTER as FLUX

assert FLUX.tokens is not None

ADAPTER = Adapter(
    name="LongCat-Image, Ovis-Image",
    branches=Branches(calls="first"),
    tokens=replace(
        FLUX.tokens,
        **id_grid("img_ids", "reference images, as in LongCat-Image-Edit, or custom img_ids"),
    ),
    attentions=FLUX.attentions,
)
