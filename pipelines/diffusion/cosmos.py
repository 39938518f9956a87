"""Cosmos 2, text to image: image tokens only, cross-attention to the text, learned positions added in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site, rotary, rows
from accel.errors import UnsupportedError

from .common import Grid, attentions_of, blocks, image_of, one_frame, patches, refuse_arguments, rotate_halves

_SITE = Site(
    "",
    keys=Keys(("attn1.norm_k|attn1.to_k",)),
    sides=(rotary("image_rotary_emb", dims=(0,)), rows("extra_pos_emb")),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", _SITE)


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return attentions_of(denoiser, "transformer_blocks", rotate_halves, heads_first=True)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size[1]


def _grid(denoiser: nn.Module, latents: Tensor) -> Grid:
    one_frame(latents.shape[2])
    return latents.shape[-2] // _patch(denoiser), latents.shape[-1] // _patch(denoiser)


_refuse_arguments = refuse_arguments(
    (
        "block_controlnet_hidden_states",
        "ControlNet adds full-size residuals in the blocks, where there are fewer tokens. Run without ControlNet.",
    )
)


def _refuse(arguments: Mapping[str, Any], span: bool) -> None:
    _refuse_arguments(arguments, span)
    if arguments["timestep"].ndim > 1:
        raise UnsupportedError("timestep: one per frame does not follow reduced tokens; it is of video")


ADAPTER = Adapter(
    name="Cosmos 2",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=lambda arguments: arguments["hidden_states"],
        grid=_grid,
        **image_of(
            patches(_patch),
            image=lambda x_Bc1HW: x_Bc1HW[:, :, 0],
            back=lambda x_BcHW, prediction: x_BcHW[:, :, None],
        ),
        shared_plan=True,
        refuse=_refuse,
    ),
    attentions=_attentions,
)
