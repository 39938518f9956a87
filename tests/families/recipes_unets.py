"""Pipelines whose denoiser is Stable Diffusion's U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from case import Case, numbers, quiet
from conftest import randomise
from diffusers import (
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
    UniDiffuserModel,
    UniDiffuserTextDecoder,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion import CLIPImageProjection
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from parts import (
    DIM,
    PROMPT,
    WORDS,
    autoencoder,
    ddim,
    generator,
    image_encoder,
    image_processor,
    mask,
    picture,
    prior_parts,
    text_encoder,
    tokenizer,
    vision_config,
)
from recipe import Recipe, like
from tiny_convolutions import CASES, tiny_unet

SD, XL = CASES["U-Net"], CASES["U-Net, XL"]


def text() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": text_encoder()}


def unet(**options: Any) -> Callable[[], dict[str, Any]]:
    """Parts: a denoiser with other channels or inputs."""
    return lambda: {"unet": tiny_unet(**options)}


def joined(*makers: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: part for make in makers for name, part in make().items()}


def sd(name: str, parts: Callable[[], dict[str, Any]] = dict, **given: Any) -> tuple[str, Recipe]:
    return name, like(SD, getattr(diffusers, name), parts, **given)


def prompted(name: str, parts: Callable[[], dict[str, Any]] = dict, **given: Any) -> tuple[str, Recipe]:
    """Those that ask for a prompt in words."""
    names = inspect.signature(getattr(diffusers, name).__call__).parameters
    words = {**PROMPT, "prompt_embeds": None, "negative_prompt_embeds": None}
    return sd(name, joined(text, parts), **{n: v for n, v in words.items() if n in names}, **given)


def xl(name: str, parts: Callable[[], dict[str, Any]] = dict, **given: Any) -> tuple[str, Recipe]:
    return name, like(XL, getattr(diffusers, name), parts, **given)


def adapter(kind: str, factor: int) -> dict[str, Any]:
    channels = [16, 32, 32, 32]
    made = T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    return {"adapter": randomise(made, 3)}


def xs(case: Case) -> dict[str, Any]:
    options = {name: value for name, value in case.make().unet.config.items() if not name.startswith("_")}
    denoiser = tiny_unet(**{**options, "layers_per_block": 2})  # as many as the joint model has
    made = ControlNetXSAdapter.from_unet(
        denoiser, size_ratio=1.0, conditioning_embedding_out_channels=(16, 16)
    )
    return {"unet": denoiser, "controlnet": randomise(made, 3)}


def union() -> dict[str, Any]:
    denoiser = XL.make().unet
    names = inspect.signature(ControlNetUnionModel.__init__).parameters
    options = {name: value for name, value in denoiser.config.items() if name in names}
    sizes = {
        "num_trans_channel": 16,
        "num_trans_head": 2,
        "num_proj_channel": 16,
        "conditioning_embedding_out_channels": (16, 16),
    }
    return {"unet": denoiser, "controlnet": randomise(ControlNetUnionModel(**options, **sizes), 3)}


def pictures() -> torch.Tensor:
    """A picture for each of the two prompts."""
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(7))


def latent_picture() -> torch.Tensor:
    return numbers(2, 4, 16, 24, seed=7)


def upscaler() -> dict[str, Any]:
    """K-diffusion's blocks: it predicts the picture, and how sure it is."""
    denoiser = UNet2DConditionModel(
        in_channels=8,
        out_channels=5,
        block_out_channels=(32, 32, 64, 64),
        attention_head_dim=8,
        act_fn="gelu",
        norm_num_groups=None,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=DIM,
        time_cond_proj_dim=160,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        resnet_time_scale_shift="scale_shift",
        only_cross_attention=False,
        mid_block_type=None,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
    )
    return {"unet": randomise(denoiser, 0), "scheduler": EulerDiscreteScheduler(prediction_type="sample")}


