"""Pipelines whose denoiser is a transformer."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from case import numbers, quiet
from conftest import randomise, tiny_vae
from diffusers import (
    AmusedScheduler,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    Kandinsky6SRPipeline,
    QwenImageControlNetModel,
    SanaControlNetModel,
    SCMScheduler,
    SD3ControlNetModel,
    UVit2DModel,
    VQModel,
    ZImageControlNetModel,
)
from diffusers.models import Kandinsky6SRTransformer3DModel, Kandinsky6SRVAE
from PIL import Image
from recipe import Letters, Recipe, first_prompt, like, of, tiny_clip, tiny_t5
from tiny_convolutions import CASES as CONVOLUTIONS
from tiny_editing import CASES as EDITING
from tiny_editing import sized
from tiny_flux_like import CASES as FLUX_LIKE
from tiny_flux_like import qwen_transformer
from tiny_latents import CASES as LATENTS
from tiny_latents import sd3_transformer
from tiny_latest import CASES as LATEST
from tiny_more import CASES as MORE
from tiny_others import CASES as OTHERS
from transformers import BatchFeature

SIZE = {"height": 32, "width": 48}


def picture() -> Image.Image:
    """Of a colour that changes from left to right."""
    return Image.linear_gradient("L").convert("RGB").rotate(90).resize((48, 32))


def mask() -> Image.Image:
    """The left half is to be painted."""
    image = Image.new("L", (48, 32), 0)
    image.paste(255, (0, 0, 24, 32))
    return image


def chroma_inpaint() -> dict[str, Any]:
    """Its denoiser with what the pipeline reads of its configuration and the model's class has no setting for."""
    transformer = FLUX_LIKE["Chroma"].make().transformer
    transformer.register_to_config(guidance_embeds=False)
    return {"transformer": transformer}


def qwen_vae() -> AutoencoderKLQwenImage:
    """A quarter of the size, 4 channels."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return randomise(vae, 1)


def qwen_parts() -> dict[str, Any]:
    return {"vae": qwen_vae()}


def options_of(transformer: Any, kind: type) -> dict[str, Any]:
    """Of a denoiser's configuration what its control network has, too."""
    names = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in transformer.config.items() if name in names}


def qwen_controlled(**more: Any) -> dict[str, Any]:
    transformer = qwen_transformer(zero_cond_t=False)
    options = options_of(transformer, QwenImageControlNetModel)
    return {
        "vae": qwen_vae(),
        "transformer": randomise(transformer, 0),
        "controlnet": randomise(QwenImageControlNetModel(**{**options, **more}), 3),
    }


def sd3_parts(channels: int = 4, **more: Any) -> dict[str, Any]:
    transformer = sd3_transformer(dual=False, channels=channels)
    options = options_of(transformer, SD3ControlNetModel)
    return {
        "transformer": randomise(transformer, 0),
        "controlnet": randomise(SD3ControlNetModel(**{**options, **more}), 3),
    }


def sd3_inpaint() -> dict[str, Any]:
    """It takes 16 channels of latents, or 33."""
    return {"transformer": sd3_parts(channels=16)["transformer"], "vae": tiny_vae(16)}


def zimage_controlled(channels: int) -> dict[str, Any]:
    transformer = LATENTS["Z-Image"].make().transformer
    options = {
        "control_layers_places": [0, 2],
        "control_refiner_layers_places": [0],
        "control_in_dim": channels,
        "add_control_noise_refiner": "control_noise_refiner",
    }
    net = ZImageControlNetModel(**{**options_of(transformer, ZImageControlNetModel), **options})
    randomise(net, 3)
    return {
        "transformer": transformer,
        "controlnet": ZImageControlNetModel.from_transformer(net, transformer),
    }


def qwen_edit_parts() -> dict[str, Any]:
    return {"vae": qwen_vae(), "text_encoder": tiny_clip(), "processor": None}


def layered_parts() -> dict[str, Any]:
    transformer = qwen_transformer(zero_cond_t=False, use_additional_t_cond=True, use_layer3d_rope=True)
    return {**qwen_edit_parts(), "transformer": randomise(transformer, 0)}


def kandinsky5_i2i() -> dict[str, Any]:
    made = MORE["Kandinsky 5"].make().transformer
    transformer = type(made)(**{**options_of(made, type(made)), "visual_cond": True})
    return {"transformer": randomise(transformer, 0), "_resolutions": [(192, 128)], **eighth()}


