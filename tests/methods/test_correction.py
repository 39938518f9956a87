"""What forecasts missed is made up for: a sampler that steps along a line ends where the plain one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, flux_call, freeze, log_snr, make_flux

import accel
from accel.errors import AccelWarning, ConfigError
from accel.methods.forecasting.correction import Correction

Config = accel.ForecastConfig
CYCLE = {"cycle": (0, 0, 1), "dense_steps_first": 2, "dense_steps_last": 1, "order": 0}


def latents(pipe, config=None, **options):
    if config is None:
        return pipe(**flux_call(**options)).images
    with accel.accelerate(pipe, config):
        return pipe(**flux_call(**options)).images


def along_a_line(pipe):
    """Predictions that change linearly with the log signal-to-noise ratio, whatever the sample is."""
    g = torch.Generator().manual_seed(3)
    start, slope = torch.randn(1, 96, 16, generator=g), torch.randn(1, 96, 16, generator=g)

    def straight(module, args, output):
        return start + times[noise[-1]] * slope

    # On the last layer: hooks on the transformer itself also see, and would replace, what is forecast.
    noise: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: noise.append(round(kwargs["timestep"][0].item(), 3)), with_kwargs=True
    )
    pipe.transformer.proj_out.register_forward_hook(straight)
    pipe.scheduler.set_timesteps(9, sigmas=[1 - i / 9 for i in range(9)])
    levels = [round(level, 3) for level in pipe.scheduler.sigmas[:-1].tolist()]
    times = dict(zip(levels, log_snr(pipe.scheduler), strict=True))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_changes_along_a_line_is_made_up_for_to_the_end(guidance):
    pipe = make_flux()
    along_a_line(pipe)
    plain = latents(pipe, steps=9, guidance=guidance)
    held = latents(pipe, Config(**CYCLE), steps=9, guidance=guidance)
    corrected = latents(pipe, Config(**CYCLE, correct=True), steps=9, guidance=guidance)
    torch.testing.assert_close(corrected, plain, rtol=1e-4, atol=1e-4)
    assert (held - plain).abs().max() > 0.05  # the control


def test_the_debt_is_what_an_integral_of_the_line_says():
    """Against numpy: steps of irregular lengths at irregular times, two calls."""
    g = torch.Generator().manual_seed(0)
    old, new = ([torch.randn(3, 4, generator=g) for _ in range(2)] for _ in range(2))
    forecasts = [[torch.randn(3, 4, generator=g) for _ in range(2)] for _ in range(3)]
    times, lengths = [0.0, 0.7, 1.9, 2.4, 4.0], [-0.1, -0.3, -0.05, -0.2, -0.25]
    correction = Correction()
    assert not correction.due
    for i in (1, 2, 3):
        correction.add(forecasts[i - 1], old, times[i], lengths[i])
    assert correction.due
    correction.prepare(times[4], lengths[4])
    for call in range(2):
        a, b = old[call].double().numpy(), new[call].double().numpy()
        missed = [
            lengths[i] * (a + (b - a) * times[i] / times[4] - forecasts[i - 1][call].double().numpy())
            for i in (1, 2, 3)
        ]
        expected = b + np.sum(missed, axis=0) / lengths[4]
        got = correction.apply(call, new[call], old[call])
        torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_a_step_of_no_length_pays_nothing():
    """Noise levels that end at 0: the last step moves nothing, however its prediction comes about."""
    pipe, options = make_flux(), {"steps": 8, "sigmas": np.linspace(1, 0, 8)}
    ends = {"dense_steps_first": 2, "dense_steps_last": 0, "correct": True}
    computed = latents(pipe, Config(cycle=(0, 1), **ends), **options)
    forecast = latents(pipe, Config(cycle=(0, 1, 0, 1, 0, 0), **ends), **options)
    assert torch.equal(computed, forecast)
    assert computed.isfinite().all()


def test_a_debt_of_no_age_is_paid_as_it_is():
    correction, v, f, new = Correction(), torch.zeros(3), torch.ones(3), torch.full((3,), 5.0)
    correction.add([f], [v], age=0.0, length=-0.1)
    correction.prepare(age=0.0, length=-0.2)
    torch.testing.assert_close(correction.apply(0, new, v), new - 0.5)


def test_a_frozen_denoiser_is_reproduced_exactly():
    pipe = make_flux()
    freeze(pipe)
    plain = latents(pipe)
    for order in (0, 1, 2):
        assert torch.equal(latents(pipe, Config(**{**CYCLE, "order": order}, correct=True)), plain)


def test_runs_leave_nothing_behind():
    pipe, config = make_flux(), Config(**CYCLE, correct=True)
    first = latents(pipe, config, steps=8, guidance=3.0)
    with accel.accelerate(pipe, config):

        def fail(pipe, step, timestep, kwargs):
            if step == 3:  # a debt is open
                raise RuntimeError("stop")
            return kwargs

        with pytest.raises(RuntimeError, match="stop"):
            pipe(**flux_call(steps=8, guidance=3.0, callback_on_step_end=fail))
        assert torch.equal(pipe(**flux_call(steps=8, guidance=3.0)).images, first)


def test_forecasts_continue_what_the_model_made_not_what_the_sampler_got():
    """The error that is measured, and the next forecast, are of the model's own predictions."""
    pipe = make_flux()
    made = []
    pipe.transformer.proj_out.register_forward_hook(lambda m, args, output: made.append(output))
    with accel.accelerate(pipe, Config(**CYCLE, correct=True)):
        seen = []
        (run,) = pipe.scheduler.step.accel_clock.listeners

        def look(pipe, step, timestep, kwargs):
            if step < 5:  # after the last, all is dropped
                seen.append(run.method.state.history.values[0][0].clone())
            return kwargs

        pipe(**flux_call(steps=6, callback_on_step_end=look))
    # Steps 0, 1, 4, 5 are computed; a callback runs after the step was accounted for.
    assert len(made) == 4
    for step, value in ((0, made[0]), (1, made[1]), (3, made[1]), (4, made[2])):
        assert torch.equal(seen[step], value)


