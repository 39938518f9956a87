"""ERNIE-Image: one sequence of image, then text tokens, sequence first; a modulation per token, padded text masked."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import blocks, latent_grid, patches

_SITE = Site(
    "",
    keys=Keys(("self_attention.norm_k|self_attention.to_k",), first=True),
    tokens="x",
    image="first",
    axis=0,
    sides=(
        rotary("rotary_pos_emb", image="first"),
        rows("temb", image="first", dims=(0,)),
        rows("attention_mask", image="first", dims=(-1,)),
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="ERNIE-Image",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
)
