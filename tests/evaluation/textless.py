"""Tiny pipelines with random weights that take text, without an encoder: a prompt's letters seed its embedding."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from conftest import FLUX_DIM, PIXART_DIM, TEXT_TOKENS, make_flux, make_pixart
from diffusers import FluxPipeline, PixArtSigmaPipeline


def _embeds(prompts: list[str], width: int) -> torch.Tensor:
    rows = []
    for text in prompts:
        g = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randn(TEXT_TOKENS, width, generator=g))
    return torch.stack(rows)


class TextlessPixArt(PixArtSigmaPipeline):
    def __call__(
        self, prompt: list[str], num_inference_steps: int = 12, guidance_scale: float = 2.0, **kwargs: Any
    ) -> Any:
        mask = torch.ones(len(prompt), TEXT_TOKENS)
        return super().__call__(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=_embeds(prompt, PIXART_DIM),
            negative_prompt_embeds=_embeds([""] * len(prompt), PIXART_DIM),
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            use_resolution_binning=False,
            **{"height": 32, "width": 48, **kwargs},
        )


class TextlessFlux(FluxPipeline):
    def __call__(
        self, prompt: list[str], num_inference_steps: int = 12, true_cfg_scale: float = 2.0, **kwargs: Any
    ) -> Any:
        return super().__call__(
            prompt_embeds=_embeds(prompt, FLUX_DIM),
            pooled_prompt_embeds=_embeds(prompt, FLUX_DIM)[:, 0],
            negative_prompt_embeds=_embeds([""] * len(prompt), FLUX_DIM),
            negative_pooled_prompt_embeds=_embeds([""] * len(prompt), FLUX_DIM)[:, 0],
            num_inference_steps=num_inference_steps,
            true_cfg_scale=true_cfg_scale,
            **{"height": 32, "width": 48, **kwargs},
        )


def pixart() -> Any:
    pipe = make_pixart(blocks=2)
    pipe.__class__ = TextlessPixArt
    return pipe


def flux() -> Any:
    pipe = make_flux(1, 1)
    pipe.__class__ = TextlessFlux
    pipe.vae.register_to_config(shift_factor=0.0)  # FLUX's autoencoder has one
    return pipe