def unclip(prior: bool) -> dict[str, Any]:
    parts = {
        **text(),
        **unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * DIM)(),
        "image_normalizer": randomise(StableUnCLIPImageNormalizer(DIM), 3),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scheduler": ddim(prediction_type="v_prediction"),
    }
    if not prior:
        return {**parts, "image_encoder": image_encoder(), "feature_extractor": image_processor()}
    before = prior_parts()
    return parts | {
        "prior": before["prior"],
        "prior_tokenizer": before["tokenizer"],
        "prior_text_encoder": before["text_encoder"],
        "prior_scheduler": before["scheduler"],
    }


def marigold(name: str, targets: int, **given: Any) -> tuple[str, Recipe]:
    """What a picture's depths, normals or materials are, denoised beside the picture."""
    cls = getattr(diffusers, name)

    def make() -> Any:
        channels = {"in_channels": 4 * (targets + 1), "out_channels": 4 * targets}
        parts = {**text(), **unet(**channels)(), "vae": autoencoder(), "scheduler": ddim()}
        return quiet(cls(**parts, **given))

    def call() -> dict[str, Any]:
        return {
            "image": picture(),
            "num_inference_steps": 10,
            "processing_resolution": 0,
            "generator": generator(),
        }

    return name, Recipe(make, call)


def bert() -> dict[str, Any]:
    config = LDMBertConfig(
        vocab_size=55,
        encoder_layers=1,
        encoder_ffn_dim=DIM,
        encoder_attention_heads=2,
        d_model=DIM,
        head_dim=16,
    )
    return {"tokenizer": tokenizer(), "bert": randomise(LDMBertModel(config), 2), "vqvae": autoencoder()}


def example() -> dict[str, Any]:
    encoder = PaintByExampleImageEncoder(vision_config(), proj_size=DIM)
    return {
        **unet(in_channels=9)(),
        "image_encoder": randomise(encoder, 3),
        "feature_extractor": image_processor(),
        "vae": autoencoder(),
    }


def gligen() -> dict[str, Any]:
    return {
        "image_encoder": image_encoder(),
        "image_project": randomise(CLIPImageProjection(DIM), 3),
        "processor": image_processor(),
        **unet(attention_type="gated-text-image")(),
    }


def consistent() -> dict[str, Any]:
    return {**unet(time_cond_proj_dim=DIM)(), "scheduler": LCMScheduler(clip_sample=False)}


def unidiffuser() -> dict[str, Any]:
    """A picture, its embedding and a text in one sequence."""
    denoiser = UniDiffuserModel(
        text_dim=DIM,
        clip_img_dim=DIM,
        num_text_tokens=WORDS,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        block_type="unidiffuser",
    )
    decoder = UniDiffuserTextDecoder(
        prefix_length=WORDS, prefix_inner_dim=DIM, n_embd=DIM, vocab_size=55, n_layer=1, n_head=2
    )
    return {
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "image_encoder": image_encoder(),
        "clip_image_processor": image_processor(),
        "clip_tokenizer": tokenizer(),
        "text_decoder": randomise(decoder, 3),
        "text_tokenizer": tokenizer(),
        "unet": randomise(denoiser, 0),
    }


BOXES = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.2, 0.6, 0.5, 0.9]]}

