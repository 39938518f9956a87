"""A pipeline that leaves its loop before the last step leaves nothing behind in the denoiser."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_flux
from diffusers import FluxPipeline

import accel
from accel.core import caller

FLUX = FAMILIES["flux"]
FORECAST = accel.ForecastConfig(cycle=(0, 1), dense_steps_first=2)
PRUNING = accel.TokenPruningConfig(cycle=(0.5,), dense_steps_first=1)
BRANCH = accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2, dense_first=1))


class Left(Exception):
    pass


def interrupt(pipe):
    pipe._interrupt = True  # diffusers' way


def fail(pipe):
    raise Left


def leave(pipe, how, step=1, **options):
    """Leave the loop in the callback after this step."""

    def callback(pipe, now, timestep, kwargs):
        if now == step:
            how(pipe)
        return kwargs

    if how is interrupt:
        FLUX.latents(pipe, callback_on_step_end=callback, **options)
    else:
        with pytest.raises(Left):
            FLUX.latents(pipe, callback_on_step_end=callback, **options)


@pytest.mark.parametrize("how", [interrupt, fail])
@pytest.mark.parametrize("config", [FORECAST, PRUNING, BRANCH], ids=["forecast", "pruning", "guidance"])
def test_the_denoiser_is_its_own_again(config, how):
    pipe = make_flux()
    seen = []
    pipe.transformer.register_forward_hook(lambda m, a, k, o: seen.append(k), with_kwargs=True)
    FLUX.latents(pipe, steps=1, batch=2, height=48)  # other latents than those of the loop
    inputs = seen[0]
    plain = pipe.transformer(**inputs)[0]
    expected = fresh(config)

    with accel.accelerate(pipe, config):
        before = set(vars(pipe.transformer))
        leave(pipe, how, guidance=3.0)
        assert set(vars(pipe.transformer)) == before
        run = pipe.scheduler.step.accel_clock.listeners[0]
        assert not run.clock.running
        assert run.method.guidance.history is run.method.state.history is None
        assert not (config is PRUNING and run.method.kept.kept)
        with pytest.warns(accel.AccelWarning, match="outside of a denoising loop"):
            assert torch.equal(pipe.transformer(**inputs)[0], plain)
        other = FluxPipeline(**{**pipe.components, "scheduler": make_flux().scheduler})
        other.set_progress_bar_config(disable=True)
        with pytest.warns(accel.AccelWarning, match="outside of a denoising loop"):
            assert torch.equal(FLUX.latents(other), FLUX.latents(make_flux()))
        assert torch.equal(FLUX.latents(pipe, guidance=3.0), expected)


def fresh(config):
    pipe = make_flux()
    with accel.accelerate(pipe, config):
        return FLUX.latents(pipe, guidance=3.0)


def test_two_handles_leave_the_pipeline_as_it_was():
    pipe = make_flux()
    first = accel.accelerate(pipe, accel.TokenMergingConfig())
    second = accel.accelerate(pipe, FORECAST)
    first.remove()  # the one that put the bar's wrapper there
    leave(pipe, interrupt)
    assert "forward" not in vars(pipe.transformer)
    second.remove()
    assert "progress_bar" not in vars(pipe)


def test_a_progress_bar_of_an_earlier_loop_or_around_several_ends_none():
    pipe = make_flux()
    with accel.accelerate(pipe, FORECAST):
        expected = FLUX.latents(pipe)
        pipe.scheduler.set_timesteps(4)
        old = pipe.progress_bar(total=4)  # never closed by its loop, collected during another one

        def close(pipe, step, timestep, kwargs):
            old.close()
            return kwargs

        with pipe.progress_bar(total=1):
            assert torch.equal(FLUX.latents(pipe, callback_on_step_end=close), expected)


def test_a_bar_that_is_collected_while_the_next_loop_starts_does_not_end_it(monkeypatch):
    """It closes again then, in whatever thread collects it, and between any two lines of the start."""
    pipe = make_flux()
    with accel.accelerate(pipe, FORECAST):
        expected = FLUX.latents(pipe)
        clock, bars, watched = pipe.scheduler.step.accel_clock, [], pipe.progress_bar
        pipe.progress_bar = lambda *args, **kwargs: bars.append(watched(*args, **kwargs)) or bars[-1]
        assert torch.equal(FLUX.latents(pipe), expected)
        old = tuple(bars)
        for name in ("here", "pipeline"):
            own = getattr(caller, name)
            monkeypatch.setattr(caller, name, lambda own=own: [bar.close() for bar in old] and own())
        assert torch.equal(FLUX.latents(pipe), expected)
        assert clock.runs == 3
