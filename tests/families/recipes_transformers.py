"""Pipelines whose denoiser is a transformer."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from case import Case, numbers
from conftest import randomise, tiny_vae
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    HunyuanDiT2DControlNetModel,
    QwenImageControlNetModel,
    SanaControlNetModel,
    SCMScheduler,
    SD3ControlNetModel,
    ZImageControlNetModel,
)
from parts import WORDS, mask, picture, text_encoder, tokenizer
from PIL import Image
from recipe import Recipe, family, first_prompt, of
from tiny_convolutions import CASES as CONVOLUTIONS
from tiny_editing import CASES as EDITING
from tiny_editing import sized
from tiny_flux_like import CASES as FLUX_LIKE
from tiny_flux_like import qwen_transformer
from tiny_latents import CASES as LATENTS
from tiny_latents import sd3_transformer
from tiny_more import CASES as MORE
from tiny_others import CASES as OTHERS
from transformers import BatchFeature, T5Config, T5EncoderModel


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
    return {"vae": qwen_vae(), "text_encoder": text_encoder(), "processor": None}


def layered_parts() -> dict[str, Any]:
    transformer = qwen_transformer(zero_cond_t=False, use_additional_t_cond=True, use_layer3d_rope=True)
    return {**qwen_edit_parts(), "transformer": randomise(transformer, 0)}


def another(case: Case, **options: Any) -> dict[str, Any]:
    """The case's denoiser with other options."""
    made = case.make().transformer
    return {"transformer": randomise(type(made)(**{**options_of(made, type(made)), **options}), 0)}


