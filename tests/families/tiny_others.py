"""Families with image tokens that few other tests use."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from case import Case
from conftest import randomise
from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)

BATCH, DIM = 2, 32


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def common(steps, height, width):
    return {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
    }


def make_ernie():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=64,
        in_channels=8,
        out_channels=8,
        text_in_dim=DIM,
        rope_axes_dim=(4, 6, 6),
    )
    return quiet(
        ErnieImagePipeline(
            transformer=randomise(transformer, 0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def call_ernie(steps, wide, dtype):
    return {
        # Texts of different lengths: padded and masked, and the image's own positions start after each.
        "prompt_embeds": [noise(7, DIM, seed=2, dtype=dtype), noise(4, DIM, seed=3, dtype=dtype)],
        "negative_prompt_embeds": [noise(5, DIM, seed=4, dtype=dtype), noise(2, DIM, seed=6, dtype=dtype)],
        **common(steps, 128, 384 if wide else 192),
    }


def texts(dtype, length=7):
    return {
        "prompt_embeds": noise(BATCH, length, DIM, seed=2, dtype=dtype),
        "negative_prompt_embeds": noise(BATCH, length, DIM, seed=4, dtype=dtype),
    }


def mask(valid, length=7):
    return (torch.arange(length) < valid).long().expand(BATCH, -1)


def make_cogview4():
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=DIM,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(32, 32),
    )
    return quiet(
        CogView4Pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=randomise(transformer, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def call_cogview4(steps, wide, dtype):
    return {**texts(dtype), **common(steps, 128, 384 if wide else 192)}


def make_cogview3():
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=DIM,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=32,
    )
    return quiet(
        CogView3PlusPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=randomise(transformer, 0),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def make_dit():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )
    return quiet(DiTPipeline(randomise(transformer, 0), AsIs(), DDIMScheduler()))


class AsIs(torch.nn.Module):
    """In place of a VAE, for pipelines that always use it: latents, in the range of pictures."""

    config = SimpleNamespace(scaling_factor=1.0, scale_factor_temporal=4, scale_factor_spatial=8)
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels_B3THW):
        latents = F.avg_pool3d(pixels_B3THW.float(), (1, 8, 8))
        latents = torch.cat([latents, latents[:, :1]], 1).to(pixels_B3THW.dtype)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))

    def decode(self, latents):
        return SimpleNamespace(sample=latents.float() / 8)


def call_dit(steps, wide, dtype):
    """Its size is the model's."""
    return {
        "class_labels": [1, 2],
        "guidance_scale": 3.0,
        "num_inference_steps": steps,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(5),
    }


def make_hunyuan_dit():
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=DIM,
        cross_attention_dim_t5=DIM,
        pooled_projection_dim=16,
        text_len=7,
        text_len_t5=7,
    )
    return quiet(
        HunyuanDiTPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=randomise(transformer, 0),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def call_hunyuan_dit(steps, wide, dtype):
    prompts = texts(dtype)
    masks = {"prompt_attention_mask": mask(5), "negative_prompt_attention_mask": mask(4)}
    return {
        **prompts,
        **masks,
        **{f"{name}_2": value for name, value in {**prompts, **masks}.items()},
        "use_resolution_binning": False,
        **common(steps, 128, 384 if wide else 192),
    }


def make_lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 64, 64),
        cap_feat_dim=DIM,
    )
    return quiet(
        Lumina2Pipeline(
            transformer=randomise(transformer, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def call_lumina2(steps, wide, dtype):
    """The branches' texts differ in length, so that the image begins at different places."""
    masks = {"prompt_attention_mask": mask(6), "negative_prompt_attention_mask": mask(4)}
    return {**texts(dtype), **masks, **common(steps, 128, 384 if wide else 192)}


def call_lumina2_padded(steps, wide, dtype):
    """So do the texts of one batch."""
    uneven = (torch.arange(7) < torch.tensor([[6], [3]])).long()
    return {**call_lumina2(steps, wide, dtype), "prompt_attention_mask": uneven}


def make_lumina_next():
    transformer = LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=DIM,
    )
    return quiet(
        LuminaPipeline(
            transformer=randomise(transformer, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


CASES = {
    "CogView3+": Case(make_cogview3, call_cogview4, tokens=96, positions="added"),
    "CogView4": Case(make_cogview4, call_cogview4, tokens=96),
    "DiT": Case(make_dit, call_dit, tokens=64, positions="added"),
    "ERNIE": Case(make_ernie, call_ernie, tokens=96),
    "Hunyuan-DiT": Case(make_hunyuan_dit, call_hunyuan_dit, tokens=96),
    "Lumina 2": Case(make_lumina2, call_lumina2, tokens=96),
    "Lumina 2, padded": Case(make_lumina2, call_lumina2_padded, tokens=96),
    "Lumina-Next": Case(make_lumina_next, call_lumina2, tokens=96),
}
