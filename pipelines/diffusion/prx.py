"""PRX, in latents or in pixels: image tokens only, text gives keys and values to the same attention.

The rotary table (2 x 2 matrices) has rows for every image, so that every image may follow its own plan.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary

from .common import blocks, latent_grid, patches


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(
        denoiser,
        "blocks",
        Site("", sides=(rotary("image_rotary_emb", dims=(2,)),), keys=Keys(("attention.norm_k",))),
    )


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="PRX",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
)
