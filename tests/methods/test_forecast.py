"""Whole-step forecasts: the polynomial oracle, then the method on both families."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, freeze, log_snr, make_flux
from diffusers import FlowMatchHeunDiscreteScheduler

import accel
from accel import configs
from accel.core.history import History
from accel.core.schedule import Schedule
from accel.errors import ConfigError, UnsupportedError
from accel.kernels.forecast import forecast

Config = accel.ForecastConfig
CYCLE = {"cycle": (0, 1), "dense_steps_first": 2, "dense_steps_last": 1}
IRREGULAR = (1000.0, 947.0, 803.0, 551.0, 122.0)


def polynomial(degree, tokens=5, channels=3):
    """A random polynomial in time per token and channel, evaluated in float64."""
    g = torch.Generator().manual_seed(degree)
    coefficients = torch.randn(degree + 1, 1, tokens, channels, generator=g, dtype=torch.float64)
    return lambda t: sum(c * (t / 1000) ** k for k, c in enumerate(coefficients)).float()


def stamps_of(times):
    return [torch.tensor(t) for t in times]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_up_to_the_order_are_exact(order):
    for degree in range(order + 1):
        f, times = polynomial(degree), IRREGULAR[order::-1]
        got = forecast([f(t) for t in times], stamps_of(times), 122.0)
        torch.testing.assert_close(got, f(122.0), rtol=0, atol=2e-4)
    f, times = polynomial(order + 1), IRREGULAR[order::-1]
    assert (forecast([f(t) for t in times], stamps_of(times), 122.0) - f(122.0)).abs().max() > 1e-2


def test_a_damped_trend_is_part_of_the_way_to_the_undamped_one():
    f, times = polynomial(2), IRREGULAR[1::-1]
    made = {}
    for trend in (0.25, 1.0):
        history = History(1, trend=trend)
        history.start([f(times[1])], times[1])
        history.add([f(times[0])], times[0])
        (made[trend],) = history.forecasts(300.0)
    assert torch.allclose(made[0.25] - f(times[0]), 0.25 * (made[1.0] - f(times[0])))
    assert not torch.allclose(made[0.25], made[1.0])


def test_wrong_time_stamps_are_noticed():
    # The negative control: step numbers in place of irregular times.
    f, times = polynomial(1), (551.0, 947.0)
    got = forecast([f(t) for t in times], stamps_of([1.0, 0.0]), 2.0)
    assert (got - f(122.0)).abs().max() > 5e-2


@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_token_has_its_own_time_stamps(order):
    """Tokens computed at different random steps: each forecast is exact from its own history, none before it
    has enough of one."""
    f, g = polynomial(order), torch.Generator().manual_seed(1)
    history = History(order, spread=lambda s: s[..., None])
    history.start([f(IRREGULAR[0])], IRREGULAR[0], (1, 5))
    count = torch.ones(1, 5)
    for t in IRREGULAR[1:-1]:
        computed = torch.rand(1, 5, generator=g) < 0.6
        junk = torch.full((1, 5, 3), math.inf)  # must never be looked at
        history.add([torch.where(computed[..., None], f(t), junk)], t, computed)
        count += computed
    (forecast,) = history.forecasts(IRREGULAR[-1])
    enough = (count > order)[0]
    assert enough.any()
    torch.testing.assert_close(forecast[:, enough], f(IRREGULAR[-1])[:, enough], rtol=0, atol=1e-3)
    assert forecast.isfinite().all()


def test_equal_values_give_exactly_that_value():
    v = torch.randn(2, 7, 4)
    assert torch.equal(forecast([v, v, v], stamps_of([551.0, 803.0, 947.0]), 122.0), v)


def test_steps_are_skipped_and_counted(family):
    pipe = family.make()
    seen = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda m, args: seen.append(1))
    with accel.accelerate(pipe, Config(**CYCLE)) as handle:
        family.latents(pipe, steps=7, guidance=3.0)
        steps, calls = handle.stats.steps, 2 if family is FAMILIES["flux"] else 1
    assert [s.computed > 0 for s in steps] == [True, True, False, True, False, True, True]
    assert [s.forecast for s in steps] == [s.total - s.computed for s in steps]
    assert [s.oldest_age for s in steps] == [0, 0, 1, 0, 1, 0, 0]
    assert len(seen) == 5 * calls
    assert {s.calls for s in steps} == {calls}
    assert handle.stats.oldest_age == 1
    assert "oldest token 1 steps" in str(handle.stats)


def test_a_late_cycle(family):
    pipe = family.make()
    config = Config(schedule=Schedule(cycle=(0, 1), late_cycle=(0, 0, 1), dense_first=2))
    with accel.accelerate(pipe, config) as handle:
        family.latents(pipe, steps=12)
    assert [s.computed > 0 for s in handle.stats.steps] == [c == "1" for c in "110101001001"]


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({"schedule": {"growth": 0.6, "tail": 0.4}}, [0, 1, 2, 3, 5, 8, 11]),
        ({"schedule": {"steps": [0, 2, 3, 7], "total": 12}}, [0, 2, 3, 7]),
    ],
)
def test_growing_gaps_and_listed_steps(family, settings, computed):
    pipe = family.make()
    with accel.accelerate(pipe, Config(**settings)) as handle:
        family.latents(pipe, steps=12)
    assert [i for i, s in enumerate(handle.stats.steps) if s.computed] == computed


def test_presets_compute_what_their_page_says_and_each_less_than_the_one_before():
    """fast's gaps are measured at 24, 28 and 50 steps (docs/measured/presets.md); at 20, the built-in model's number, some
    rules near by compute the very steps of balanced."""

    def computed(name, total):
        phases = configs.load(name).full_schedule.phases(total)
        return [step for step, phase in enumerate(phases) if phase.budget]

    head = [0, 1, 2, 3, 4, 5, 7, 10, 14]
    fast = {20: [18], 24: [19, 22], 28: [19, 24, 27], 50: [19, 26, 36, 44, 48]}
    assert {total: computed("fast", total) for total in fast} == {n: head + tail for n, tail in fast.items()}
    for total in range(20, 51):
        counts = [len(computed(name, total)) for name in ("draft", "fast", "balanced", "quality")]
        assert counts == sorted(counts), total
        assert total in (21, 26) or len(set(counts)) == 4, total


def test_listed_steps_are_refused_for_another_number_of_steps():
    pipe, family = make_flux(), FAMILIES["flux"]
    plain = family.latents(pipe, steps=7)
    with (
        accel.accelerate(pipe, Config(schedule=Schedule(steps=(0, 2, 3), total=6))),
        pytest.raises(ConfigError, match="of 6 steps, this one has 7"),
    ):
        family.latents(pipe, steps=7)
    assert torch.equal(family.latents(pipe, steps=7), plain)


def test_memory_stays_flat(family):
    pipe = family.make()
    sizes = []
    for blocks_more in (0, 3):
        pipe = family.make(
            **({"single": 3 + blocks_more} if family is FAMILIES["flux"] else {"blocks": 3 + blocks_more})
        )
        with accel.accelerate(pipe, Config(order=2)) as handle:
            family.latents(pipe, steps=8)
            sizes.append(handle.stats.cache_bytes)
    assert sizes[0] == sizes[1]
    output = 96 * 16 if family is FAMILIES["flux"] else 8 * 16 * 24
    assert sizes[0] == 4 * (3 * output + 3)


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "batch": 2}], ids=["plain", "guided"])
def test_forecast_follows_an_independent_loop(family, options):
    """The same policy written out: recorded predictions, numpy's polynomial fit, the pipeline's own loop."""
    import numpy as np

    pipe = family.make()
    recorded, step, calls = [], [0], 2 if family is FAMILIES["flux"] and options else 1
    skipped = {2, 4}

    def replay(module, args, kwargs, output):
        now, call = len(recorded) // calls, len(recorded) % calls
        value = output[0]
        if now in skipped:
            times = log_snr(pipe.scheduler)
            (i, a), (j, b) = [(i, recorded[i * calls + call]) for i in range(now) if i not in skipped][-2:]
            fit = np.polyfit([times[i], times[j]], np.stack([a.double().flatten(), b.double().flatten()]), 1)
            value = torch.from_numpy(np.polyval(fit, times[now])).view_as(value).float()
        recorded.append(value)
        return (value,)

    bent = pipe.transformer.register_forward_hook(replay, with_kwargs=True)
    expected = family.latents(pipe, steps=6, **options)
    bent.remove()
    plain = family.latents(pipe, steps=6, **options)
    with accel.accelerate(pipe, Config(**CYCLE)):
        got = family.latents(pipe, steps=6, **options)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert (got - plain).norm() > 1e-3 * plain.norm()
    assert step == [0]


def test_a_frozen_denoiser_is_reproduced_exactly(family):
    pipe = family.make()
    freeze(pipe)
    plain = family.latents(pipe)
    for order in (0, 1, 2):
        with accel.accelerate(pipe, Config(**CYCLE, order=order)):
            assert torch.equal(family.latents(pipe), plain)


def test_removal_restores_everything_even_in_the_middle(family):
    pipe = family.make()
    plain = family.latents(pipe)
    before = set(vars(pipe.transformer))
    with accel.accelerate(pipe, Config(**CYCLE)) as handle:
        changed = family.latents(pipe)
        assert "forward" not in vars(pipe.transformer)
        again = family.latents(pipe)
        assert torch.equal(again, changed)

        def remove(pipe, step, timestep, kwargs):
            if step == 1:  # the next step is to be forecast: the gate is in place
                assert "_compiled_call_impl" in vars(pipe.transformer)
                handle.remove()
            return kwargs

        if family is FAMILIES["flux"]:
            family.latents(pipe, callback_on_step_end=remove)
    assert set(vars(pipe.transformer)) == before
    assert torch.equal(family.latents(pipe), plain)


def test_exception_between_steps_leaves_the_next_run_alone():
    pipe, family = make_flux(), FAMILIES["flux"]

    def fail(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with accel.accelerate(pipe, Config(**CYCLE)):
        expected = family.latents(pipe)
        with pytest.raises(KeyboardInterrupt):
            family.latents(pipe, callback_on_step_end=fail)
        assert torch.equal(family.latents(pipe), expected)
        assert torch.equal(
            family.latents(pipe, batch=2, height=48, generator=torch.Generator().manual_seed(5)),
            fresh(Config(**CYCLE), batch=2, height=48),
        )


def fresh(config, **options):
    pipe = make_flux()
    with accel.accelerate(pipe, config):
        return FAMILIES["flux"].latents(pipe, **options)


def test_hooks_of_others_survive_a_bypass():
    """accelerate's offloading replaces `forward` on the instance; a forecast step must put it back."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe, family = make_flux(), FAMILIES["flux"]
    with accel.accelerate(pipe, Config(**CYCLE)):
        expected = family.latents(pipe)
        hook = Counting()
        add_hook_to_module(pipe.transformer, hook)
        assert torch.equal(family.latents(pipe), expected)
        assert hook.calls == 4
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(family.latents(pipe), expected)


