"""Lumina-Next: image tokens only, text through gated cross-attention inside the same attention; one rotary table.

With `proportional_attn` the model scales its softmax by the number of tokens it is given: by that of the reduced ones,
which is its own rule for so many keys.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import blocks, latent_grid, patches

_SITE = Site(
    "", keys=Keys(("attn1.norm_k|attn1.to_k",)), sides=(rows("attention_mask"), rotary("image_rotary_emb"))
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="Lumina-Next",
    branches=Branches(batched="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        # The second half of the channels is the learned variance, not the noise.
        **patches(_patch, channels=lambda denoiser: denoiser.config.in_channels),
        shared_plan=False,
    ),
)
