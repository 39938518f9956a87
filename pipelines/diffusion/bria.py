"""Bria 3: FLUX's blocks and attention, with both branches of guidance in one batch and one rotary table for it."""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rotary

from .common import PACKED, blocks, id_grid, refuse_residuals
from .flux import ADAPTER as FLUX
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    site = Site(
        "",
        output=1,
        sides=(rotary("image_rotary_emb", image="last", dims=(0,)),),
        bias=key_bias("attention_kwargs", key="attention_mask", table="image_rotary_emb", image="last"),
    )
    return [
        *blocks(denoiser, "transformer_blocks", site),
        *blocks(denoiser, "single_transformer_blocks", site),
    ]


ADAPTER = Adapter(
    name="Bria",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=refuse_residuals("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
    attentions=FLUX.attentions,
)
