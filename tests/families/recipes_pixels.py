"""Denoisers of pixels, of classes, of codes and in cascades: DeepFloyd IF, Karlo, Wuerstchen, and without a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from case import numbers, quiet
from conftest import randomise
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    StableCascadeUNet,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from parts import (
    DIM,
    PROMPT,
    generator,
    image_encoder,
    image_processor,
    mask,
    picture,
    prior,
    text_encoder,
    text_projection,
    tokenizer,
    unclip_scheduler,
    vq,
)
from recipe import Recipe
from recipes_kandinsky import deep_unet


def recipe(name: str, parts: Callable[[], dict[str, Any]], **given: Any) -> tuple[str, Recipe]:
    cls = getattr(diffusers, name)

    def call() -> dict[str, Any]:
        return {"num_inference_steps": 10, "generator": generator(), "output_type": "np", **given}

    return name, Recipe(lambda: quiet(cls(**parts())), call)


# DeepFloyd IF


def deepfloyd(larger: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    if larger:
        options |= {
            "class_embed_type": "timestep",
            "time_embedding_act_fn": "gelu",
            "time_embedding_dim": DIM,
        }
    parts = {
        "unet": deep_unet(in_channels=6 if larger else 3, out_channels=6, **options),
        "scheduler": DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
        ),
        **dict.fromkeys(("text_encoder", "tokenizer", "watermarker", "safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    }
    noising = {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
    return {**parts, **noising} if larger else parts


def floyd(name: str, **given: Any) -> tuple[str, Recipe]:
    texts = {
        "prompt_embeds": numbers(1, 8, DIM, seed=2),
        "negative_prompt_embeds": numbers(1, 8, DIM, seed=4),
        "output_type": "pt",
    }
    return recipe(name, lambda: deepfloyd("Super" in name), **texts, **given)


# Without a text


def plain_unet(**options: Any) -> UNet2DModel:
    settings = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return randomise(UNet2DModel(**{**settings, **options}), 0)


def unconditional(name: str, scheduler: Callable[[], Any], **given: Any) -> tuple[str, Recipe]:
    return recipe(name, lambda: {"unet": plain_unet(), "scheduler": scheduler()}, batch_size=2, **given)


def latent(channels: int) -> dict[str, Any]:
    unet = plain_unet(in_channels=channels, out_channels=4 if channels == 4 else 3)
    return {
        "vqvae": vq(latent_channels=unet.config.out_channels, vq_embed_dim=unet.config.out_channels),
        "unet": unet,
        "scheduler": DDIMScheduler(),
    }


# Karlo


def karlo(variation: bool) -> dict[str, Any]:
    sizes = {"clip_embeddings_dim": DIM, "time_embed_dim": 4 * DIM, "cross_attention_dim": DIM}
    larger = {
        "sample_size": 32,
        "in_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    parts = {
        "decoder": deep_unet(
            in_channels=3, out_channels=6, class_embed_type="identity", encoder_hid_dim=None
        ),
        "text_proj": randomise(UnCLIPTextProjModel(**sizes), 3),
        "text_encoder": text_projection(),
        "tokenizer": tokenizer(),
        "super_res_first": plain_unet(**larger),
        "super_res_last": plain_unet(**larger),
        "decoder_scheduler": unclip_scheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": unclip_scheduler(prediction_type="epsilon"),
    }
    if variation:
        return {**parts, "feature_extractor": image_processor(), "image_encoder": image_encoder()}
    return {**parts, "prior": prior(), "prior_scheduler": unclip_scheduler()}


def karlo_recipe(name: str, **given: Any) -> tuple[str, Recipe]:
    def call() -> dict[str, Any]:
        steps = {"decoder_num_inference_steps": 10, "super_res_num_inference_steps": 2}
        return {**steps, "generator": generator(), "output_type": "np", **given}

    return name, Recipe(lambda: quiet(getattr(diffusers, name)(**karlo("Variation" in name))), call)


# Wuerstchen and Stable Cascade


def paella() -> PaellaVQModel:
    return randomise(PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16), 1)


def wuerstchen_prior() -> dict[str, Any]:
    model = WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=DIM, c_r=8, nhead=2)
    return {
        "prior": randomise(model, 0),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def wuerstchen_decoder() -> dict[str, Any]:
    model = WuerstchenDiffNeXt(
        c_cond=DIM,
        c_hidden=[DIM],
        nhead=[-1],
        blocks=[2],
        level_config=["CT"],
        clip_embd=DIM,
        inject_effnet=[False],
    )
    return {
        "decoder": randomise(model, 0),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": paella(),
    }


def cascade(decoder: bool) -> StableCascadeUNet:
    model = StableCascadeUNet(
        in_channels=4 if decoder else 16,
        out_channels=4 if decoder else 16,
        conditioning_dim=DIM,
        block_out_channels=(DIM, DIM),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        switch_level=None if decoder else (False,),
        clip_text_pooled_in_channels=DIM,
        clip_text_in_channels=None if decoder else DIM,
        clip_image_in_channels=None if decoder else DIM,
        effnet_in_channels=16 if decoder else None,
    )
    return randomise(model, 0)


def cascade_prior() -> dict[str, Any]:
    return {
        "prior": cascade(False),
        "text_encoder": text_projection(),
        "tokenizer": tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def cascade_decoder() -> dict[str, Any]:
    return {
        "decoder": cascade(True),
        "text_encoder": text_projection(),
        "tokenizer": tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": paella(),
    }


def combined(decoder: Callable[[], dict[str, Any]], before: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {**decoder(), **{f"prior_{name}": part for name, part in before().items()}}


BOTH = {
    "height": 128,
    "width": 128,
    "prior_num_inference_steps": 2,
    "prior_guidance_scale": 4.0,
    "decoder_guidance_scale": 4.0,
}
PRIOR = {"height": 128, "width": 192, "guidance_scale": 4.0, "output_type": "pt"}

# Codes


def codes() -> dict[str, Any]:
    from diffusers import VQDiffusionScheduler
    from diffusers.models import Transformer2DModel
    from diffusers.pipelines.deprecated.vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

    model = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=DIM,
        num_vector_embeds=12,
        sample_size=6,
        num_embeds_ada_norm=12,
        norm_type="ada_norm",
        norm_num_groups=8,
        activation_fn="geglu-approximate",
        attention_bias=True,
    )
    return {
        "vqvae": vq(vq_embed_dim=4),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "transformer": randomise(model, 0),
        "scheduler": VQDiffusionScheduler(num_vec_classes=12),
        "learned_classifier_free_sampling_embeddings": LearnedClassifierFreeSamplingEmbeddings(
            learnable=False
        ),
    }


def dreamlite() -> dict[str, Any]:
    unet = DreamLiteUNetModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=DIM,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=1,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return {
        "unet": randomise(unet, 0),
        "vae": randomise(vae, 1),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "tokenizer": tokenizer(),
        "processor": None,
        "text_encoder": text_encoder(max_position_embeddings=1024),
    }


LARGE = {"image": picture((32, 32)), "original_image": picture((32, 32)), "strength": 0.9}
RECIPES: dict[str, Recipe] = dict(
    [
        floyd("IFPipeline"),
        floyd("IFImg2ImgPipeline", image=picture((16, 16)), strength=0.9),
        floyd("IFInpaintingPipeline", image=picture((16, 16)), mask_image=mask((16, 16)), strength=0.9),
        floyd("IFSuperResolutionPipeline", image=picture((16, 16)), height=32, width=32),
        floyd("IFImg2ImgSuperResolutionPipeline", **LARGE),
        floyd("IFInpaintingSuperResolutionPipeline", **LARGE, mask_image=mask((32, 32))),
        unconditional("DDPMPipeline", DDPMScheduler),
        unconditional("DDIMPipeline", DDIMScheduler),
        unconditional("PNDMPipeline", diffusers.PNDMScheduler),
        unconditional("ScoreSdeVePipeline", diffusers.ScoreSdeVeScheduler),
        unconditional("KarrasVePipeline", diffusers.KarrasVeScheduler),
        unconditional("ConsistencyModelPipeline", diffusers.CMStochasticIterativeScheduler),
        recipe(
            "RePaintPipeline",
            lambda: {"unet": plain_unet(), "scheduler": diffusers.RePaintScheduler()},
            image=picture((32, 32)),
            mask_image=mask((32, 32)),
            jump_length=2,
            jump_n_sample=2,
        ),
        recipe("LDMPipeline", lambda: latent(4), batch_size=2),
        recipe("LDMSuperResolutionPipeline", lambda: latent(6), image=picture((32, 32))),
        karlo_recipe("UnCLIPPipeline", prompt="a red cat", prior_num_inference_steps=2),
        karlo_recipe("UnCLIPImageVariationPipeline", image=picture((32, 32))),
        recipe("WuerstchenPriorPipeline", wuerstchen_prior, **PROMPT, **PRIOR),
        recipe(
            "WuerstchenDecoderPipeline",
            wuerstchen_decoder,
            **PROMPT,
            image_embeddings=numbers(1, 4, 4, 4, seed=2),
            guidance_scale=4.0,
        ),
        recipe(
            "WuerstchenCombinedPipeline",
            lambda: combined(wuerstchen_decoder, wuerstchen_prior),
            **PROMPT,
            **BOTH,
        ),
        recipe("StableCascadePriorPipeline", cascade_prior, **PROMPT, **PRIOR),
        recipe(
            "StableCascadeDecoderPipeline",
            cascade_decoder,
            **PROMPT,
            image_embeddings=numbers(1, 16, 4, 4, seed=2),
            guidance_scale=4.0,
        ),
        recipe(
            "StableCascadeCombinedPipeline",
            lambda: combined(cascade_decoder, cascade_prior),
            **PROMPT,
            **BOTH,
        ),
        recipe("DreamLitePipeline", dreamlite, **PROMPT, height=32, width=48),
        recipe("DreamLiteMobilePipeline", dreamlite, prompt="a red cat", height=32, width=48),
        recipe("VQDiffusionPipeline", codes, prompt="a red cat"),
    ]
)
