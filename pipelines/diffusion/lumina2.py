"""Lumina 2: one sequence of the text's valid tokens, then the image's, then padding if texts differ in length. Refiner
blocks ahead of it run dense."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import blocks, latent_grid, patches

_SITE = Site(
    "",
    keys=Keys(("attn.norm_k|attn.to_k",)),
    image="last",
    valid="attention_mask",
    sides=(
        rotary("image_rotary_emb", image="last", valid="attention_mask"),
        rows("attention_mask", image="last", valid="attention_mask"),
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="Lumina 2",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
)
