"""Families of which all but the image is in the same sequence: digests of the text, reference images, text."""

from __future__ import annotations

from types import SimpleNamespace

from case import Case, common, numbers, quiet, texts
from conftest import randomise
from diffusers import (
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tiny_editing import picture
from tiny_flux_like import DIM, ROTARY, masks
from tiny_more import AnySize
from tiny_others import AsIs


def make(pipeline, transformer, **parts):
    given = {"vae": None, "text_encoder": None, "scheduler": FlowMatchEulerDiscreteScheduler(), **parts}
    return quiet(pipeline(transformer=randomise(transformer, 0), **given))


def make_fibo2():
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=DIM,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=10,
        axes_dims=ROTARY,
        axes_lens=(32, 64, 64),
    )
    return make(BriaFibo2Pipeline, transformer, processor=None)


def fibo2_call(steps, wide, dtype):
    """A long prompt and a short negative one, whose digests differ in length."""
    return {
        **common(steps, wide, token=16),
        "prompt_embeds": numbers(2, 2, 9, DIM, seed=2, dtype=dtype),
        "negative_prompt_embeds": numbers(2, 2, 5, DIM, seed=4, dtype=dtype),
        "guidance_scale": 3.0,
    }


class Fibo2Edit(BriaFibo2Pipeline):
    """With references in place of its VAE's: 4 x 6 tokens, and 2 x 4."""

    def prepare_image_latents(self, image, batch_size, device, dtype):
        sizes = ((8, 12), (4, 8))
        return [numbers(batch_size, 4, *size, seed=8, dtype=dtype) for size in sizes]


def make_fibo2_edit():
    transformer = make_fibo2().transformer
    pipe = make(Fibo2Edit, transformer, processor=None)
    pipe.image_processor = SimpleNamespace(preprocess=lambda image, **sizes: (image, image))
    return pipe


def fibo2_edit_call(steps, wide, dtype):
    return {**fibo2_call(steps, wide, dtype), "image": [picture(16)] * 2}


class NoWords:
    """In place of a processor, of which the pipeline asks how long its own instruction is."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, messages, **options):
        return [[0, 0]]


class Qwen21(QwenImage21Pipeline):
    """With an image among the text where one is given: 4 slots of 2 x 2 tokens each, behind 2 tokens of text."""

    def encode_prompt(self, prompt=None, image=None, **given):
        embeds, mask, slots = super().encode_prompt(prompt, **given)
        if image is not None:
            slots = slots.clone()
            slots[:, 2:6] = True
        return embeds, mask, slots

    def prepare_latents(self, images, batch_size, channels, height, width, dtype, *options):
        latents, _ = super().prepare_latents(None, batch_size, channels, height, width, dtype, *options)
        return latents, None if images is None else numbers(batch_size, 16, channels, seed=8, dtype=dtype)


def make_qwen21():
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=DIM,
        axes_dims_rope=ROTARY,
    )
    return make(Qwen21, transformer, processor=NoWords())


def qwen21_call(steps, wide, dtype):
    return {
        **common(steps, wide, token=16),
        **texts(2, DIM, dtype),
        "prompt_embeds_mask": masks(2),
        "negative_prompt_embeds_mask": masks(2),
        "true_cfg_scale": 3.0,
    }


def qwen21_uncached_call(steps, wide, dtype):
    """The whole sequence at every step."""
    return {**qwen21_call(steps, wide, dtype), "use_kv_cache": False}


def qwen21_edit_call(steps, wide, dtype):
    """With a reference image of 4 x 4 tokens."""
    unpadded = {name: value for name, value in qwen21_call(steps, wide, dtype).items() if "mask" not in name}
    return {**unpadded, "image": [picture(16).resize((64, 64))], "output_resolution": 64}


class JoyPlusWithText(JoyImageEditPlusPipeline):
    """It counts prompts where it has embeddings, too: what its text encoder would give."""

    def encode_prompt_multiple_images(self, prompt, images, device, max_sequence_length):
        negative = all(text.endswith("\n <|im_end|>\n") for text in prompt)
        embeds = numbers(2, 7, DIM, seed=4 if negative else 2, dtype=self.transformer.dtype)
        return embeds, masks(2).to(embeds.dtype)


class AnyOwnSize(AnySize):
    """References keep their size."""

    def get_default_height_width(self, image, height=None, width=None):
        return image.height, image.width


class Latents(AsIs):
    """As a VAE that makes an eighth of the size."""

    config = SimpleNamespace(
        scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )

    def encode(self, pixels_B3THW):
        sample = super().encode(pixels_B3THW).latent_dist.sample
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=sample))


def make_joyplus():
    transformer = JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=DIM,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=list(ROTARY),
    )
    pipe = make(JoyPlusWithText, transformer, vae=Latents(), tokenizer=None, processor=None)
    pipe.image_processor = AnyOwnSize(vae_scale_factor=8)
    return pipe


def joyplus_call(steps, wide, dtype):
    """One reference for the first image and two for the second, so that the first is padded."""
    return {
        **common(steps, wide, token=16),
        "prompt": ["a", "b"],
        "images": [[picture(16)], [picture(16)] * 2],
        "guidance_scale": 3.0,
    }


CASES = {
    "FIBO 2": Case(make_fibo2, fibo2_call, tokens=96),
    "FIBO 2, editing": Case(make_fibo2_edit, fibo2_edit_call, tokens=96, references=24 + 8),
    "Qwen-Image 2.1": Case(make_qwen21, qwen21_call, tokens=96, steps=2),
    "Qwen-Image 2.1, uncached": Case(make_qwen21, qwen21_uncached_call, tokens=96),
    "Qwen-Image 2.1, editing": Case(make_qwen21, qwen21_edit_call, tokens=96, steps=2),
    "JoyImage-Edit Plus": Case(make_joyplus, joyplus_call, tokens=96, references=2 * 24),
}
