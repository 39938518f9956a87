"""Hunyuan-DiT: cross-attention to the text, one rotary table for the batch, and a U: late blocks take what early ones
made, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.plan import TokenPlan
from accel.core.site import Get, Keys, Side, Site, rotary
from accel.errors import UnsupportedError

from .common import attentions_of, blocks, latent_grid, patches


def _follow_skip(get: Get, plan: TokenPlan) -> Tensor | None:
    """An early block's output: reduced already if that block was inside the span, else reduced here."""
    skip = get("skip")
    return skip if skip is None or skip.shape[1] == plan.slots else plan.reduce(skip)


_SITE = Site(
    "",
    keys=Keys(("attn1.norm_k|attn1.to_k",)),
    sides=(rotary("image_rotary_emb", dims=(0,)), Side("skip", _follow_skip)),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    sites = blocks(denoiser, "blocks", _SITE)
    # Block i is read by block -1 - i, but for the two in the middle; their number is even.
    readers = {i: sites[-1 - i].path for i in range(len(sites) // 2 - 1)}
    return [replace(site, read_by=readers.get(i)) for i, site in enumerate(sites)]


def _rotate(x_BLHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x_BLHd, table, sequence_dim=1)  # what the attention processor calls


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return attentions_of(denoiser, "blocks", _rotate, heads_first=True)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _refuse(arguments: Mapping[str, Any], span: bool) -> None:
    if span and arguments.get("controlnet_block_samples") is not None:
        raise UnsupportedError(
            "controlnet_block_samples: ControlNet adds full-size residuals to what late blocks take from early ones, "
            "where span scope has fewer tokens. Use scope='block', or run without ControlNet."
        )


ADAPTER = Adapter(
    name="Hunyuan-DiT",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        # The second half of the channels is the learned variance, not the noise.
        **patches(_patch, channels=lambda denoiser: denoiser.config.in_channels),
        shared_plan=True,
        refuse=_refuse,
    ),
    attentions=_attentions,
)
