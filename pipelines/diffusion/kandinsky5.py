"""Kandinsky 5 (images): image tokens only, cross-attention to the text; predictions are (B, 1, H, W, C)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary

from .common import Grid, blocks, image_of, one_frame, patches, refuse_arguments

_SITE = Site("", tokens="visual_embed", keys=Keys(("self_attention.key_norm",)), sides=(rotary("rope"),))


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "visual_transformer_blocks", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size[1]


_FORM = image_of(
    patches(_patch),
    image=lambda x_B1HWc: x_B1HWc[:, 0].permute(0, 3, 1, 2),
    back=lambda x_BcHW, prediction: x_BcHW.permute(0, 2, 3, 1)[:, None],
)


def _grid(denoiser: nn.Module, latents: Tensor) -> Grid:
    _, frames, height, width, _ = latents.shape
    one_frame(frames)
    return height // _patch(denoiser), width // _patch(denoiser)


ADAPTER = Adapter(
    name="Kandinsky 5",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=lambda arguments: arguments["hidden_states"],
        grid=_grid,
        **_FORM,
        shared_plan=False,
        refuse=refuse_arguments(
            (
                "sparse_params",
                "sparse attention (NABLA) orders the tokens by blocks of 8x8, which reduced tokens have not. Use a "
                'checkpoint with attention_type="regular".',
            )
        ),
    ),
)
