"""Bria 3 and FIBO: FLUX's blocks with both branches of guidance in one batch, and one rotary table for it.

FIBO replaces half of the text's channels before every block, and its single-stream blocks take text and image tokens
in one tensor; a mask over both comes along if text is padded.
"""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rows

from .common import PACKED, blocks, id_grid, refuse_residuals


def _sites(denoiser: nn.Module) -> list[Site]:
    table = rows("image_rotary_emb", image="last", dims=(0,))
    fibo = hasattr(denoiser, "caption_projection")
    mask = (rows("joint_attention_kwargs", image="last", dims=(2, 3), item="attention_mask"),) if fibo else ()
    split = Site("", output=1, sides=(table, *mask))
    joint = Site("", image="last", sides=(table, *mask))
    return [
        *blocks(denoiser, "transformer_blocks", split),
        *blocks(denoiser, "single_transformer_blocks", joint if fibo else split),
    ]


ADAPTER = Adapter(
    name="Bria",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "reference images, as in FIBO-Edit, or custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=refuse_residuals("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
)
