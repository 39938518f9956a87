"""FIBO 2: one sequence of gist tokens (a digest of the text), the image and the images to edit.

Modulation is chosen per token, one rotary table serves the batch. The blocks of the noise refiner run dense, as in Z-Image.
Where prompts of one batch have digests of different lengths the model puts them last; then it is not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.plan import TokenPlan
from accel.core.site import Keys, Side, Site, rotary, rows
from accel.errors import UnsupportedError

from .common import Grid, blocks, patches

_UNEVEN = (
    "prompts of lengths so different that their digests are, too, are put in another order. Use one prompt a call, or "
    "forecasts (preset 'balanced')."
)


def _no_mask(get: Callable[[str], Any], plan: TokenPlan) -> None:
    """There is one only where the digest comes last."""
    if get("attn_mask") is not None:
        raise UnsupportedError(_UNEVEN)


_SITE = Site(
    "",
    tokens="x",
    image="last",
    keys=Keys(("attention.norm_k",)),
    sides=(rotary("freqs_cis", image="last"), rows("noise_mask", image="last"), Side("attn_mask", _no_mask)),
)


def _sites(denoiser: nn.Module) -> list[Site]:
    return blocks(denoiser, "layers", _SITE)


def _patch(denoiser: Any) -> int:
    return denoiser.config.patch_size


def _source(arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = ("hidden_states", "context_latents", "encoder_attention_mask")
    return {name: arguments.get(name) for name in names}


def _sides(denoiser: Any, latents: Any) -> Grid:
    return latents.shape[-2] // _patch(denoiser), latents.shape[-1] // _patch(denoiser)


def _grid(denoiser: Any, source: dict[str, Any]) -> Grid:
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    if source["encoder_attention_mask"] is not None:
        own = denoiser.config
        lengths = source["encoder_attention_mask"].sum(1).tolist()
        limits = (own.min_num_gist_tokens, own.max_num_gist_tokens, own.gist_step)
        counts = compute_gist_count(lengths, *limits, own.gist_min_text_len, own.gist_max_text_len)
        if len(set(counts)) > 1:
            raise UnsupportedError(_UNEVEN)
    return _sides(denoiser, source["hidden_states"])


def _references(denoiser: Any, source: dict[str, Any]) -> int:
    return sum(prod(_sides(denoiser, latents)) for latents in source["context_latents"] or ())


ADAPTER = Adapter(
    name="FIBO 2",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        grid_source=_source,
        grid=_grid,
        references=_references,
        **patches(_patch),
        shared_plan=True,
    ),
)
