"""PixArt-α and PixArt-Σ: cross-attention to the text, positions added at the entry, nothing travels along.

Without a rotary table every image may follow its own plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.plan import TokenPlan
from accel.core.site import Get, Side, Site
from accel.core.weighted_attention import SizedMask
from accel.errors import UnsupportedError

from .common import blocks, latent_grid, patches


def follow_key_bias(get: Get, plan: TokenPlan) -> Tensor:
    """log(slot size) as the bias that self-attention takes: (B, 1, K)."""
    tokens = get("hidden_states")
    bias = plan.size.log().to(tokens.dtype)[:, None].expand(tokens.shape[0], -1, -1)
    return SizedMask.of(bias, plan.classes) if plan.classes else bias


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", Site("", bias=Side("attention_mask", follow_key_bias)))


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _attentions(denoiser: nn.Module) -> list[Attention]:
    blocks = denoiser.get_submodule("transformer_blocks").named_children()
    return [Attention(f"transformer_blocks.{name}.attn1", "to_k", "to_v") for name, _ in blocks]


def _refuse(arguments: Mapping[str, Any], span: bool) -> None:
    if arguments.get("attention_mask") is not None:
        raise UnsupportedError("attention_mask: a mask over the image tokens does not follow reduced tokens")
    for name in ("gligen", "ip_adapter_masks"):
        if name in (arguments.get("cross_attention_kwargs") or {}):
            raise UnsupportedError(
                f"cross_attention_kwargs[{name!r}]: what it says about positions does not follow reduced tokens"
            )


ADAPTER = Adapter(
    name="PixArt",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        # The second half of the channels is the learned variance, not the noise.
        **patches(_patch, channels=lambda denoiser: denoiser.config.in_channels),
        shared_plan=False,
        refuse=_refuse,
    ),
    attentions=_attentions,
)
