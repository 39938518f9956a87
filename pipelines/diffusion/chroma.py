"""Chroma: FLUX's blocks, with a mask over text and image tokens; single-stream blocks take both in one tensor."""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import PACKED, blocks, id_grid, refuse_each, refuse_inside, refuse_residuals


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (
        rotary("image_rotary_emb", image="last", dims=(0,)),
        rows("attention_mask", image="last"),
    )
    keys = Keys(("attn.norm_k|attn.to_k",))
    return [
        *blocks(denoiser, "transformer_blocks", Site("", output=1, sides=sides, keys=keys)),
        *blocks(denoiser, "single_transformer_blocks", Site("", image="last", sides=sides, keys=keys)),
    ]


ADAPTER = Adapter(
    name="Chroma",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "reference-image tokens, or custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=refuse_each(
            refuse_inside("joint_attention_kwargs", ["ip_adapter_masks"]),
            refuse_residuals("controlnet_block_samples", "controlnet_single_block_samples"),
        ),
    ),
)
