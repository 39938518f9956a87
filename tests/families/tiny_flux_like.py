"""Families that were built from FLUX's blocks: packed tokens, a rotary table over text and image."""

from __future__ import annotations

import torch
from case import Case, common, numbers, quiet, texts
from conftest import randomise, tiny_vae
from diffusers import (
    AutoencoderKLFlux2,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

DIM = 32  # of text embeddings
BLOCKS = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
ROTARY = (4, 6, 6)
NONE = {"vae": None, "text_encoder": None, "tokenizer": None}


def make(pipeline, transformer, **parts):
    """A pipeline without what only text and pixels need."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(pipeline(**{**NONE, "scheduler": scheduler, **parts}, transformer=randomise(transformer, 0)))


def flux2_transformer(guided: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        joint_attention_dim=DIM,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
        **BLOCKS,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return randomise(vae, 1)


def make_flux2():
    return make(Flux2Pipeline, flux2_transformer(guided=True), vae=flux2_vae())


def flux2_call(steps, wide, dtype, batch=2):
    embeds = texts(batch, DIM, dtype)["prompt_embeds"]
    return {**common(steps, wide, token=4), "prompt_embeds": embeds, "guidance_scale": 3.0}


def make_klein():
    return make(Flux2KleinPipeline, flux2_transformer(guided=False), vae=flux2_vae())


def klein_call(steps, wide, dtype, batch=2):
    return {**common(steps, wide, token=4), **texts(batch, DIM, dtype), "guidance_scale": 3.0}


def qwen_transformer(zero_cond_t: bool = True, **options) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        axes_dims_rope=ROTARY,
        zero_cond_t=zero_cond_t,
        **options,
    )


def make_qwen(pipeline=QwenImagePipeline, **parts):
    return make(pipeline, qwen_transformer(), **parts)


def masks(batch: int, length: int = 7) -> torch.Tensor:
    """Of the second prompt the last two tokens are padding."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1:, -2:] = False
    return mask


def qwen_call(steps, wide, dtype, batch=2):
    return {
        **common(steps, wide, token=16),
        **texts(batch, DIM, dtype),
        "prompt_embeds_mask": masks(batch),
        "negative_prompt_embeds_mask": masks(batch),
        "true_cfg_scale": 3.0,
    }


def make_chroma():
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        joint_attention_dim=DIM,
        axes_dims_rope=ROTARY,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **BLOCKS,
    )
    return make(ChromaPipeline, transformer)


def chroma_call(steps, wide, dtype, batch=2):
    return {
        **common(steps, wide, token=16),
        **texts(batch, DIM, dtype),
        "prompt_attention_mask": masks(batch),
        "negative_prompt_attention_mask": masks(batch),
        "guidance_scale": 3.0,
    }


def make_krea2():
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=DIM,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROTARY,
    )
    return make(Krea2Pipeline, transformer)


def krea2_call(steps, wide, dtype, batch=2):
    return {
        **common(steps, wide, token=16),
        "prompt_embeds": numbers(batch, 7, 2, DIM, seed=2, dtype=dtype),
        "negative_prompt_embeds": numbers(batch, 7, 2, DIM, seed=4, dtype=dtype),
        "prompt_embeds_mask": masks(batch),
        "negative_prompt_embeds_mask": masks(batch),
        "guidance_scale": 3.0,
    }


class GivenText(LongCatImagePipeline):
    """Takes embeddings without prompts, which `encode_prompt` of the pipeline counts even where it needs none."""

    def encode_prompt(self, prompt=None, num_images_per_prompt=1, prompt_embeds=None):
        return super().encode_prompt([""] * len(prompt_embeds), num_images_per_prompt, prompt_embeds)


def make_longcat(pipeline=GivenText, **parts):
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,  # the pipeline's 16 channels of latents, packed
        joint_attention_dim=DIM,
        pooled_projection_dim=DIM,
        axes_dims_rope=ROTARY,
        **BLOCKS,
    )
    return make(pipeline, transformer, **{"text_processor": None, **parts})


def longcat_call(steps, wide, dtype, batch=2):
    return {
        **common(steps, wide, token=16),
        **texts(batch, DIM, dtype),
        "guidance_scale": 3.0,
        "enable_prompt_rewrite": False,
    }


def make_ovis():
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, joint_attention_dim=DIM, axes_dims_rope=ROTARY, **BLOCKS
    )
    return make(OvisImagePipeline, transformer)


def ovis_call(steps, wide, dtype, batch=2):
    return {
        **common(steps, wide, token=16),
        **texts(batch, DIM, dtype),
        "negative_prompt": None,
        "guidance_scale": 3.0,
    }


def make_bria():
    transformer = BriaTransformer2DModel(
        in_channels=16, joint_attention_dim=DIM, axes_dims_rope=ROTARY, **BLOCKS
    )
    return make(BriaPipeline, transformer, vae=tiny_vae())


def bria_call(steps, wide, dtype, batch=2):
    return {**common(steps, wide, token=4), **texts(batch, DIM, dtype), "guidance_scale": 3.0}


class FiboWithText(BriaFiboPipeline):
    """FIBO takes no embeddings: what its text encoder would give, of prompts of 7 and 5 tokens."""

    def encode_prompt(self, prompt, **kwargs):
        dtype, batch = self.transformer.dtype, len(prompt)
        layers = [[numbers(batch, 7, DIM, seed=s + i, dtype=dtype) for i in range(4)] for s in (20, 30)]
        embeds = texts(batch, 2 * DIM, dtype)
        mask = masks(batch).to(dtype)
        ids = torch.zeros(batch, 7, 3)
        return embeds["prompt_embeds"], embeds["negative_prompt_embeds"], ids, mask, mask, *layers


def make_fibo(pipeline=FiboWithText):
    transformer = BriaFiboTransformer2DModel(
        in_channels=8,
        joint_attention_dim=2 * DIM,
        text_encoder_dim=DIM,
        axes_dims_rope=ROTARY,
        **BLOCKS,  # 4 layers of text: as many as a call has images
    )
    return make(pipeline, transformer)


def fibo_call(steps, wide, dtype, batch=2):
    return {**common(steps, wide, token=16), "prompt": ["a", "b"][:batch], "guidance_scale": 3.0}


CASES = {
    "FLUX.2": Case(make_flux2, flux2_call, tokens=96),
    "FLUX.2 klein": Case(make_klein, klein_call, tokens=96),
    "Qwen-Image": Case(make_qwen, qwen_call, tokens=96),
    "Chroma": Case(make_chroma, chroma_call, tokens=96),
    "Krea 2": Case(make_krea2, krea2_call, tokens=96),
    "LongCat-Image": Case(make_longcat, longcat_call, tokens=96),
    "Ovis-Image": Case(make_ovis, ovis_call, tokens=96),
    "Bria": Case(make_bria, bria_call, tokens=96),
    "FIBO": Case(make_fibo, fibo_call, tokens=96),
}
