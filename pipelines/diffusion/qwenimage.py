"""Qwen-Image: dual-stream blocks; the image's rotary table comes apart from the text's and is shared by the batch.

Reference images of editing pipelines follow the image in the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Keys, Site, rotary, rows

from .common import PACKED, PADDED, Grid, blocks, one_frame, refuse_residuals


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (
        rotary("image_rotary_emb", dims=(0,), item=0),
        rows("modulate_index"),  # which of two times a token's modulation is for (zero_cond_t)
    )
    return blocks(
        denoiser, "transformer_blocks", Site("", output=1, sides=sides, keys=Keys(("attn.norm_k|attn.to_k",)))
    )


def _shapes(arguments: Mapping[str, Any]) -> list[Any]:
    first = arguments["img_shapes"][0]  # of the first image; the model takes it for all
    return first if isinstance(first, list) else [first]


def _grid(denoiser: nn.Module, shapes: list[Any]) -> Grid:
    frames, height, width = shapes[0]
    one_frame(frames)
    return int(height), int(width)


def _rotate(x_BLHd: Tensor, table: Tensor) -> Tensor:
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    return apply_rotary_emb_qwen(x_BLHd, table, use_real=False)  # what the attention processor calls


def _attentions(denoiser: nn.Module) -> list[Attention]:
    image, text = 0, 1  # of the pair of tables
    return [
        Attention(
            path=f"transformer_blocks.{name}.attn",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated={"norm_q": image, "norm_k": image, "norm_added_q": text, "norm_added_k": text},
            rotate=_rotate,
            refused={"encoder_hidden_states_mask": PADDED},
        )
        for name, _ in denoiser.get_submodule("transformer_blocks").named_children()
    ]


ADAPTER = Adapter(
    name="Qwen-Image",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=_shapes,
        grid=_grid,
        references=lambda denoiser, shapes: sum(prod(shape) for shape in shapes[1:]),
        **PACKED,
        shared_plan=True,
        refuse=refuse_residuals("controlnet_block_samples"),
    ),
    attentions=_attentions,
)
