"""OmniGen: one sequence of text and input images, the time, then the image, through plain language-model blocks.

Of a guided batch the conditional part comes first: of two, or of three with input images.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import blocks, latent_grid, patches

_SITE = Site(
    "",
    keys=Keys(("self_attn.to_k",)),
    image="last",
    sides=(
        # (B, 1, L, L); text attends to what comes before it, the image to all.
        rows("attention_mask", image="last", dims=(-2, -1)),
        rotary("image_rotary_emb", image="last", dims=(0,)),  # one for the batch
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="OmniGen",
    branches=Branches(batched="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=True,
    ),
)
