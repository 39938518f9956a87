"""CogView4: text and image apart at every block's border; one rotary table for the image, broadcast over the batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site, rotary

from .common import PADDED, attentions_of, blocks, latent_grid, patches, rotate_halves

_SITE = Site(
    "", output=0, keys=Keys(("attn1.norm_k|attn1.to_k",)), sides=(rotary("image_rotary_emb", dims=(0,)),)
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", _SITE)


def _attentions(denoiser: nn.Module) -> list[Attention]:
    refused = {"attention_mask": PADDED}
    return attentions_of(denoiser, "transformer_blocks", rotate_halves, heads_first=True, refused=refused)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="CogView4",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=True,
    ),
    attentions=_attentions,
)
