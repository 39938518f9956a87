"""Lumina 2: one sequence of the text's valid tokens, then the image's. Refiner blocks ahead of it run dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Site, rows
from accel.errors import UnsupportedError

from .common import blocks, latent_grid, patches

_SITE = Site("", image="last", sides=(rows("image_rotary_emb", image="last"),))


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _refuse(arguments: Mapping[str, Any], span: bool) -> None:
    # The model reads the lengths of its texts at every call, too.
    if arguments["encoder_attention_mask"].sum(1).unique().numel() > 1:
        raise UnsupportedError(
            "encoder_attention_mask: texts of different lengths in one batch put the image tokens at different places "
            "of each sequence. Run these prompts one by one."
        )


ADAPTER = Adapter(
    name="Lumina 2",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
        refuse=_refuse,
    ),
)
