"""AuraFlow: dual-stream blocks, then single-stream ones with register and text tokens before the image's.

Positions are added at the entry and nothing travels along: every image may follow its own plan.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site

from .common import blocks, latent_grid, patches


def _sites(denoiser: nn.Module) -> list[Site]:
    keys = Keys(("attn.norm_k|attn.to_k",))
    return [
        *blocks(denoiser, "joint_transformer_blocks", Site("", output=1, keys=keys)),
        *blocks(denoiser, "single_transformer_blocks", Site("", image="last", keys=keys)),
    ]


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(f"{group}.{name}.attn", "to_k", "to_v")
        for group in ("joint_transformer_blocks", "single_transformer_blocks")
        for name, _ in denoiser.get_submodule(group).named_children()
    ]


ADAPTER = Adapter(
    name="AuraFlow",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
    attentions=_attentions,
)