def hunyuan_controlled() -> dict[str, Any]:
    transformer = OTHERS["Hunyuan-DiT"].make().transformer
    options = options_of(transformer, HunyuanDiT2DControlNetModel)
    net = HunyuanDiT2DControlNetModel(**options, transformer_num_layers=transformer.config.num_layers)
    return {"transformer": transformer, "controlnet": randomise(net, 3), **eighth()}


def eighth() -> dict[str, Any]:
    """The VAE makes an eighth of the size, as the pipeline takes for granted."""
    return {"vae": tiny_vae(levels=4)}


def sana_vae() -> AutoencoderDC:
    """A quarter of the size, 4 channels."""
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    return randomise(vae, 1)


def sana_controlled() -> dict[str, Any]:
    transformer = CONVOLUTIONS["Sana"].make().transformer
    options = {**options_of(transformer, SanaControlNetModel), "num_layers": 1}
    net = SanaControlNetModel(**options)
    return {"transformer": transformer, "controlnet": randomise(net, 3), "vae": sana_vae()}


def sprint_parts() -> dict[str, Any]:
    made = CONVOLUTIONS["Sana"].make().transformer
    options = {**options_of(made, type(made)), "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return {
        "transformer": randomise(type(made)(**options), 0),
        "scheduler": SCMScheduler(),
        "vae": sana_vae(),
    }


def prx_pixel() -> dict[str, Any]:
    made = LATENTS["PRX"].make().transformer
    options = {
        **options_of(made, type(made)),
        "in_channels": 3,
        "bottleneck_size": 8,
        "resolution_embeds": True,
    }
    return {"transformer": randomise(type(made)(**options), 0)}


def visual_cloze_parts() -> dict[str, Any]:
    made = EDITING["FLUX.1 Kontext"].make().transformer
    options = {**options_of(made, type(made)), "in_channels": 16 + 16 + 16, "out_channels": 16}
    texts = {
        "text_encoder": tiny_clip(),
        "text_encoder_2": tiny_t5(),
        "tokenizer": Letters(),
        "tokenizer_2": Letters(),
    }
    return {"transformer": randomise(type(made)(**options), 0), **texts, "resolution": 32}


SANA = {"height": 32, "width": 64}


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
        vqvae = VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=8,
            num_vq_embeddings=32,
            norm_num_groups=4,
            lookup_from_codebook=True,
            mid_block_add_attention=False,
        )
        return quiet(
            pipeline(
                vqvae=randomise(vqvae, 1),
                tokenizer=Letters(),
                text_encoder=tiny_clip(projected=True),
                transformer=randomise(transformer, 0),
                scheduler=AmusedScheduler(mask_token_id=32),
            )
        )

    def call() -> dict[str, Any]:
        own = {name: value() for name, value in given.items()}
        generator = torch.Generator().manual_seed(5)
        return {"prompt": "a", "num_inference_steps": 10, "generator": generator, "output_type": "pt", **own}

    return Recipe(make, call)


def square(image: Image.Image) -> Image.Image:
    return image.resize((16, 16))


def zimage_omni() -> dict[str, Any]:
    """Its denoiser also reads what another model sees in the reference images."""
    made = LATENTS["Z-Image"].make().transformer
    options = {**options_of(made, type(made)), "siglip_feat_dim": 8}
    vae = tiny_vae().to(torch.bfloat16)  # as the pipeline takes for granted
    seen = {"siglip": Seen(), "siglip_processor": Spots()}
    return {"transformer": randomise(type(made)(**options), 0), "vae": vae, **seen}


