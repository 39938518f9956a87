"""Families whose denoisers take latents (B, C, H, W) and cut them into tokens themselves."""

from __future__ import annotations

import torch
from case import Case, common, numbers, quiet, texts
from conftest import randomise
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    PRXPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models import PRXTransformer2DModel

DIM = 32  # of text embeddings
NONE = {"vae": None, "text_encoder": None, "tokenizer": None}


def make(pipeline, transformer, **parts):
    """A pipeline without what only text and pixels need."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(pipeline(**{**NONE, "scheduler": scheduler, **parts}, transformer=randomise(transformer, 0)))


def make_zimage():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    return make(ZImagePipeline, transformer)


def zimage_call(steps, wide, dtype):
    """8 x 10 tokens, which are padded to 96; a short and a long prompt, so that there is a mask."""
    return {
        **common(steps, wide, token=16, grid=(8, 10)),
        "prompt_embeds": [numbers(n, DIM, seed=n, dtype=dtype) for n in (7, 40)],
        "negative_prompt_embeds": [numbers(n, DIM, seed=n, dtype=dtype) for n in (5, 3)],
        "guidance_scale": 3.0,
    }


def sd3_transformer(dual: bool = True, channels: int = 4) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        caption_projection_dim=32,
        pooled_projection_dim=DIM,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1) if dual else (),  # as in 3.5 medium
        qk_norm="rms_norm",
    )


def make_sd3():
    others = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    return make(StableDiffusion3Pipeline, sd3_transformer(), **others)


def sd3_call(steps, wide, dtype):
    pooled = texts(2, DIM, dtype, length=1)
    return {
        **common(steps, wide, token=16),
        **texts(2, DIM, dtype),
        "pooled_prompt_embeds": pooled["prompt_embeds"][:, 0],
        "negative_pooled_prompt_embeds": pooled["negative_prompt_embeds"][:, 0],
        "guidance_scale": 3.0,
    }


def make_hunyuan():
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=DIM,
        text_embed_2_dim=DIM,
        rope_axes_dim=(8, 8),
    )
    others = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0)
    return make(HunyuanImagePipeline, transformer, guider=guider, **others)


def hunyuan_call(steps, wide, dtype):
    """Two texts a prompt; of each the second prompt's is padded."""
    mask = torch.ones(2, 7)
    mask[1, -2:] = 0
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), mask)
    call = {**texts(2, DIM, dtype), **masks}
    second = {f"{name}_2": value for name, value in call.items()}
    return {**common(steps, wide, token=32), **call, **second}


def make_refiner():
    transformer = HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 2, 2),
        text_embed_dim=DIM,
        guidance_embeds=True,
        rope_axes_dim=(4, 6, 6),
    )
    return make(HunyuanImageRefinerPipeline, transformer)


def refiner_call(steps, wide, dtype):
    """The image to refine as latents; guidance is distilled into the model."""
    size = common(steps, wide, token=32)
    image = numbers(2, 4, 1, size["height"] // 16, size["width"] // 16, seed=8, dtype=dtype)
    mask = torch.ones(2, 7)
    mask[1, -2:] = 0
    embeds = texts(2, DIM, dtype)["prompt_embeds"]
    return {**size, "prompt_embeds": embeds, "prompt_embeds_mask": mask, "image": image}


def make_auraflow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        caption_projection_dim=32,
        pos_embed_max_size=1024,
    )
    return make(AuraFlowPipeline, transformer)


def auraflow_call(steps, wide, dtype):
    mask = torch.ones(2, 7)
    return {
        **common(steps, wide, token=16),
        **texts(2, DIM, dtype),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
    }


def make_prx():
    transformer = PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=DIM,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=3,
        axes_dim=[8, 8],
    )
    return make(PRXPipeline, transformer)


def prx_call(steps, wide, dtype):
    """One image: with guidance the pipeline gives the denoiser two times, whatever the number of images."""
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[:, -2:] = False
    return {
        **common(steps, wide, token=16),
        **texts(1, DIM, dtype),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }


class IdeogramWithText(Ideogram4Pipeline):
    """Ideogram takes no embeddings: what its text encoder would give, of prompts of 7 and 5 tokens."""

    def encode_prompt(self, prompt, grid_h, grid_w, max_sequence_length, device):
        self.unconditional_transformer.to(self.transformer.dtype)  # as the pipeline expects
        lengths = [7, 5][: len(prompt)]
        ids = self._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
        text = numbers(len(prompt), max_sequence_length, DIM, seed=2)
        return torch.cat([text, text.new_zeros(len(prompt), grid_h * grid_w, DIM)], 1), *ids


def ideogram_transformer(seed):
    transformer = Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=32,
        llm_features_dim=DIM,
        mrope_section=(4, 2, 2),
    )
    return randomise(transformer, seed)


def make_ideogram():
    return make(IdeogramWithText, ideogram_transformer(0), unconditional_transformer=ideogram_transformer(3))


def ideogram_call(steps, wide, dtype):
    return {
        **common(steps, wide, token=16),
        "prompt": ["a", "b"],
        "max_sequence_length": 8,
        "guidance_scale": 3.0,
        "guidance_schedule": None,
    }


CASES = {
    "Z-Image": Case(make_zimage, zimage_call, tokens=80),
    "Stable Diffusion 3": Case(make_sd3, sd3_call, tokens=96, positions="added"),
    "HunyuanImage": Case(make_hunyuan, hunyuan_call, tokens=96),
    "HunyuanImage refiner": Case(make_refiner, refiner_call, tokens=96),
    "AuraFlow": Case(make_auraflow, auraflow_call, tokens=96, positions="added"),
    "PRX": Case(make_prx, prx_call, tokens=96, batch=1),
    "Ideogram 4": Case(make_ideogram, ideogram_call, tokens=96),
}
