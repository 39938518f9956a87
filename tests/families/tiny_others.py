"""Families with image tokens that few other tests use."""

from __future__ import annotations

import torch
from case import Case
from conftest import randomise
from diffusers import (
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

BATCH, DIM = 2, 32


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def common(steps, height, width):
    return {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
    }


def make_ernie():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=64,
        in_channels=8,
        out_channels=8,
        text_in_dim=DIM,
        rope_axes_dim=(4, 6, 6),
    )
    return quiet(
        ErnieImagePipeline(
            transformer=randomise(transformer, 0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def call_ernie(steps, wide, dtype):
    return {
        # Texts of different lengths: padded and masked, and the image's own positions start after each.
        "prompt_embeds": [noise(7, DIM, seed=2, dtype=dtype), noise(4, DIM, seed=3, dtype=dtype)],
        "negative_prompt_embeds": [noise(5, DIM, seed=4, dtype=dtype), noise(2, DIM, seed=6, dtype=dtype)],
        **common(steps, 128, 384 if wide else 192),
    }


CASES = {
    "ERNIE": Case(make_ernie, call_ernie, tokens=96),
}
