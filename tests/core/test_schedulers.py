"""Which schedulers forecasts take: one call of the model at each time, and times that go one way."""

from __future__ import annotations

import diffusers
import pytest
from conftest import FAMILIES, make_flux, make_pixart

import accel
from accel.errors import UnsupportedError

# diffusers' schedulers hand torch tensors to numpy 2 the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

CONFIGS = [accel.ForecastConfig(), accel.TokenPruningConfig(), accel.TokenMergingConfig(order=1)]


def start(name, steps=12, config=CONFIGS[0], **options):
    pipe = make_flux()
    pipe.scheduler = getattr(diffusers, name)(**options)
    with accel.accelerate(pipe, config) as handle:
        pipe.scheduler.set_timesteps(steps)
        return handle.stats.notes, len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}, "calls the model 2 times for every step"),
        ("HeunDiscreteScheduler", {}, "calls the model 2 times for every step"),
        ("KDPM2DiscreteScheduler", {}, "calls the model 2 times for every step"),
        ("KDPM2AncestralDiscreteScheduler", {}, "calls the model 2 times for every step"),
        ("PNDMScheduler", {}, r"more than once at the same timestep in its first steps \(PNDM\)"),
        ("PNDMScheduler", {"skip_prk_steps": True}, r"in its first steps \(PNDM\)"),
    ],
)
def test_more_than_one_call_at_a_time_is_refused(name, options, message, config):
    with pytest.raises(UnsupportedError, match=f"^{name} .*{message}.*DPM-Solver"):
        start(name, config=config, **options)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.8, 0.8, 0.2], r"steps 1 and 2 are at the same noise level \(timesteps 800 and 800\)"),
        ([1.0, 0.4, 0.8, 0.2], "goes back and forth between noise levels"),
    ],
)
def test_times_that_repeat_or_go_back_are_refused(sigmas, message):
    pipe = make_flux()
    with accel.accelerate(pipe, accel.ForecastConfig()), pytest.raises(UnsupportedError, match=message):
        FAMILIES["flux"].latents(pipe, steps=4, sigmas=sigmas)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("steps", [50, 100])
def test_timesteps_may_round_to_the_same_one(name, steps):
    """Exponential noise levels: the last ones are closer than timesteps, which are whole there."""
    pipe = make_pixart()
    pipe.scheduler = getattr(diffusers, name)(use_exponential_sigmas=True)
    with accel.accelerate(pipe, accel.ForecastConfig()) as handle:
        latents = FAMILIES["pixart"].latents(pipe, steps=steps)
        assert len(set(pipe.scheduler.timesteps.tolist())) < steps
        assert handle.stats.share < 0.5
    assert latents.isfinite().all()
