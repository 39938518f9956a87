"""The log signal-to-noise ratio of every kind of scheduler, against their own definitions."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import pytest
import torch

from accel.core.noise_levels import log_snr, step_lengths

# diffusers' schedulers hand torch tensors to numpy 2 the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def made(name, **config):
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DDPMScheduler", {}),
        ("LCMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_variance_preserving_schedulers(name, config):
    """Half of log(alpha / (1 - alpha)), whether they keep sigmas or alphas."""
    scheduler = made(name, **config)
    got, kept = log_snr(scheduler), scheduler.alphas_cumprod[scheduler.timesteps.round().long()].double()
    expected = (kept / (1 - kept)).log() / 2
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=0, atol=0.02)
    assert sorted(got) == list(got)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_flow_matching_schedulers(name, config):
    scheduler = made(name, **config)
    got = torch.tensor(log_snr(scheduler), dtype=torch.float64)
    noise = scheduler.timesteps.double() / 1000
    inner = noise < 0.99  # pure noise is infinitely far away
    torch.testing.assert_close(got[inner], (1 / noise - 1).log()[inner], rtol=0, atol=0.03)
    assert -12 < got[0] < -4
    assert (got.diff() > 0).all()


def test_pure_noise_and_none_are_finite_and_apart():
    scheduler = made("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.999999, 0.5, 0.000001, 0.0])
    got = log_snr(scheduler)
    assert all(a < b for a, b in pairwise(got))
    assert -12 < got[0] < got[-1] < 12


def test_a_scheduler_of_its_own_kind_gives_its_timesteps():
    assert log_snr(made("IPNDMScheduler")) == tuple(-t for t in made("IPNDMScheduler").timesteps.tolist())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ],
)
def test_step_lengths_are_what_the_scheduler_steps(name, config):
    scheduler = made(name, **config)
    lengths, g = step_lengths(scheduler), torch.Generator().manual_seed(0)
    assert len(lengths) == 10
    sample = torch.randn(1, 3, 4, generator=g, dtype=torch.float64)
    for length, timestep in zip(lengths, scheduler.timesteps, strict=True):
        prediction = torch.randn(1, 3, 4, generator=g, dtype=torch.float64)
        after = scheduler.step(prediction, timestep, sample).prev_sample
        torch.testing.assert_close(after, sample + length * prediction, rtol=1e-4, atol=1e-4)
        sample = after


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DDIMScheduler", {}),
    ],
)
def test_other_steps_have_no_length(name, config):
    assert step_lengths(made(name, **config)) is None
