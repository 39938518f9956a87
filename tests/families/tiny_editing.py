"""Editing pipelines: tokens of reference images follow those of the image, 4 x 6 of them for 8 x 12 here."""

from __future__ import annotations

import functools
import importlib
from unittest import mock

from case import Case, common, numbers
from conftest import tiny_vae
from diffusers import (
    BriaFiboEditPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LongCatImageEditPipeline,
    QwenImageEditPipeline,
)
from PIL import Image
from tiny_flux_like import (
    BLOCKS,
    DIM,
    ROTARY,
    FiboWithText,
    make,
    make_fibo,
    make_klein,
    make_longcat,
    make_qwen,
)
from tiny_flux_like import CASES as PLAIN

REFERENCES = 24


def picture(token: int) -> Image.Image:
    """Of 4 x 6 tokens of so many pixels."""
    return Image.new("RGB", (6 * token, 4 * token), (200, 30, 60))


def make_kontext():
    transformer = FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=DIM, pooled_projection_dim=DIM, axes_dims_rope=ROTARY, **BLOCKS
    )
    parts = {"text_encoder_2": None, "tokenizer_2": None, "vae": tiny_vae()}
    return make(FluxKontextPipeline, transformer, **parts)


def kontext_call(steps, wide, dtype):
    call = PLAIN["FLUX.2 klein"].call(steps=steps, wide=wide, dtype=dtype)
    call["true_cfg_scale"] = call.pop("guidance_scale")
    pooled = {
        name: numbers(2, DIM, seed=seed, dtype=dtype)
        for name, seed in (("pooled_prompt_embeds", 3), ("negative_pooled_prompt_embeds", 6))
    }
    latents = numbers(1, 4, 8, 12, seed=8, dtype=dtype)  # what the pipeline's VAE would give
    return {**call, **pooled, "image": latents, "max_area": call["height"] * call["width"]}


def klein_call(steps, wide, dtype):
    return {**PLAIN["FLUX.2 klein"].call(steps=steps, wide=wide, dtype=dtype), "image": picture(16)}


def sized(cls, *more):
    """The pipeline with pictures of 8 x 12 tokens instead of a megapixel, and latents in place of its VAE's."""
    module = importlib.import_module(cls.__module__)

    class Sized(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, *args, height, width, **kwargs):
            sizes = (width, height, *more)
            with mock.patch.object(module, "calculate_dimensions", return_value=sizes):
                return super().__call__(*args, **kwargs)

        def _encode_vae_image(self, image, generator):
            height, width = (side // self.vae_scale_factor for side in image.shape[-2:])
            frames = (1,) if image.ndim == 5 else ()
            channels = self.transformer.config.in_channels // 4
            return numbers(1, channels, *frames, height, width, seed=8, dtype=self.transformer.dtype)

    return Sized


def make_qwen_edit():
    return make_qwen(sized(QwenImageEditPipeline, None), processor=None)


def qwen_call(steps, wide, dtype):
    call = PLAIN["Qwen-Image"].call(steps=steps, wide=wide, dtype=dtype)
    unpadded = {name: value for name, value in call.items() if "mask" not in name}
    return {**unpadded, "image": picture(16)}


class LongCatEdit(LongCatImageEditPipeline):
    """Takes embeddings without prompts, as the pipeline without pictures does in `tiny_flux_like`."""

    def encode_prompt(self, prompt=None, image=None, num_images_per_prompt=1, prompt_embeds=None):
        return super().encode_prompt([""] * len(prompt_embeds), image, num_images_per_prompt, prompt_embeds)


LongCatEdit.__module__ = LongCatImageEditPipeline.__module__


class Processor:
    image_processor = None


def make_longcat_edit():
    return make_longcat(sized(LongCatEdit), text_processor=Processor(), vae=tiny_vae())


def longcat_call(steps, wide, dtype):
    call = PLAIN["LongCat-Image"].call(steps=steps, wide=wide, dtype=dtype)
    del call["enable_prompt_rewrite"]
    return {**call, **common(steps, wide, token=4), "image": picture(4)}


class FiboEdit(BriaFiboEditPipeline):
    """As `FiboWithText`, with a reference in place of its VAE's."""

    encode_prompt = FiboWithText.encode_prompt

    def check_inputs(self, *args, **kwargs):
        """Diffusers 0.40 wants one prompt, of which it makes as many images."""

    def prepare_reference_latents(self, image, num_channels_latents, dtype, device, **options):
        ids = self._prepare_latent_image_ids(1, 4, 6, device, dtype)
        ids[..., 0] = 1
        return numbers(1, REFERENCES, num_channels_latents, seed=8, dtype=dtype), ids

    def prepare_image_latents(self, batch_size, **options):
        """Their name in diffusers 0.40."""
        packed, ids = self.prepare_reference_latents(**options)
        return packed.expand(batch_size, -1, -1), ids


def make_fibo_edit():
    return make_fibo(FiboEdit)


def fibo_call(steps, wide, dtype):
    call = PLAIN["FIBO"].call(steps=steps, wide=wide, dtype=dtype)
    return {**call, "prompt": ['{"edit_instruction": "a"}'] * 2, "image": picture(16)}


CASES = {
    "FLUX.1 Kontext": Case(make_kontext, kontext_call, tokens=96, references=REFERENCES),
    "FLUX.2 klein, editing": Case(make_klein, klein_call, tokens=96, references=16 * REFERENCES),
    "Qwen-Image-Edit": Case(make_qwen_edit, qwen_call, tokens=96, references=96),
    "LongCat-Image-Edit": Case(make_longcat_edit, longcat_call, tokens=96, references=96),
    "FIBO-Edit": Case(make_fibo_edit, fibo_call, tokens=96, references=REFERENCES),
}
