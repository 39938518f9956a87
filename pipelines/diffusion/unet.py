"""Stable Diffusion's U-Net (1.5, 2, XL): transformer blocks at several resolutions between convolutions.

Nothing travels along: positions come from the convolutions, which take whole grids, so that tokens stay reduced
within one stack of transformer blocks (one block in Stable Diffusion 1.5, two or ten in XL) and never across two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.site import Side, Site

from .common import Grid, patches, refuse_inside
from .pixart import follow_key_bias


def _levels(denoiser: Any) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, log2 of the scale) of all parts between two changes of resolution."""
    level = 0
    for i, block in enumerate(denoiser.down_blocks):
        yield f"down_blocks.{i}", block, level
        level += bool(getattr(block, "downsamplers", None))
    if denoiser.mid_block is not None:
        yield "mid_block", denoiser.mid_block, level
    for i, block in enumerate(denoiser.up_blocks):
        yield f"up_blocks.{i}", block, level
        level -= bool(getattr(block, "upsamplers", None))


def _stacks(denoiser: nn.Module) -> list[tuple[str, int, int]]:
    """(path, how many, level) of the stacks of transformer blocks, in the order in which they run."""
    found = []
    for path, part, level in _levels(denoiser):
        stacks: Any = getattr(part, "attentions", ())
        for i, stack in enumerate(stacks):  # other kinds of attention have no such blocks
            blocks = getattr(stack, "transformer_blocks", ())
            found.append((f"{path}.attentions.{i}.transformer_blocks", len(blocks), level))
    return [stack for stack in found if stack[1]]


def _highest(denoiser: nn.Module) -> int:
    """The level of the highest resolution with attention: a token of the grid is one there."""
    return min((level for _, _, level in _stacks(denoiser)), default=0)


def _sites(denoiser: nn.Module) -> list[Site]:
    bias, highest = Side("attention_mask", follow_key_bias), _highest(denoiser)
    return [
        Site(f"{path}.{i}", stretch=path, scale=2 ** (level - highest), bias=bias)
        for path, blocks, level in _stacks(denoiser)
        for i in range(blocks)
        # Without attention among the tokens, what they are to each other is in convolutions alone.
        if not getattr(denoiser.get_submodule(f"{path}.{i}"), "only_cross_attention", False)
    ]


def _patch(denoiser: nn.Module) -> int:
    return 2 ** _highest(denoiser)


def _grid(denoiser: nn.Module, latents: Tensor) -> Grid:
    side = _patch(denoiser)  # convolutions of stride 2 round up
    return -(-latents.shape[-2] // side), -(-latents.shape[-1] // side)


ADAPTER = Adapter(
    name="U-Net",
    branches=Branches(batched="second"),
    tokens=Tokens(
        sites=_sites,
        grid_source=lambda arguments: arguments["sample"],
        grid=_grid,
        **patches(_patch),
        shared_plan=False,
        convolutional=True,
        refuse=refuse_inside("cross_attention_kwargs", ("gligen", "ip_adapter_masks")),
    ),
)
