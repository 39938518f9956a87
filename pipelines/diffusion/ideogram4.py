"""Ideogram 4: text, padded on its left, and the image in one sequence; the branch without text is a module of its own.

That one (`unconditional_transformer`) sees the image alone, and follows the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import LAST, Grid, blocks, row_major

_SITE = Site(
    "",
    image="last",
    keys=Keys(("attention.norm_k",)),
    sides=(
        rotary("image_rotary_emb", image="last"),
        rows("attention_mask", image="last", dims=(-2, -1)),  # padding, square
        rows("adaln_input", image="last"),  # one for all tokens, unless they have times of their own
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _positions(arguments: Mapping[str, Any]) -> Tensor:
    """(frame, row, column) of the first sample's image tokens; they begin far behind those of text."""
    from diffusers.models.transformers.transformer_ideogram4 import OUTPUT_IMAGE_INDICATOR

    return arguments["position_ids"][0][arguments["indicator"][0] == OUTPUT_IMAGE_INDICATOR]


def _grid(denoiser: nn.Module, positions: Tensor) -> Grid:
    return row_major(positions[:, 1:], "custom position_ids")


ADAPTER = Adapter(
    name="Ideogram 4",
    tokens=Tokens(sites=_sites, grid_source=_positions, grid=_grid, **LAST, shared_plan=False),
)