class Seen(torch.nn.Module):
    """In place of SigLIP: 2 x 3 spots of a picture."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, spatial_shapes: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=numbers(1, 6, 8, seed=9))


class Spots:
    def __call__(self, images: list[Image.Image], return_tensors: str) -> BatchFeature:
        return BatchFeature({"spatial_shapes": torch.tensor([[2, 3]])})


def omni_prompts(seed: int) -> list[list[torch.Tensor]]:
    """Of each of 2 prompts what comes before the picture, between it and the image to make, and after."""
    return [[numbers(length, 32, seed=seed + length) for length in (5, 3, 2)] for _ in range(2)]


def super_resolution() -> Recipe:
    """A picture of 16 pixels, twice as large by tiles of 128, which the denoiser sees as 8 x 8 tokens."""

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
            "video": [picture().resize((96, 64))],
            "resolution_scale": 2,
            "num_inference_steps": 10,
            "generator": torch.Generator().manual_seed(5),
            "output_type": "pt",
        }

    return Recipe(make, call)


QWEN = {"height": 64, "width": 96}

RECIPES: dict[str, Recipe] = {
    "ChromaInpaintPipeline": like(
        FLUX_LIKE["Chroma"],
        diffusers.ChromaInpaintPipeline,
        chroma_inpaint,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **SIZE,
    ),
    "QwenImageImg2ImgPipeline": like(
        FLUX_LIKE["Qwen-Image"],
        diffusers.QwenImageImg2ImgPipeline,
        qwen_parts,
        image=picture,
        strength=0.9,
        **QWEN,
    ),
    "QwenImageInpaintPipeline": like(
        FLUX_LIKE["Qwen-Image"],
        diffusers.QwenImageInpaintPipeline,
        qwen_parts,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **QWEN,
    ),
    "QwenImageControlNetPipeline": like(
        FLUX_LIKE["Qwen-Image"],
        diffusers.QwenImageControlNetPipeline,
        qwen_controlled,
        control_image=picture,
        **QWEN,
    ),
    "QwenImageControlNetInpaintPipeline": like(
        FLUX_LIKE["Qwen-Image"],
        diffusers.QwenImageControlNetInpaintPipeline,
        lambda: qwen_controlled(extra_condition_channels=4),
        control_image=picture,
        control_mask=mask,
        **QWEN,
    ),
    "StableDiffusion3Img2ImgPipeline": like(
        LATENTS["Stable Diffusion 3"],
        diffusers.StableDiffusion3Img2ImgPipeline,
        image=picture,
        strength=0.9,
        **SIZE,
    ),
    "StableDiffusion3InpaintPipeline": like(
        LATENTS["Stable Diffusion 3"],
        diffusers.StableDiffusion3InpaintPipeline,
        sd3_inpaint,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **SIZE,
    ),
    "StableDiffusion3PAGPipeline": like(
        LATENTS["Stable Diffusion 3"], diffusers.StableDiffusion3PAGPipeline, sd3_parts, **SIZE
    ),
    "StableDiffusion3PAGImg2ImgPipeline": like(
        LATENTS["Stable Diffusion 3"],
        diffusers.StableDiffusion3PAGImg2ImgPipeline,
        sd3_parts,
        image=picture,
        strength=0.9,
        **SIZE,
    ),
    "StableDiffusion3ControlNetPipeline": like(
        LATENTS["Stable Diffusion 3"],
        diffusers.StableDiffusion3ControlNetPipeline,
        sd3_parts,
        control_image=picture,
        **SIZE,
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": like(
        LATENTS["Stable Diffusion 3"],
        diffusers.StableDiffusion3ControlNetInpaintingPipeline,
        lambda: sd3_parts(extra_conditioning_channels=1),
        control_image=picture,
        control_mask=mask,
        **SIZE,
    ),
    "ZImageImg2ImgPipeline": like(
        LATENTS["Z-Image"], diffusers.ZImageImg2ImgPipeline, image=picture, strength=0.9, **SIZE
    ),
    "ZImageInpaintPipeline": like(
        LATENTS["Z-Image"],
        diffusers.ZImageInpaintPipeline,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **SIZE,
    ),
    "ZImageControlNetPipeline": like(
        LATENTS["Z-Image"],
        diffusers.ZImageControlNetPipeline,
        lambda: zimage_controlled(4),
        control_image=picture,
        **SIZE,
    ),
    "ZImageControlNetInpaintPipeline": like(
        LATENTS["Z-Image"],
        diffusers.ZImageControlNetInpaintPipeline,
        lambda: zimage_controlled(9),
        image=lambda: [picture()] * 2,
        mask_image=lambda: [mask()] * 2,
        control_image=lambda: [picture()] * 2,
        **SIZE,
    ),
    "FluxKontextInpaintPipeline": like(
        EDITING["FLUX.1 Kontext"],
        diffusers.FluxKontextInpaintPipeline,
        image=picture,
        mask_image=mask,
        strength=0.9,
        _auto_resize=False,
        **SIZE,
    ),
    "QwenImageEditPipeline": of(EDITING["Qwen-Image-Edit"]),
    "QwenImageEditInpaintPipeline": like(
        EDITING["Qwen-Image-Edit"],
        sized(diffusers.QwenImageEditInpaintPipeline, None),
        qwen_edit_parts,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **QWEN,
    ),
    "QwenImageEditPlusPipeline": like(
        EDITING["Qwen-Image-Edit"],
        sized(diffusers.QwenImageEditPlusPipeline),
        qwen_edit_parts,
        image=lambda: [picture(), picture()],
        **QWEN,
        **first_prompt(EDITING["Qwen-Image-Edit"]),
    ),
    "QwenImageLayeredPipeline": like(
        EDITING["Qwen-Image-Edit"],
        sized(diffusers.QwenImageLayeredPipeline),
        layered_parts,
        image=picture,
        prompt="a",
        layers=2,
        output_type="pt",  # it cannot give latents
        **QWEN,
        **first_prompt(EDITING["Qwen-Image-Edit"]),
    ),
    "LongCatImageEditPipeline": of(EDITING["LongCat-Image-Edit"]),
    "Kandinsky5T2IPipeline": of(MORE["Kandinsky 5"]),
    "Kandinsky5I2IPipeline": like(
        MORE["Kandinsky 5"],
        diffusers.Kandinsky5I2IPipeline,
        kandinsky5_i2i,
        image=lambda: [picture()] * 2,
    ),
    "HunyuanDiTControlNetPipeline": like(
        OTHERS["Hunyuan-DiT"],
        diffusers.HunyuanDiTControlNetPipeline,
        hunyuan_controlled,
        control_image=picture,
    ),
    "HunyuanDiTPAGPipeline": like(OTHERS["Hunyuan-DiT"], diffusers.HunyuanDiTPAGPipeline, eighth),
    "SanaControlNetPipeline": like(
        CONVOLUTIONS["Sana"], diffusers.SanaControlNetPipeline, sana_controlled, control_image=picture, **SANA
    ),
    "SanaPAGPipeline": like(
        CONVOLUTIONS["Sana"], diffusers.SanaPAGPipeline, lambda: {"vae": sana_vae()}, **SANA
    ),
    "SanaSprintPipeline": like(
        CONVOLUTIONS["Sana"], diffusers.SanaSprintPipeline, sprint_parts, **SANA, intermediate_timesteps=None
    ),
    "SanaSprintImg2ImgPipeline": like(
        CONVOLUTIONS["Sana"],
        diffusers.SanaSprintImg2ImgPipeline,
        sprint_parts,
        image=picture,
        strength=0.9,
        intermediate_timesteps=None,
        **SANA,
    ),
    "PRXPixelPipeline": like(LATENTS["PRX"], diffusers.PRXPixelPipeline, prx_pixel, **SIZE, output_type="pt"),
    "VisualClozeGenerationPipeline": like(
        EDITING["FLUX.1 Kontext"],
        diffusers.VisualClozeGenerationPipeline,
        visual_cloze_parts,
        task_prompt="a",
        content_prompt="b",
        prompt_embeds=None,
        pooled_prompt_embeds=None,
        max_sequence_length=16,
        image=lambda: [[picture(), picture()], [picture(), None]],
    ),
    "VisualClozePipeline": like(
        EDITING["FLUX.1 Kontext"],
        diffusers.VisualClozePipeline,
        visual_cloze_parts,
        task_prompt="a",
        content_prompt="b",
        prompt_embeds=None,
        pooled_prompt_embeds=None,
        max_sequence_length=16,
        upsampling_height=32,
        upsampling_width=48,
        image=lambda: [[picture(), picture()], [picture(), None]],
    ),
    "BriaFibo2Pipeline": of(LATEST["FIBO 2"]),
    "QwenImage21Pipeline": of(LATEST["Qwen-Image 2.1"]),
    "JoyImageEditPlusPipeline": of(LATEST["JoyImage-Edit Plus"]),
    "AmusedPipeline": amused(diffusers.AmusedPipeline),
    "AmusedImg2ImgPipeline": amused(diffusers.AmusedImg2ImgPipeline, image=lambda: square(picture())),
    "AmusedInpaintPipeline": amused(
        diffusers.AmusedInpaintPipeline,
        image=lambda: square(picture()),
        mask_image=lambda: square(mask()),
    ),
    "Kandinsky6SRPipeline": super_resolution(),
    "ZImageOmniPipeline": like(
        LATENTS["Z-Image"],
        diffusers.ZImageOmniPipeline,
        zimage_omni,
        image=lambda: picture().resize((64, 64)),
        prompt_embeds=lambda: omni_prompts(2),
        negative_prompt_embeds=lambda: omni_prompts(4),
        **SIZE,
    ),
}
