"""HunyuanImage 2.1 and its refiner: image tokens before text in attention; the rotary table is the image's alone.

The mask covers image columns, too. A guider makes the calls, the conditional one first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Site, rotary, rows

from .common import blocks, framed, latent_grid, patches
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (rotary("image_rotary_emb", dims=(0,)), rows("attention_mask", image="first", dims=(3,)))
    bias = key_bias("attention_mask", table="attention_mask", dim=3, image="first")
    site = Site("", output=0, sides=sides, bias=bias)
    return [
        *blocks(denoiser, "transformer_blocks", site),
        *blocks(denoiser, "single_transformer_blocks", site),
    ]


def _rotate(x_BLHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    image = table[0].shape[0]  # rows; text after them stays
    rotated = apply_rotary_emb(x_BLHd[:, :image], table, sequence_dim=1)  # what the attention processor calls
    return torch.cat([rotated, x_BLHd[:, image:]], 1)


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(
            path=f"{group}.{name}.attn",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated={"norm_q": "all", "norm_k": "all"},
            rotate=_rotate,
            image="first",
            masks=("attention_mask",),
        )
        for group in ("transformer_blocks", "single_transformer_blocks")
        for name, _ in denoiser.get_submodule(group).named_children()
    ]


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size[-1]


def _has_frames(denoiser: Any) -> bool:
    return len(denoiser.config.patch_size) == 3  # the refiner


ADAPTER = Adapter(
    name="HunyuanImage",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **framed(patches(_patch), when=_has_frames),
        shared_plan=True,
    ),
    attentions=_attentions,
)
