"""Krea 2: text, then image tokens, in one tensor; one rotary table for the batch, and a mask if text is padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention
from accel.core.site import Site, rotary, rows

from .common import PACKED, Grid, blocks, row_major
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    sides = (
        rotary("image_rotary_emb", image="last", dims=(0,)),
        rows("attention_mask", image="last", dims=(3,)),
    )
    bias = key_bias("attention_mask", table="image_rotary_emb", image="last")
    return blocks(denoiser, "transformer_blocks", Site("", image="last", sides=sides, bias=bias))


def _rotate(x_BLHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x_BLHd, table, sequence_dim=1)  # what the attention processor calls


def _attentions(denoiser: nn.Module) -> list[Attention]:
    return [
        Attention(
            path=f"transformer_blocks.{name}.attn",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated={"norm_q": "all", "norm_k": "all"},
            rotate=_rotate,
            masks=("attention_mask",),
        )
        for name, _ in denoiser.get_submodule("transformer_blocks").named_children()
    ]


def _ids(arguments: Mapping[str, Any]) -> Tensor:
    return arguments["position_ids"][-arguments["hidden_states"].shape[1] :]


def _grid(denoiser: nn.Module, ids: Tensor) -> Grid:
    return row_major(ids[:, 1:3], "reference images, or custom position_ids")


ADAPTER = Adapter(
    name="Krea 2",
    branches=Branches(calls="first"),
    tokens=Tokens(sites=_sites, grid_source=_ids, grid=_grid, **PACKED, shared_plan=True),
    attentions=_attentions,
)