def kandinsky5_i2i() -> dict[str, Any]:
    return {**another(MORE["Kandinsky 5"], visual_cond=True), "_resolutions": [(192, 128)], **eighth()}


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
    made = another(CONVOLUTIONS["Sana"], guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return {**made, "scheduler": SCMScheduler(), "vae": sana_vae()}


def visual_cloze_parts() -> dict[str, Any]:
    """A picture of pictures, the last of them to be made."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        **another(EDITING["FLUX.1 Kontext"], in_channels=3 * 16, out_channels=16),
        "text_encoder": text_encoder(),
        "text_encoder_2": randomise(T5EncoderModel(config), 6),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "resolution": 32,
    }


def zimage_omni() -> dict[str, Any]:
    """Its denoiser also reads what another model sees in the reference images."""
    vae = tiny_vae().to(torch.bfloat16)  # as the pipeline takes for granted
    made = another(LATENTS["Z-Image"], siglip_feat_dim=8)
    return {**made, "vae": vae, "siglip": Seen(), "siglip_processor": Spots()}


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


SIZE, QUARTER, SANA = {"height": 32, "width": 48}, {"height": 64, "width": 96}, {"height": 32, "width": 64}
PICTURE = {"image": picture, "strength": 0.9}
PAINT = {**PICTURE, "mask_image": mask}
CONTROL = {"control_image": picture}
QWEN, QWEN_EDIT = FLUX_LIKE["Qwen-Image"], EDITING["Qwen-Image-Edit"]
SD3, ZIMAGE, SANA_CASE = LATENTS["Stable Diffusion 3"], LATENTS["Z-Image"], CONVOLUTIONS["Sana"]
KONTEXT, HUNYUAN = EDITING["FLUX.1 Kontext"], OTHERS["Hunyuan-DiT"]
CLOZE = {
    "image": lambda: [[picture(), picture()], [picture(), None]],
    "task_prompt": "a",
    "content_prompt": "b",
    "prompt_embeds": None,
    "pooled_prompt_embeds": None,
    "max_sequence_length": WORDS,
}

RECIPES: dict[str, Recipe] = {
    **family(FLUX_LIKE["Chroma"], SIZE, chroma_inpaint, ChromaInpaintPipeline=PAINT),
    **family(KONTEXT, SIZE, FluxKontextInpaintPipeline={**PAINT, "_auto_resize": False}),
    **family(
        KONTEXT,
        CLOZE,
        visual_cloze_parts,
        VisualClozeGenerationPipeline={},
        VisualClozePipeline={"upsampling_height": 32, "upsampling_width": 48},
    ),
    **family(
        QWEN,
        QUARTER,
        lambda: {"vae": qwen_vae()},
        QwenImageImg2ImgPipeline=PICTURE,
        QwenImageInpaintPipeline=PAINT,
    ),
    **family(QWEN, QUARTER, qwen_controlled, QwenImageControlNetPipeline=CONTROL),
    **family(
        QWEN,
        QUARTER,
        lambda: qwen_controlled(extra_condition_channels=4),
        QwenImageControlNetInpaintPipeline={**CONTROL, "control_mask": mask},
    ),
    "QwenImageEditPipeline": of(QWEN_EDIT),
    **family(
        QWEN_EDIT,
        QUARTER,
        qwen_edit_parts,
        lambda cls: sized(cls, None),
        QwenImageEditInpaintPipeline=PAINT,
    ),
    **family(
        QWEN_EDIT,
        {**QUARTER, **first_prompt(QWEN_EDIT)},
        qwen_edit_parts,
        sized,
        QwenImageEditPlusPipeline={"image": lambda: [picture()] * 2},
    ),
    **family(
        QWEN_EDIT,
        {**QUARTER, **first_prompt(QWEN_EDIT)},
        layered_parts,
        sized,
        # It cannot give latents.
        QwenImageLayeredPipeline={"image": picture, "prompt": "a", "layers": 2, "output_type": "pt"},
    ),
    **family(SD3, SIZE, StableDiffusion3Img2ImgPipeline=PICTURE),
    **family(SD3, SIZE, sd3_inpaint, StableDiffusion3InpaintPipeline=PAINT),
    **family(
        SD3,
        SIZE,
        sd3_parts,
        StableDiffusion3PAGPipeline={},
        StableDiffusion3PAGImg2ImgPipeline=PICTURE,
        StableDiffusion3ControlNetPipeline=CONTROL,
    ),
    **family(
        SD3,
        SIZE,
        lambda: sd3_parts(extra_conditioning_channels=1),
        StableDiffusion3ControlNetInpaintingPipeline={**CONTROL, "control_mask": mask},
    ),
    **family(ZIMAGE, SIZE, ZImageImg2ImgPipeline=PICTURE, ZImageInpaintPipeline=PAINT),
    **family(ZIMAGE, SIZE, lambda: zimage_controlled(4), ZImageControlNetPipeline=CONTROL),
    **family(
        ZIMAGE,
        SIZE,
        lambda: zimage_controlled(9),
        ZImageControlNetInpaintPipeline={
            "image": lambda: [picture()] * 2,
            "mask_image": lambda: [mask()] * 2,
            "control_image": lambda: [picture()] * 2,
        },
    ),
    **family(
        ZIMAGE,
        SIZE,
        zimage_omni,
        ZImageOmniPipeline={
            "image": lambda: picture((64, 64)),
            "prompt_embeds": lambda: omni_prompts(2),
            "negative_prompt_embeds": lambda: omni_prompts(4),
        },
    ),
    **family(HUNYUAN, {}, hunyuan_controlled, HunyuanDiTControlNetPipeline=CONTROL),
    **family(HUNYUAN, {}, eighth, HunyuanDiTPAGPipeline={}),
    **family(SANA_CASE, SANA, sana_controlled, SanaControlNetPipeline=CONTROL),
    **family(SANA_CASE, SANA, lambda: {"vae": sana_vae()}, SanaPAGPipeline={}),
    **family(
        SANA_CASE,
        {**SANA, "intermediate_timesteps": lambda: None},
        sprint_parts,
        SanaSprintPipeline={},
        SanaSprintImg2ImgPipeline=PICTURE,
    ),
    **family(
        LATENTS["PRX"],
        SIZE,
        lambda: another(LATENTS["PRX"], in_channels=3, bottleneck_size=8, resolution_embeds=True),
        PRXPixelPipeline={"output_type": "pt"},
    ),
    **family(
        MORE["Kandinsky 5"],
        {},
        kandinsky5_i2i,
        Kandinsky5I2IPipeline={"image": lambda: [picture()] * 2},
    ),
    "Kandinsky5T2IPipeline": of(MORE["Kandinsky 5"]),
    "LongCatImageEditPipeline": of(EDITING["LongCat-Image-Edit"]),
}
