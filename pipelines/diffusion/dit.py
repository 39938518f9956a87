"""DiT: image tokens only, positions added at the entry; of a guided batch the conditional half comes first."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site

from .common import blocks, latent_grid, patches


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", Site("", keys=Keys(("attn1.to_k",))))


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [Attention(f"{site.path}.attn1", "to_k", "to_v") for site in _sites(denoiser)]


ADAPTER = Adapter(
    name="DiT",
    branches=Branches(batched="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        # The second half of the channels is the learned variance, not the noise.
        **patches(_patch, channels=lambda denoiser: denoiser.config.in_channels),
        shared_plan=False,
    ),
    attentions=_attentions,
)
