"""CogView3+: text and image apart at every block's border, positions added at the entry, nothing travels along."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site

from .common import blocks, latent_grid, patches


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", Site("", output=0, keys=Keys(("attn1.norm_k|attn1.to_k",))))


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [Attention(f"{site.path}.attn1", "to_k", "to_v") for site in _sites(denoiser)]


ADAPTER = Adapter(
    name="CogView3+",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
    attentions=_attentions,
)
