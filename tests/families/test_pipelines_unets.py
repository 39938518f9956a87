"""Pipelines around U-Nets and priors: which loop is followed, what cannot be, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from every_pipeline import latents
from recipes_kandinsky import RECIPES as KANDINSKY
from recipes_pixels import RECIPES as PIXELS
from recipes_unets import RECIPES as UNETS

import accel
from accel.core.capability import denoisers_of, scheduler_of
from accel.errors import UnsupportedError
from accel.methods.forecasting.engine import Forecasting

RECIPES = {**UNETS, **KANDINSKY, **PIXELS}
EVERY_SECOND = accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), dense_first=3, dense_last=1))
NOTHING = accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), dense_first=1000))


def calls_of(module):
    """A list that grows by one with every call that reaches the module."""
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CycleDiffusionPipeline", "each step's noise back"),
        ("ScoreSdeVePipeline", "ScoreSdeVeScheduler has no step"),
        ("StableDiffusionAttendAndExcitePipeline", "gradients"),
        ("StableDiffusionParadigmsPipeline", "window of steps"),
        ("StableDiffusionPix2PixZeroPipeline", "gradients"),
        ("UniDiffuserPipeline", "three predictions"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(name, message):
    pipe = RECIPES[name].make()
    with pytest.raises(UnsupportedError, match=message):
        accel.accelerate(pipe, "balanced")
    pipe.__class__ = type("Mine", (type(pipe),), {})  # one of one's own
    with pytest.raises(UnsupportedError, match=message):
        accel.accelerate(pipe, "balanced")


@pytest.mark.parametrize(
    ("name", "denoiser"),
    [
        ("KandinskyV22CombinedPipeline", "unet"),
        ("StableUnCLIPPipeline", "unet"),
        ("UnCLIPPipeline", "decoder"),
        ("UnCLIPImageVariationPipeline", "decoder"),
        ("WuerstchenCombinedPipeline", "decoder"),
        ("StableCascadePriorPipeline", "prior"),
    ],
)
def test_of_several_denoisers_the_one_that_makes_the_picture_is_accelerated(name, denoiser):
    pipe = RECIPES[name].make()
    assert [module for module, _ in denoisers_of(pipe)] == [getattr(pipe, denoiser)]
    assert scheduler_of(pipe) is getattr(pipe, "scheduler", getattr(pipe, "decoder_scheduler", None))


def test_steps_of_a_denoiser_without_transformer_blocks_are_counted():
    """Kandinsky's U-Net has attention, and no block that takes tokens: 0 of 0 is no share."""
    recipe = KANDINSKY["KandinskyV22Pipeline"]
    pipe = recipe.make()
    plain = latents(pipe, recipe.call())
    calls = calls_of(pipe.unet.conv_in)
    with accel.accelerate(pipe, EVERY_SECOND) as handle:
        fast = latents(pipe, recipe.call())
    assert handle.stats.share == len(calls) / 10 == 0.7
    assert 0 < float((fast - plain).norm() / plain.norm()) < 1


@pytest.mark.parametrize(
    "name", ["DDIMPipeline", "KandinskyPipeline", "StableUnCLIPPipeline", "MarigoldDepthPipeline"]
)
def test_a_forecast_of_nothing_changes_nothing(name):
    recipe = RECIPES[name]
    pipe = recipe.make()
    plain = latents(pipe, recipe.call())
    with accel.accelerate(pipe, NOTHING) as handle:
        assert torch.equal(latents(pipe, recipe.call()), plain)
    assert handle.stats.share == 1
    assert torch.equal(latents(pipe, recipe.call()), plain)


@pytest.mark.parametrize(
    "name",
    [
        "IFPipeline",  # its denoiser's variance, and thresholds
        "KandinskyPriorPipeline",  # predicts an embedding, in an output class of its own
        "LatentConsistencyModelPipeline",
        "VQDiffusionPipeline",  # how likely codes are
        "WuerstchenDecoderPipeline",  # times from 1 to 0, one for each image
    ],
)
def test_samplers_with_noise_take_forecasts(name, monkeypatch):
    """It is the picture that is continued (how well: tests/core/gaussian.py), and the last step is computed."""
    recipe = RECIPES[name]
    pipe = recipe.make()
    plain = latents(pipe, recipe.call()).float()
    with accel.accelerate(pipe, EVERY_SECOND) as handle:
        fast = latents(pipe, recipe.call()).float()
    assert handle.stats.share < 1
    assert handle.stats.steps[-1].computed > 0
    assert fast.isfinite().all()
    assert not torch.equal(fast, plain)
    with monkeypatch.context() as patch, accel.accelerate(pipe, EVERY_SECOND):
        patch.setattr(Forecasting, "stepping", lambda self, run: None)
        predictions = latents(pipe, recipe.call()).float()
    # What VQ-Diffusion predicts is the picture.
    assert torch.equal(predictions, fast) == (name == "VQDiffusionPipeline")
    assert 0.5 < float(fast.std() / plain.std()) < 2
    assert torch.equal(latents(pipe, recipe.call()).float(), plain)
