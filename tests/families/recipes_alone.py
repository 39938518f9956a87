"""Pipelines of families of their own: Amused, whose denoiser classifies tokens, Kandinsky 6's super-resolution, whose denoiser
sees tiles, and the newest."""

from __future__ import annotations

from typing import Any

import diffusers
from case import quiet
from conftest import randomise
from diffusers import AmusedScheduler, FlowMatchEulerDiscreteScheduler, Kandinsky6SRPipeline, UVit2DModel
from diffusers.models import Kandinsky6SRTransformer3DModel, Kandinsky6SRVAE
from parts import generator, mask, picture, text_projection, tokenizer, vq
from recipe import Recipe, of
from tiny_latest import CASES as LATEST


def amused(pipeline: type, **given: Any) -> Recipe:
    """Tokens of a picture, made by classification: 8 x 8 of them, of 2 pixels."""

    def make() -> Any:
        transformer = UVit2DModel(
            hidden_size=32,
            cond_embed_dim=32,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=5 * 8,
            encoder_hidden_size=32,
            vocab_size=33,
            codebook_size=32,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            sample_size=8,
        )
        vqvae = vq(
            latent_channels=8,
            num_vq_embeddings=32,
            vq_embed_dim=None,
            lookup_from_codebook=True,
            mid_block_add_attention=False,
        )
        return quiet(
            pipeline(
                vqvae=vqvae,
                tokenizer=tokenizer(),
                text_encoder=text_projection(),
                transformer=randomise(transformer, 0),
                scheduler=AmusedScheduler(mask_token_id=32),
            )
        )

    def call() -> dict[str, Any]:
        own = {name: value() for name, value in given.items()}
        return {
            "prompt": "a",
            "num_inference_steps": 10,
            "generator": generator(),
            "output_type": "pt",
            **own,
        }

    return Recipe(make, call)


def super_resolution() -> Recipe:
    """A picture of 64 x 96 pixels, twice as large by tiles of 128, which the denoiser sees as 8 x 8 tokens."""

    def make() -> Any:
        transformer = Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            tile_sizes=((128, 128),),
        )
        vae = Kandinsky6SRVAE(
            latent_channels=4,
            encoder_block_out_channels=(16,) * 5,
            decoder_block_out_channels=(16,) * 5,
            layers_per_block=1,
        )
        return quiet(
            Kandinsky6SRPipeline(
                transformer=randomise(transformer, 0),
                vae=randomise(vae, 1),
                scheduler=FlowMatchEulerDiscreteScheduler(),
            )
        )

    def call() -> dict[str, Any]:
        return {
            "video": [picture((96, 64))],
            "resolution_scale": 2,
            "num_inference_steps": 10,
            "generator": generator(),
            "output_type": "pt",
        }

    return Recipe(make, call)


RECIPES = {
    "AmusedPipeline": amused(diffusers.AmusedPipeline),
    "AmusedImg2ImgPipeline": amused(diffusers.AmusedImg2ImgPipeline, image=lambda: picture((16, 16))),
    "AmusedInpaintPipeline": amused(
        diffusers.AmusedInpaintPipeline,
        image=lambda: picture((16, 16)),
        mask_image=lambda: mask((16, 16)),
    ),
    "Kandinsky6SRPipeline": super_resolution(),
    "BriaFibo2Pipeline": of(LATEST["FIBO 2"]),
    "QwenImage21Pipeline": of(LATEST["Qwen-Image 2.1"]),
    "JoyImageEditPlusPipeline": of(LATEST["JoyImage-Edit Plus"]),
}
