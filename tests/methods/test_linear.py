"""Forecasts are made up for only where the sampler gets a fixed mix of the predictions; measured, not assumed."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, Watch, make_flux

import accel
from accel.methods.forecasting.linear import Fit, mix, products

Config = accel.ForecastConfig


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batched", [False, True])
def test_the_weights_of_a_mix_are_found(batched):
    conditional, unconditional = noise(2, 6, 5, seed=1), noise(2, 6, 5, seed=2)
    given = unconditional + 4.5 * (conditional - unconditional)
    outputs = [torch.cat([unconditional, conditional])] if batched else [conditional, unconditional]
    left, weights = mix(products(outputs, given))
    assert left < 2e-3
    assert weights == pytest.approx([-3.5, 4.5] if batched else [4.5, -3.5], abs=1e-4)


def test_channels_and_tokens_that_come_after_are_left_out():
    prediction = noise(2, 8, 4, 4)  # the second half of the channels is a variance
    left, weights = mix(products([prediction], -prediction[:, :4]))
    assert left < 2e-3
    assert weights == pytest.approx([-1], abs=1e-5)
    assert (
        mix(products([noise(1, 9, 4)], noise(1, 9, 4, seed=1)[:, :6]))[0] > 0.5
    )  # another tensor of that shape
    assert products([noise(2, 4)], noise(3, 4)) is None


def test_bfloat16_passes_and_norms_do_not():
    conditional, unconditional = (
        noise(1, 64, 16, seed=1),
        0.9 * noise(1, 64, 16, seed=1) + 0.3 * noise(1, 64, 16, seed=2),
    )
    low = [x.to(torch.bfloat16) for x in (conditional, unconditional)]
    given = low[1] + 5 * (low[0] - low[1])
    fit = Fit()
    fit.observe(low, given)
    assert fit.wrong() is None
    full = unconditional + 5 * (conditional - unconditional)
    rescaled = full * (
        conditional.norm(dim=-1, keepdim=True) / full.norm(dim=-1, keepdim=True)
    )  # as QwenImage
    fit = Fit()
    fit.observe([conditional, unconditional], rescaled)
    assert "rescaled by norms" in fit.wrong()


def test_guidance_that_starts_later():
    a, b = noise(1, 64, 16, seed=1), noise(1, 64, 16, seed=2)
    fit = Fit()
    fit.observe([a], a)
    fit.observe([a, b], b + 3 * (a - b))
    assert "number of branches" in fit.wrong()


def test_guidance_that_changes_from_step_to_step():
    a, b = noise(1, 64, 16, seed=1), noise(1, 64, 16, seed=2)
    fit = Fit()
    fit.observe([a, b], b + 3 * (a - b))
    fit.observe([a, b], b + 5 * (a - b))
    assert "strength of guidance changes" in fit.wrong()


def own_loop(pipe, combine, steps=14):
    given = {}
    plain = make_flux()
    with Watch(plain.transformer, lambda args, kwargs, output: given.setdefault("call", kwargs)):
        FAMILIES["flux"].latents(plain)
    first = given["call"]
    x = first["hidden_states"]
    pipe.scheduler.set_timesteps(steps, mu=0.5)
    for t in pipe.scheduler.timesteps:
        call = {**first, "hidden_states": x, "timestep": t.expand(1) / 1000}
        conditional = pipe.transformer(**call)[0]
        other = {**call, "encoder_hidden_states": -call["encoder_hidden_states"]}
        x = pipe.scheduler.step(combine(conditional, pipe.transformer(**other)[0]), t, x, return_dict=False)[
            0
        ]
    return x


def linear(c, u):
    return u + 3 * (c - u)


def renormed(c, u):
    full = linear(c, u)
    return full * (c.norm(dim=-1, keepdim=True) / full.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("combine", [linear, renormed])
def test_auto_is_off_where_a_pipeline_rescales_and_says_so(combine):
    pipe, results = make_flux(), {}
    for correct in (False, "auto"):
        config = Config(cycle=(0, 1), dense_steps_first=4, dense_steps_last=0, correct=correct)
        with accel.accelerate(pipe, config) as handle:
            results[correct] = own_loop(pipe, combine)
            notes = " ".join(handle.stats.notes)
    assert torch.equal(results["auto"], results[False]) == (combine is renormed)
    assert ("rescaled by norms" in notes) == (combine is renormed)
