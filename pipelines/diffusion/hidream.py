"""HiDream: dual-stream blocks, then single-stream ones on [image, text]; one more layer of text tokens is appended
before every block and cut off after it. Images that are no square come padded to the longest sequence."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Keys, Site, rotary, rows

from .common import blocks, latent_grid, patches

_SIDES = (
    # Over dual-stream blocks the mask counts image tokens only, over single-stream ones all.
    rows("hidden_states_masks", image="first"),
    rotary("image_rotary_emb", image="first"),
)
# The model cuts at the length of the sequence ahead of the first single-stream block.
_KEYS = Keys(("block.attn1.k_rms_norm",), first=True)
_DUAL = Site("", image="first", output=0, sides=_SIDES, padded=True, keys=_KEYS)
_SINGLE = Site("", image="first", sides=_SIDES, padded=True, keys=_KEYS)


def _sites(denoiser: nn.Module) -> list[Site]:
    return [
        *blocks(denoiser, "double_stream_blocks", _DUAL),
        *blocks(denoiser, "single_stream_blocks", _SINGLE),
    ]


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


ADAPTER = Adapter(
    name="HiDream",
    branches=Branches(batched="second", layers=("encoder_hidden_states_llama3",)),
    tokens=Tokens(
        sites=_sites,
        **latent_grid("hidden_states", _patch),
        **patches(_patch),
        shared_plan=False,
    ),
)
