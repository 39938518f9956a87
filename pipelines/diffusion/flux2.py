"""FLUX.2 and klein: dual-stream blocks, then single-stream ones that take text and image tokens in one tensor.

One modulation serves all tokens and blocks, so that only the rotary table (text rows first) travels along; it is
shared by the batch.
"""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rotary

from .common import PACKED, blocks, id_grid, refuse_arguments
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    table = (rotary("image_rotary_emb", image="last", dims=(0,)),)
    bias = key_bias("joint_attention_kwargs", key="attention_mask", table="image_rotary_emb", image="last")
    return [
        *blocks(denoiser, "transformer_blocks", Site("", output=1, sides=table, bias=bias)),
        *blocks(denoiser, "single_transformer_blocks", Site("", image="last", sides=table, bias=bias)),
    ]


ADAPTER = Adapter(
    name="FLUX.2",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=refuse_arguments(
            (
                "kv_cache_mode",
                "this pipeline keeps the keys and values of its reference images itself, at places that reduced "
                "tokens do not have. Use forecasts (preset 'balanced'), or run without reference images.",
            )
        ),
    ),
)
