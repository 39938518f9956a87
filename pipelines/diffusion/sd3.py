"""Stable Diffusion 3 and 3.5: joint attention of separate streams, positions added at the entry, nothing travels along.

Version 3.5 medium has a second, image-only attention inside of some blocks; a block's tokens are one all the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site

from .common import latent_grid, patches, refuse_arguments, refuse_each, refuse_residuals

_KEYS = ("attn.norm_k|attn.to_k", "attn2.norm_k|attn2.to_k")


def _sites(denoiser: Any) -> list[Site]:
    # The second attention of Stable Diffusion 3.5 medium is among image tokens alone.
    return [
        Site(
            f"transformer_blocks.{i}",
            output=1,
            keys=Keys(_KEYS if block.attn2 is not None else _KEYS[:1], first=True),
        )
        for i, block in enumerate(denoiser.transformer_blocks)
    ]


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(f"transformer_blocks.{name}.{attention}", "to_k", "to_v")
        for name, block in denoiser.get_submodule("transformer_blocks").named_children()
        for attention in ("attn", "attn2")
        if getattr(block, attention, None) is not None
    ]


ADAPTER = Adapter(
    name="Stable Diffusion 3",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
        refuse=refuse_each(
            refuse_residuals("block_controlnet_hidden_states"),
            refuse_arguments(
                (
                    "skip_layers",
                    "skip-layer guidance leaves blocks out of one call, also those where tokens enter or leave. "
                    "Run with skip_guidance_layers=None, or without token reduction.",
                )
            ),
        ),
    ),
    attentions=_attentions,
)
