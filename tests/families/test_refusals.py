"""What families cannot follow is refused by name, with the cure."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadeUNet
from tiny_convolutions import CASES as CONVOLUTIONS
from tiny_more import CASES as MORE
from tiny_others import BATCH, DIM, noise, quiet, randomise
from tiny_others import CASES as OTHERS

import accel
from accel.errors import UnsupportedError
from accel.pipelines.registry import find

MERGING = accel.TokenMergingConfig(ratio=0.5, dense_steps_last=0)


def refuse(name, arguments, span=True):
    denoiser = {**OTHERS, **MORE}[name].make().transformer
    find(denoiser).tokens.refuse(arguments, span)


def test_hunyuan_dit_controlnet_in_a_span_only():
    residuals = {"controlnet_block_samples": [torch.zeros(1)]}
    with pytest.raises(UnsupportedError, match="scope='block'"):
        refuse("Hunyuan-DiT", residuals)
    refuse("Hunyuan-DiT", residuals, span=False)
    refuse("Hunyuan-DiT", {"controlnet_block_samples": None})


def test_kandinsky5_sparse_attention():
    with pytest.raises(UnsupportedError, match=r"sparse_params.*attention_type=.regular"):
        refuse("Kandinsky 5", {"sparse_params": {"P": 0.8}})
    refuse("Kandinsky 5", {"sparse_params": None})


def test_cosmos_controlnet_and_a_time_per_frame():
    with pytest.raises(UnsupportedError, match="block_controlnet_hidden_states"):
        refuse("Cosmos 2", {"block_controlnet_hidden_states": [torch.zeros(1)], "timestep": torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="timestep"):
        refuse("Cosmos 2", {"timestep": torch.zeros(1, 1, 1, 1, 1)})
    refuse("Cosmos 2", {"timestep": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "video", "image"),
    [
        ("Kandinsky 5", torch.zeros(1, 5, 16, 24, 4), torch.zeros(1, 1, 16, 24, 4)),
        ("Cosmos 2", torch.zeros(1, 4, 5, 16, 24), torch.zeros(1, 4, 1, 16, 24)),
        ("JoyImage", torch.zeros(1, 2, 4, 5, 16, 24), torch.zeros(1, 2, 4, 1, 16, 24)),
        ("JoyImage", torch.zeros(1, 4, 1, 16, 24), torch.zeros(1, 2, 4, 1, 16, 24)),
        ("Nucleus", [(5, 8, 12)], [(1, 8, 12)]),
    ],
)
def test_video_is_no_image(name, video, image):
    denoiser = MORE[name].make().transformer
    grid = find(denoiser).tokens.grid
    with pytest.raises(UnsupportedError, match="video"):
        grid(denoiser, video)
    assert grid(denoiser, image) == (8, 12)


def test_token_methods_without_tokens():
    pipe = CONVOLUTIONS["Sana"].make()
    with pytest.raises(UnsupportedError, match=r"tokens: where its image tokens are.*balanced"):
        accel.accelerate(pipe, MERGING)


def test_stable_cascade_adds_noise_at_every_step():
    """A time for each image of the batch, and fresh noise: what its pictures show is continued."""
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=DIM,
        effnet_in_channels=4,
    )
    pipe = quiet(
        StableCascadeDecoderPipeline(
            randomise(decoder, 0), None, None, DDPMWuerstchenScheduler(), None, latent_dim_scale=2.0
        )
    )
    call = {
        "image_embeddings": noise(BATCH, 4, 8, 12, seed=1),
        "prompt_embeds": noise(BATCH, 1, DIM, seed=2),
        "prompt_embeds_pooled": noise(BATCH, 1, DIM, seed=2),
        "negative_prompt_embeds": noise(BATCH, 1, DIM, seed=4),
        "negative_prompt_embeds_pooled": noise(BATCH, 1, DIM, seed=4),
        "guidance_scale": 2.0,
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    assert find(decoder).branches.batched == "first"

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(5)).images

    plain = run()
    config = accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), dense_first=3))
    with accel.accelerate(pipe, config) as handle:
        fast = run()
    assert handle.stats.share < 0.9
    assert 0 < float((fast - plain).norm() / plain.norm()) < 1
    assert torch.equal(run(), plain)


def test_a_span_across_one_end_of_a_skip_connection():
    pipe = OTHERS["Hunyuan-DiT"].make()
    uneven = {"ratio": 0.5, "dense_blocks_first": 0, "dense_blocks_last": 1}
    with pytest.raises(UnsupportedError, match=r"blocks\.0 feeds blocks\.5.*scope='block'"):
        accel.accelerate(pipe, accel.TokenMergingConfig(**uneven))
    with pytest.raises(UnsupportedError, match="skip connection"):
        accel.accelerate(pipe, accel.TokenMergingConfig(refresh_layers=(3,)))
    for works in ({**uneven, "scope": "block"}, {"dense_blocks_first": 1, "dense_blocks_last": 1}):
        with accel.accelerate(pipe, accel.TokenMergingConfig(**works)) as handle:
            OTHERS["Hunyuan-DiT"].latents(pipe, steps=5)
            assert handle.stats.share < 0.95
