"""Families with convolutions over the whole grid."""

from __future__ import annotations

from case import Case
from conftest import randomise, tiny_vae
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_others import BATCH, DIM, common, mask, noise, quiet, texts


def make_sana():
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=DIM,
    )
    return quiet(
        SanaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=randomise(transformer, 0),
            scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        )
    )


def call_sana(steps, wide, dtype):
    masks = {"prompt_attention_mask": mask(6), "negative_prompt_attention_mask": mask(4)}
    return {
        **texts(dtype),
        **masks,
        "negative_prompt": None,
        "use_resolution_binning": False,
        **common(steps, 256, 768 if wide else 384),
    }


def tiny_unet(**options):
    """Attention at the two highest resolutions, as many blocks in a stack as in Stable Diffusion 1.5."""
    settings = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": DIM,
        "attention_head_dim": 2,
    }
    return randomise(UNet2DConditionModel(**{**settings, **options}), 0)


def scheduler():
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def make_unet():
    return quiet(
        StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=tiny_unet(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def call_unet(steps, wide, dtype):
    return {**texts(dtype), **common(steps, 32, 96 if wide else 48)}


def make_unet_xl():
    unet = tiny_unet(  # no attention at the highest resolution, more than one block in a stack
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + DIM,
        use_linear_projection=True,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=scheduler(),
            add_watermarker=False,
        )
    )


def call_unet_xl(steps, wide, dtype):
    return {
        "pooled_prompt_embeds": noise(BATCH, DIM, seed=3, dtype=dtype),
        "negative_pooled_prompt_embeds": noise(BATCH, DIM, seed=6, dtype=dtype),
        **call_unet(steps, wide, dtype),
    }


CASES = {
    "Sana": Case(make_sana, call_sana, tokens=96),
    "U-Net": Case(make_unet, call_unet, tokens=384, positions="added"),
    "U-Net, XL": Case(make_unet_xl, call_unet_xl, tokens=96, positions="added"),
}
