"""PixArt-α and PixArt-Σ: cross-attention to the text, positions added at the entry, nothing travels along.

Without a rotary table every image may follow its own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.plan import TokenPlan
from accel.core.site import Side, Site
from accel.errors import UnsupportedError


def follow_key_bias(get: Callable[[str], Any], plan: TokenPlan) -> Tensor:
    """log(slot size) as the bias that self-attention takes: (B, 1, K)."""
    tokens = get("hidden_states")
    return plan.size.log().to(tokens.dtype)[:, None].expand(tokens.shape[0], -1, -1)


def _sites(denoiser: nn.Module) -> list[Site]:
    bias = Side("attention_mask", follow_key_bias)
    blocks = denoiser.get_submodule("transformer_blocks").named_children()
    return [Site(f"transformer_blocks.{name}", bias=bias) for name, _ in blocks]


def _grid(denoiser: Any, latents: Tensor) -> tuple[int, int]:
    patch = denoiser.config.patch_size
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def _output_tokens(denoiser: Any, prediction: Tensor) -> Tensor:
    # The second half of the channels is the learned variance, not the noise.
    noise = prediction[:, : denoiser.config.in_channels]
    return F.pixel_unshuffle(noise, denoiser.config.patch_size).flatten(2).transpose(1, 2)


def _with_tokens(denoiser: Any, prediction: Tensor, x_BNc: Tensor, grid: tuple[int, int]) -> Tensor:
    noise = F.pixel_shuffle(x_BNc.transpose(1, 2).unflatten(2, grid), denoiser.config.patch_size)
    return torch.cat([noise, prediction[:, denoiser.config.in_channels :]], 1)


def _per_token(denoiser: Any, x_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    patch = denoiser.config.patch_size
    x_B1hw = x_BN.unflatten(1, grid)[:, None]
    return x_B1hw.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


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
        grid_source=lambda arguments: arguments["hidden_states"],
        grid=_grid,
        of=_output_tokens,
        put=_with_tokens,
        spread=_per_token,
        shared_plan=False,
        refuse=_refuse,
    ),
    attentions=_attentions,
)
