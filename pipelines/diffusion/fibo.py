"""Bria FIBO: FLUX's blocks with both branches of guidance in one batch, and one rotary table for it.

Half of the text's channels are replaced before every block, and single-stream blocks take text and image tokens in
one tensor. If text is padded, a mask over text and image comes along; it is why keys are not kept: its columns would
have to stay.
"""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rotary, rows

from .common import PACKED, blocks, id_grid
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (
        rotary("image_rotary_emb", image="last", dims=(0,)),
        rows("joint_attention_kwargs", image="last", dims=(2, 3), item="attention_mask"),
    )
    bias = key_bias("joint_attention_kwargs", key="attention_mask", table="image_rotary_emb", image="last")
    return [
        *blocks(denoiser, "transformer_blocks", Site("", output=1, sides=sides, bias=bias)),
        *blocks(denoiser, "single_transformer_blocks", Site("", image="last", sides=sides, bias=bias)),
    ]


ADAPTER = Adapter(
    name="FIBO",
    branches=Branches(batched="second", layers=("text_encoder_layers",)),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "custom img_ids"),
        **PACKED,
        shared_plan=True,
    ),
)
