"""Parts beside the denoiser that pipelines ask for: text and image encoders, tokenizers, codecs, pictures."""

from __future__ import annotations

import string
from typing import Any

import torch
from conftest import randomise
from diffusers import AutoencoderKL, DDIMScheduler, PriorTransformer, UnCLIPScheduler, VQModel
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

DIM, WORDS = 32, 12
PROMPT = {"prompt": "a red cat", "negative_prompt": "a dog"}


def picture(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Of a grey that changes from left to right."""
    return Image.linear_gradient("L").convert("RGB").rotate(90).resize(size)


def mask(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """The left half is to be painted."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return image


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def tokenizer() -> CLIPTokenizer:
    """Letter by letter, `WORDS` tokens."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    names = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=WORDS)


def text_config(**options: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": 2 * len(string.ascii_lowercase) + 3,
        "hidden_size": DIM,
        "projection_dim": DIM,
        "intermediate_size": DIM,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": WORDS,
        "bos_token_id": 53,
        "eos_token_id": 54,
        "pad_token_id": 54,
    }
    return CLIPTextConfig(**{**settings, **options})


def text_encoder(**options: Any) -> CLIPTextModel:
    return randomise(CLIPTextModel(text_config(**options)), 2)


def text_projection(**options: Any) -> CLIPTextModelWithProjection:
    return randomise(CLIPTextModelWithProjection(text_config(**options)), 2)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=DIM,
        projection_dim=DIM,
        intermediate_size=DIM,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    return randomise(CLIPVisionModelWithProjection(vision_config()), 3)


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}, do_resize=True
    )


def autoencoder(**options: Any) -> AutoencoderKL:
    """Halves the size."""
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return randomise(AutoencoderKL(**{**settings, **options}), 1)


def vq(**options: Any) -> VQModel:
    """Halves the size, too."""
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
        "norm_num_groups": 4,
    }
    return randomise(VQModel(**{**settings, **options}), 1)


def prior() -> PriorTransformer:
    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=WORDS
    )
    return randomise(model, 4)


def prior_parts() -> dict[str, Any]:
    """What makes an image embedding of a text."""
    return {
        "prior": prior(),
        "image_encoder": image_encoder(),
        "text_encoder": text_projection(),
        "tokenizer": tokenizer(),
        "scheduler": unclip_scheduler(),
        "image_processor": image_processor(),
    }


def unclip_scheduler(**options: Any) -> UnCLIPScheduler:
    settings = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0}
    return UnCLIPScheduler(**{**settings, **options})


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(
        **{
            "beta_schedule": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **options,
        }
    )