RECIPES: dict[str, Recipe] = dict(
    [
        sd("StableDiffusionControlNetPAGPipeline", image=picture),
        sd("StableDiffusionControlNetXSPipeline", lambda: xs(SD), image=picture),
        xl("StableDiffusionXLControlNetXSPipeline", lambda: xs(XL), image=picture),
        xl("StableDiffusionXLControlNetUnionPipeline", union, control_image=[picture()], control_mode=[0]),
        xl(
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            union,
            image=picture,
            strength=0.9,
            control_image=[picture()],
            control_mode=[0],
        ),
        xl(
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            union,
            image=picture,
            mask_image=mask,
            strength=0.9,
            control_image=[picture()],
            control_mode=[0],
        ),
        sd(
            "StableDiffusionDepth2ImgPipeline",
            unet(in_channels=5),
            image=picture,
            strength=0.9,
            depth_map=lambda: torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(7)),
        ),
        sd("StableDiffusionAdapterPipeline", lambda: adapter("full_adapter", 2), image=[picture()] * 2),
        xl("StableDiffusionXLAdapterPipeline", lambda: adapter("full_adapter_xl", 4), image=[picture()] * 2),
        sd(
            "StableDiffusionLDM3DPipeline",
            lambda: {"vae": autoencoder(in_channels=6, out_channels=6)},
            output_type="np",
        ),
        sd(
            "StableDiffusionUpscalePipeline",
            lambda: {**unet(in_channels=7, num_class_embeds=1000)(), "low_res_scheduler": DDPMScheduler()},
            image=pictures,
        ),
        sd(
            "StableDiffusionLatentUpscalePipeline",
            upscaler,
            image=latent_picture,
            pooled_prompt_embeds=lambda: numbers(2, DIM, seed=3),
            negative_pooled_prompt_embeds=lambda: numbers(2, DIM, seed=6),
        ),
        sd(
            "StableDiffusionDiffEditPipeline",
            lambda: {"inverse_scheduler": DDIMInverseScheduler()},
            mask_image=lambda: torch.ones(1, 16, 24),
            image_latents=lambda: numbers(2, 10, 4, 16, 24, seed=7),
            inpaint_strength=1.0,
        ),
        prompted(
            "StableDiffusionGLIGENPipeline",
            unet(attention_type="gated"),
            gligen_scheduled_sampling_beta=1.0,
            **BOXES,
        ),
        prompted(
            "StableDiffusionGLIGENTextImagePipeline",
            gligen,
            gligen_scheduled_sampling_beta=1.0,
            gligen_images=[picture()],
            **BOXES,
        ),
        sd(
            "StableDiffusionImageVariationPipeline",
            lambda: {
                "image_encoder": image_encoder(),
                "feature_extractor": image_processor(),
                "unet": tiny_unet(),
            },
            image=picture,
        ),
        sd(
            "StableDiffusionParadigmsPipeline",
            lambda: {"scheduler": DDIMParallelScheduler(clip_sample=False)},
            parallel=3,
        ),
        prompted(
            "StableDiffusionAttendAndExcitePipeline",
            token_indices=[2],
            attn_res=(16, 24),
            max_iter_to_alter=2,
            thresholds={0: 0.05},
        ),
        prompted(
            "StableDiffusionPix2PixZeroPipeline",
            lambda: {"inverse_scheduler": DDIMInverseScheduler()},
            source_embeds=lambda: numbers(3, WORDS, DIM, seed=7),
            target_embeds=lambda: numbers(3, WORDS, DIM, seed=8),
        ),
        prompted(
            "SemanticStableDiffusionPipeline",
            editing_prompt=["a blue hat"],
            edit_warmup_steps=2,
            edit_guidance_scale=3.0,
            edit_threshold=0.5,
        ),
        prompted(
            "CycleDiffusionPipeline",
            lambda: {"scheduler": ddim()},
            source_prompt="a dog",
            image=picture,
            strength=0.9,
        ),
        sd(
            "PaintByExamplePipeline",
            example,
            example_image=lambda: picture((32, 32)),
            image=picture,
            mask_image=mask,
        ),
        sd("LatentConsistencyModelPipeline", consistent),
        sd("LatentConsistencyModelImg2ImgPipeline", consistent, image=picture, strength=0.9),
        marigold("MarigoldDepthPipeline", 1, prediction_type="depth"),
        marigold("MarigoldNormalsPipeline", 1, prediction_type="normals"),
        marigold(
            "MarigoldIntrinsicsPipeline",
            2,
            prediction_type="intrinsics",
            target_properties={"target_names": ["albedo", "roughness"]},
        ),
        prompted("UniDiffuserPipeline", unidiffuser, height=32, width=32, output_type="np"),
        prompted("LDMTextToImagePipeline", bert, output_type="np"),
        prompted("StableUnCLIPPipeline", lambda: unclip(True), prior_num_inference_steps=2),
        prompted("StableUnCLIPImg2ImgPipeline", lambda: unclip(False), image=picture),
    ]
)
