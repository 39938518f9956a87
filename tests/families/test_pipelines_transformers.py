"""Pipelines around transformers that are not like others: two loops in a call, parts shared with a control network, layers."""

from __future__ import annotations

import pytest
import torch
from every_pipeline import latents
from recipes_transformers import RECIPES

import accel
from accel.errors import UnsupportedError


def test_both_loops_of_one_call_are_followed():
    """VisualCloze makes a picture of pictures, and then the last of them larger, by two pipelines inside of it."""
    recipe = RECIPES["VisualClozePipeline"]
    pipe, calls = recipe.make(), []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    plain = latents(pipe, recipe.call())
    assert len(calls) == 20
    with accel.accelerate(pipe, "balanced") as handle:
        latents(pipe, recipe.call())
    assert len(calls) == 20 + 20 * handle.stats.share
    assert handle.stats.share < 1
    assert handle.stats.runs == 2
    assert torch.equal(latents(pipe, recipe.call()), plain)


@pytest.mark.parametrize("name", ["ZImageControlNetPipeline", "StableDiffusion3ControlNetPipeline"])
def test_a_control_network_takes_what_its_refusal_says(name):
    """Z-Image's shares blocks with the denoiser, which it calls before it."""
    recipe = RECIPES[name]
    pipe = recipe.make()
    plain = latents(pipe, recipe.call())
    with accel.accelerate(pipe, "merging"), pytest.raises(UnsupportedError, match="scope='block'"):
        latents(pipe, recipe.call())
    with accel.accelerate(pipe, accel.TokenMergingConfig(scope="block")) as handle:
        assert torch.isfinite(latents(pipe, recipe.call())).all()
    assert handle.stats.share < 0.9
    assert torch.equal(latents(pipe, recipe.call()), plain)


@pytest.mark.parametrize("name", ["QwenImageLayeredPipeline", "VisualClozeGenerationPipeline"])
def test_several_grids_that_are_all_made_are_no_references(name):
    recipe = RECIPES[name]
    pipe = recipe.make()
    with accel.accelerate(pipe, "merging"), pytest.raises(UnsupportedError, match="several grids"):
        latents(pipe, recipe.call())
    with accel.accelerate(pipe, "balanced") as handle:
        assert torch.isfinite(latents(pipe, recipe.call())).all()
    assert handle.stats.share < 1


def test_halves_of_perturbed_attention_are_no_branches_of_guidance():
    """Without guidance by a prompt there are two in a batch, as with it."""
    recipe = RECIPES["StableDiffusion3PAGPipeline"]
    pipe, call = recipe.make(), {**recipe.call(), "guidance_scale": 1.0, "pag_scale": 3.0}
    plain = latents(pipe, call)
    schedule = accel.Schedule(cycle=(1,), dense_first=2, dense_last=1, guidance_every=2)
    config = accel.ForecastConfig(schedule=schedule)
    with accel.accelerate(pipe, config), pytest.raises(UnsupportedError, match="perturbed-attention"):
        latents(pipe, call)
    assert torch.equal(latents(pipe, call), plain)