def test_a_scheduler_of_unknown_steps_is_warned_of():
    family = FAMILIES["pixart"]
    pipe = family.make()
    plain = family.latents(pipe, steps=8)
    with accel.accelerate(pipe, Config(**CYCLE)):
        expected = family.latents(pipe, steps=8)
    with (
        accel.accelerate(pipe, Config(**CYCLE, correct=True)),
        pytest.warns(AccelWarning, match=r"correct=True has no effect.*DDIMScheduler"),
    ):
        assert torch.equal(family.latents(pipe, steps=8), expected)
    assert not torch.equal(expected, plain)
    # What a preset says, nobody asked for by name: no warning (they are errors here), but the stats tell.
    with accel.accelerate(pipe, Config(**CYCLE, correct="auto")) as handle:
        assert torch.equal(family.latents(pipe, steps=8), expected)
    assert handle.stats.as_dict()["notes"] == [
        "correct=auto has no effect: how far DDIMScheduler steps along a prediction is not known (it is for Euler "
        "steps without noise)"
    ]
    assert "  note            correct=auto has no effect" in str(handle.stats)


def test_auto_corrects_where_it_can():
    pipe = make_flux()
    with accel.accelerate(pipe, Config(**CYCLE, correct="auto")) as handle:
        corrected = latents(pipe, steps=8)
    assert handle.stats.notes == []
    assert torch.equal(corrected, latents(pipe, Config(**CYCLE, correct=True), steps=8))
    assert not torch.equal(corrected, latents(pipe, Config(**CYCLE), steps=8))
    guidance = {"schedule": replace(Config(**CYCLE).schedule, guidance_every=2)}
    with accel.accelerate(pipe, Config(**guidance, correct="auto")) as handle:
        one_branch = latents(pipe, steps=8, guidance=3.0)
    assert "guidance_every=2 leaves out branches" in handle.stats.notes[0]
    assert torch.equal(one_branch, latents(pipe, Config(**guidance), steps=8, guidance=3.0))
    assert accel.configs.load({"method": "forecast", "correct": "auto"}).correct == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correct": 1}, "correct must be true, false or 'auto'"),
        ({"correct": "on"}, "correct must be true, false or 'auto'"),
        ({"schedule": {"guidance_every": 2}}, "schedule.guidance_every=2 must be 1"),
    ],
)
def test_settings_that_do_not_go(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**{"correct": True, **settings})


def test_compiled_equals_eager():
    family = FAMILIES["flux"]
    pipe, config = family.make(**family.shallow), Config(**CYCLE, correct=True)
    expected = latents(pipe, config, steps=9, guidance=3.0)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    with accel.accelerate(pipe, config):
        got = pipe(**flux_call(steps=9, guidance=3.0)).images
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch._dynamo.utils.counters.clear()
        pipe(**flux_call(steps=12, guidance=3.0))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
