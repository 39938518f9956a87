"""FLUX.3: blocks of the image alone, then single-stream ones of text and image, which come in and go out apart.

Modulation is given per token; one rotary table serves the batch, text rows first where there is text. References have
blocks of their own and stand between the image and the end of the joint rows: forecasts only.
"""

from __future__ import annotations

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site, rotary, rows

from .common import PACKED, blocks, id_grid, refuse_arguments
from .flux import rotate

_SIDES = (rows("temb_mod"), rotary("image_rotary_emb", image="last", dims=(0,)))
_KEYS = Keys(("attn.norm_k|attn.to_k",))
_MODE, _SINGLE = "mode_blocks.image", "single_transformer_blocks"


def _sites(denoiser: nn.Module) -> list[Site]:
    return [
        *blocks(denoiser, _MODE, Site("", sides=_SIDES, keys=_KEYS)),
        *blocks(denoiser, _SINGLE, Site("", output=1, sides=_SIDES, keys=_KEYS)),
    ]


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(
            path=f"{group}.{name}.attn",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated={"norm_q": "last", "norm_k": "last"},
            rotate=rotate,
        )
        for group in (_MODE, _SINGLE)
        for name, _ in denoiser.get_submodule(group).named_children()
    ]


ADAPTER = Adapter(
    name="FLUX.3",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=refuse_arguments(
            (
                "image_cond_hidden_states",
                "reference images stand where reduced tokens would have to be told from them. Use forecasts (preset "
                "'balanced'), or run without reference images.",
            )
        ),
    ),
    attentions=_attentions,
)
