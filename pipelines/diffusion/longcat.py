"""LongCat-Image and Ovis-Image: FLUX's blocks and attention, without pooled text and guidance at the entry."""

from __future__ import annotations

from accel.core.capability import Adapter, Branches

from .flux import ADAPTER as FLUX

ADAPTER = Adapter(
    name="LongCat-Image, Ovis-Image",
    branches=Branches(calls="first"),
    tokens=FLUX.tokens,
    attentions=FLUX.attentions,
)
