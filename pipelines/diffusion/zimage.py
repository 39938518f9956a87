"""Z-Image: image tokens first, then text, in one tensor; both padded to multiples of 32, and to the longest prompt.

Padding is no image token: like text it is never reduced. Every image has rotary rows of its own, so that every image
may follow its own plan. The two blocks of the noise refiner run dense: the model cuts the padding off behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Site, rotary, rows
from accel.errors import UnsupportedError

from .common import Grid, blocks, framed, patches, refuse_residuals
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (rotary("freqs_cis", image="first"), rows("attn_mask", image="first"))
    bias = key_bias("attn_mask", table="freqs_cis", dim=1, image="first", flat=True, tokens="x")
    return blocks(denoiser, "layers", Site("", tokens="x", image="first", sides=sides, bias=bias))


def _rotate(x_BLHd: Tensor, table_BLd: Tensor) -> Tensor:
    """Pairs of channels as complex numbers times the table's, in float32 as the attention processor does it."""
    pairs = torch.view_as_complex(x_BLHd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_BLd[:, :, None]).flatten(-2).to(x_BLHd.dtype)


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(
            path=f"layers.{name}.attention",
            keys="norm_k",
            values="to_v",
            table="freqs_cis",
            rotated={"norm_q": "all", "norm_k": "all"},
            rotate=_rotate,
            image="first",
            masks=("attn_mask",),
        )
        for name, _ in denoiser.get_submodule("layers").named_children()
    ]


def _patch(denoiser: Any) -> int:
    return denoiser.config.all_patch_size[0]


def _images(arguments: Mapping[str, Any]) -> list[Any]:
    return arguments["x"]


def _grid(denoiser: nn.Module, images: list[Any]) -> Grid:
    if not isinstance(images[0], Tensor):
        raise UnsupportedError(
            "Z-Image Omni has reference images between text and image: token reduction needs one grid of image "
            "tokens. Use forecasts (preset 'balanced')."
        )
    side = _patch(denoiser)
    return images[0].shape[-2] // side, images[0].shape[-1] // side


ADAPTER = Adapter(
    name="Z-Image",
    branches=Branches(batched="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=_images,
        grid=_grid,
        **framed(patches(_patch)),
        shared_plan=False,
        refuse=refuse_residuals("controlnet_block_samples"),
    ),
    attentions=_attentions,
)
