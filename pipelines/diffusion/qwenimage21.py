"""Qwen-Image 2.1: one sequence of text, reference images among it, and the image last; one rotary table for the batch.

All but the image does not change from step to step: the pipeline keeps its keys and values itself (`use_kv_cache`), so
that the first step predicts the whole sequence and those after it the image alone. Nothing of it is done twice here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.plan import TokenPlan
from accel.core.site import Keys, Side, Site, rotary, rows
from accel.errors import UnsupportedError

from .common import LAST, Grid, blocks, one_frame


@dataclass(frozen=True)
class _Mask:
    """The mask over keys of steps on the image alone; that of a whole sequence is no tensor, but FlexAttention's."""

    def __call__(self, get: Callable[[str], Any], plan: TokenPlan) -> Any:
        if get("attention_mask") is not None and not isinstance(get("attention_mask"), Tensor):
            raise UnsupportedError(
                "QwenImage21FlexAttnProcessor makes its mask for all tokens, which does not follow reduced ones. Use "
                "QwenImage21AttnProcessor, or forecasts (preset 'balanced')."
            )
        return rows("attention_mask", image="last", dims=(-1,)).follow(get, plan)


_SITE = Site(
    "",
    image="last",
    keys=Keys(("attn.norm_k",)),
    sides=(
        rotary("rotary_emb", image="last", dims=(0,)),
        rows("target_token_mask", image="last", dims=(0,)),
        rows("key_valid", image="last"),
        Side("attention_mask", _Mask()),
    ),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "transformer_blocks", _SITE)


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return arguments["img_shapes"][0][-1]


def _grid(denoiser: nn.Module, shape: tuple[int, int, int]) -> Grid:
    frames, height, width = shape
    one_frame(frames)
    return int(height), int(width)


ADAPTER = Adapter(
    name="Qwen-Image 2.1",
    branches=Branches(calls="first"),
    tokens=Tokens(sites=_sites, grid_source=_shape, grid=_grid, **LAST, shared_plan=True),
)