def test_tolerance_decides_what_is_forecast(family):
    pipe = family.make()
    shares = []
    for tolerance in (1e-9, 1e9):
        with accel.accelerate(pipe, Config(**CYCLE, tolerance=tolerance)) as handle:
            family.latents(pipe, steps=9)
            shares.append(handle.stats.share)
    with accel.accelerate(pipe, Config(**CYCLE)) as handle:
        family.latents(pipe, steps=9)
    assert shares == [1.0, handle.stats.share]


def test_an_error_that_is_not_a_number_is_too_far():
    pipe, calls = make_flux(), []

    def spoil(
        module, args, output
    ):  # step 1: the error that is measured there is NaN, and step 2 is computed
        calls.append(1)
        return output * (torch.nan if len(calls) == 2 else 1)

    pipe.transformer.proj_out.register_forward_hook(spoil)
    with accel.accelerate(pipe, Config(**CYCLE, tolerance=1e9)) as handle:
        FAMILIES["flux"].latents(pipe, steps=4)
    assert [s.computed > 0 for s in handle.stats.steps] == [True, True, True, True]


def test_composes_with_merging(family):
    pipe = family.make()
    merging = accel.TokenMergingConfig(ratio=0.5, schedule=accel.Schedule(refresh_every=2))
    with accel.accelerate(pipe, merging) as handle:
        merged = family.latents(pipe, steps=8)
        computed = [s.computed for s in handle.stats.steps]
        with accel.accelerate(pipe, Config(**CYCLE)):
            both = family.latents(pipe, steps=8)
            assert torch.equal(family.latents(pipe, steps=8), both)
            # Merging knows that it had nothing to do at the steps that were forecast.
            kept = [c * keep for c, keep in zip(computed, (1, 1, 0, 1, 0, 1, 0, 1), strict=True)]
            assert [s.computed for s in handle.stats.steps] == kept
        assert torch.equal(family.latents(pipe, steps=8), merged)
    assert not torch.equal(both, merged)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_equals_eager(family, how):
    pipe = family.make(**family.shallow)
    with accel.accelerate(pipe, Config(**CYCLE)) as handle:
        expected = family.latents(pipe, guidance=3.0)
        if how == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
            handle.remove()  # the wrapper is what the pipeline calls now
            handle = accel.accelerate(pipe, Config(**CYCLE))
        else:
            pipe.transformer.compile(backend="eager")
        got = family.latents(pipe, guidance=3.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch._dynamo.utils.counters.clear()
        family.latents(pipe, guidance=3.0, steps=9)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        handle.remove()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 3}, "order must be 0, 1 or 2"),
        ({"cycle": ()}, "schedule.cycle must be a list of"),
        ({"cycle": (0.5,)}, "schedule.cycle must be a list of"),
        ({"cycle": (1, 1)}, "forecasts nothing"),
        ({"schedule": {"late_cycle": (0.5,)}}, "late_cycle must be a list of 1"),
        ({"trend": 0}, r"trend must be in \(0, 1\]"),
        ({"trend": 0.5, "order": 0}, "trend=0.5 has no effect: order=0"),
        ({"schedule": {"late_from": 1}}, r"late_from must be in \(0, 1\)"),
        ({"cycle": (True, False)}, "schedule.cycle must be a list of"),
        ({"schedule": {"late_from": 0.3}}, "late_from=0.3 has no effect: no late_cycle is given"),
        (
            {"schedule": {"growth": 0.4, "cycle": (0, 1)}},
            "one of cycle, growth and steps: got cycle and growth",
        ),
        ({"schedule": {"growth": 0.4, "late_cycle": (0, 1)}}, "late_cycle=.* has no effect: growth says"),
        ({"schedule": {"growth": 0.4, "dense_last": 0}}, "schedule.dense_last=0 has no effect: growth says"),
        ({"schedule": {"growth": 0.4, "steps": (0, 1)}}, "got growth and steps"),
        (
            {"schedule": {"steps": (0, 1), "dense_first": 4}},
            "schedule.dense_first=4 has no effect: steps says",
        ),
        ({"schedule": {"tail": 0.3}}, "tail=0.3 has no effect: no growth is given"),
        ({"schedule": {"total": 9}}, "total=9 has no effect: no steps is given"),
        ({"schedule": {"growth": True}}, "growth must be a number > 0, got True"),
        ({"schedule": {"steps": []}}, "steps must be whole numbers that rise from 0"),
        ({"schedule": {"steps": 3}}, "steps must be whole numbers that rise from 0"),
        (
            {"schedule": {"cycle": (1,), "guidance_every": 2}, "tolerance": 0.1},
            r"tolerance=0.1 has no effect: schedule.cycle=\(1,\)",
        ),
        ({"tolerance": 0}, "tolerance must be > 0"),
        ({"dense_steps_first": 0}, "schedule.dense_first must be a whole number >= 1"),
        ({"dense_steps_last": -1}, "schedule.dense_last must be a whole number >= 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_a_scheduler_that_visits_a_time_twice_is_refused():
    pipe = make_flux()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with (
        accel.accelerate(pipe, Config()),
        pytest.raises(UnsupportedError, match=r"FlowMatchHeun.*same timestep"),
    ):
        pipe.scheduler.set_timesteps(6)
