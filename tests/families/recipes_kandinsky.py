"""Kandinsky 1, 2.2 and 3: a prior that makes an image embedding of a text, a U-Net, and both in one pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from case import numbers, quiet
from conftest import randomise
from diffusers import DDPMScheduler, Kandinsky3UNet, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from parts import DIM, ddim, generator, mask, picture, prior_parts, tokenizer, vq
from recipe import Recipe

SIZE = {"height": 32, "width": 48}
#: Downsampled by residual blocks, and attention with keys of the text beside the image's own.
DEEP = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": DIM,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}


def deep_unet(**options: Any) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**{**DEEP, "encoder_hid_dim": DIM, **options}), 0)


def unet(kind: str, channels: int) -> UNet2DConditionModel:
    text = "text_" if kind.startswith("text") else ""
    return deep_unet(
        in_channels=channels,
        out_channels=8,  # with a variance, which the samplers have no use for
        addition_embed_type=kind,
        encoder_hid_dim_type=f"{text}image_proj",
    )


def movq() -> VQModel:
    return vq(norm_type="spatial", block_out_channels=(32, 32))


def decoder(kind: str, channels: int) -> dict[str, Any]:
    parts = {
        "unet": unet(kind, channels),
        "scheduler": ddim(),
        "movq": movq(),
    }
    if not kind.startswith("text"):
        return parts
    config = MCLIPConfig(
        transformerDimSize=DIM,
        imageDimSize=DIM,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=55,
        max_position_embeddings=128,
    )
    return {**parts, "tokenizer": tokenizer(), "text_encoder": randomise(MultilingualCLIP(config), 2)}


def common(**given: Any) -> dict[str, Any]:
    return {
        "num_inference_steps": 10,
        "guidance_scale": 4.0,
        "generator": generator(),
        "output_type": "pt",
        **given,
    }


def recipe(name: str, parts: Callable[[], dict[str, Any]], **given: Any) -> tuple[str, Recipe]:
    cls = getattr(diffusers, name)
    return name, Recipe(lambda: quiet(cls(**parts())), lambda: common(**given))


def both(kind: str, channels: int) -> dict[str, Any]:
    return {**decoder(kind, channels), **{f"prior_{name}": part for name, part in prior_parts().items()}}


def embeddings() -> dict[str, Any]:
    return {"image_embeds": numbers(1, DIM, seed=2), "negative_image_embeds": numbers(1, DIM, seed=3)}


def three() -> dict[str, Any]:
    denoiser = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=DIM,
    )
    return {
        "unet": randomise(denoiser, 0),
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
        "movq": movq(),
        "text_encoder": None,
        "tokenizer": None,
    }


def three_texts() -> dict[str, Any]:
    return {
        "prompt_embeds": numbers(1, 8, DIM, seed=2),
        "negative_prompt_embeds": numbers(1, 8, DIM, seed=4),
        "attention_mask": torch.ones(1, 8),
        "negative_attention_mask": torch.ones(1, 8),
    }


def hint() -> torch.Tensor:
    """As large as the picture: the U-Net makes it an eighth of that, the size of its own codec's latents."""
    return torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(7))


IMAGE = {"image": picture(), "strength": 0.9}
SQUARE = {"height": 32, "width": 32, "image": picture((32, 32)), "strength": 0.9}  # others come out turned
PAINT = {"image": picture(), "mask_image": mask()}
FIRST = {"prompt": "a red cat", **SIZE}
PRIOR = {"prior_num_inference_steps": 2}
RECIPES: dict[str, Recipe] = dict(
    [
        recipe("KandinskyPipeline", lambda: decoder("text_image", 4), **FIRST, **embeddings()),
        recipe(
            "KandinskyImg2ImgPipeline",
            lambda: decoder("text_image", 4),
            prompt="a red cat",
            **embeddings(),
            **SQUARE,
        ),
        recipe(
            "KandinskyInpaintPipeline", lambda: decoder("text_image", 9), **FIRST, **embeddings(), **PAINT
        ),
        recipe("KandinskyPriorPipeline", prior_parts, prompt="a red cat"),
        recipe("KandinskyCombinedPipeline", lambda: both("text_image", 4), **FIRST, **PRIOR),
        recipe(
            "KandinskyImg2ImgCombinedPipeline",
            lambda: both("text_image", 4),
            prompt="a red cat",
            **PRIOR,
            **SQUARE,
        ),
        recipe("KandinskyInpaintCombinedPipeline", lambda: both("text_image", 9), **FIRST, **PRIOR, **PAINT),
        recipe("KandinskyV22Pipeline", lambda: decoder("image", 4), **SIZE, **embeddings()),
        recipe("KandinskyV22Img2ImgPipeline", lambda: decoder("image", 4), **embeddings(), **SQUARE),
        recipe("KandinskyV22InpaintPipeline", lambda: decoder("image", 9), **SIZE, **embeddings(), **PAINT),
        recipe(
            "KandinskyV22ControlnetPipeline",
            lambda: decoder("image_hint", 8),
            **SIZE,
            **embeddings(),
            hint=hint(),
        ),
        recipe(
            "KandinskyV22ControlnetImg2ImgPipeline",
            lambda: decoder("image_hint", 8),
            **embeddings(),
            **SQUARE,
            hint=hint()[..., :128],
        ),
        recipe("KandinskyV22PriorPipeline", prior_parts, prompt="a red cat"),
        recipe(
            "KandinskyV22PriorEmb2EmbPipeline",
            prior_parts,
            prompt="a red cat",
            image=numbers(1, DIM, seed=2),
            strength=0.9,
        ),
        recipe("KandinskyV22CombinedPipeline", lambda: both("image", 4), **FIRST, **PRIOR),
        recipe(
            "KandinskyV22Img2ImgCombinedPipeline",
            lambda: both("image", 4),
            prompt="a red cat",
            **PRIOR,
            **SQUARE,
        ),
        recipe("KandinskyV22InpaintCombinedPipeline", lambda: both("image", 9), **FIRST, **PRIOR, **PAINT),
        recipe("Kandinsky3Pipeline", three, **SIZE, **three_texts()),
        recipe("Kandinsky3Img2ImgPipeline", three, **three_texts(), **IMAGE),
    ]
)
