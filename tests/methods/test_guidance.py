"""The unconditional branch of guidance on fewer steps: exact where it must be, and counted."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, freeze, log_snr, make_flux, make_pixart

import accel
from accel.core.schedule import Schedule
from accel.errors import ConfigError, UnsupportedError

ALONE = accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2))
WITH_FORECASTS = accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), guidance_every=2))
WITH_PRUNING = accel.TokenPruningConfig(budget=0.3, schedule=accel.Schedule(guidance_every=2))
GUIDED = {"guidance": 3.0, "batch": 2, "steps": 9}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def configs_of(family):
    """What each family can do: token plans hold for the whole batch, so not with both branches in one."""
    return [ALONE, WITH_FORECASTS, *([WITH_PRUNING] if family is FAMILIES["flux"] else [])]


def test_schedule_counts_the_steps_that_compute():
    def guided(cycle, every):
        phases = Schedule(cycle, dense_first=1, dense_last=1, guidance_every=every).phases(10)
        return [None if p.budget == 0 else p.guided for p in phases]

    t, f = True, False
    assert guided((1.0,), 2) == [t, f, t, f, t, f, t, f, t, t]
    assert guided((0.0, 0.25, 0.0, 1.0), 2) == [t, None, f, None, t, None, f, None, t, t]
    assert guided((0.0, 1.0), 3) == [t, None, f, None, f, None, t, None, f, t]
    assert guided((0.5, 1.0), 1) == [t] * 10


def test_branches_are_skipped_and_counted(family):
    pipe = family.make()
    batches = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: batches.append(len(kwargs.get("hidden_states", args[0] if args else None))),
        with_kwargs=True,
    )
    with accel.accelerate(pipe, ALONE) as handle:
        family.latents(pipe, **GUIDED)
    steps = handle.stats.steps
    skipped = [False, False, True, False, True, False, True, False, False]
    assert [s.branch_skipped for s in steps] == skipped
    assert [s.computed * 2 if s.branch_skipped else s.computed for s in steps] == [s.total for s in steps]
    assert [s.forecast + s.computed for s in steps] == [s.total for s in steps]
    if family is FAMILIES["flux"]:
        assert batches == [2] * (2 * 6 + 3)
        assert [s.calls for s in steps] == [1 if s else 2 for s in skipped]
    else:
        assert batches == [2 if s else 4 for s in skipped]
    assert handle.stats.branches_skipped == 3
    assert handle.stats.share == pytest.approx(7.5 / 9)
    assert "one branch only at 3 of 9 steps" in str(handle.stats)


def test_a_frozen_denoiser_is_reproduced_exactly(family):
    pipe = family.make()
    freeze_halves(pipe)
    plain = family.latents(pipe, **GUIDED)
    for config in configs_of(family):
        with accel.accelerate(pipe, config) as handle:
            got = family.latents(pipe, **GUIDED)
        assert handle.stats.branches_skipped
        # One branch and both are batches of two sizes, for which matrix products may round differently.
        assert relative(got, plain) < 1e-5


def freeze_halves(pipe):
    """`freeze`, for a batch that may be the second half of the first step's."""
    freeze(pipe)

    def cut(module, args, kwargs):
        batch = len(kwargs["encoder_hidden_states"])
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][-batch:]}

    pipe.transformer.register_forward_pre_hook(cut, with_kwargs=True)
    if isinstance(pipe, type(make_pixart())):
        pipe.transformer.register_forward_pre_hook(
            lambda m, a, k: (a, {**k, "timestep": k["timestep"][-len(k["hidden_states"]) :]}),
            with_kwargs=True,
        )


def bend(pipe, difference):
    """The unconditional prediction is the conditional one minus `difference(log SNR)`, for an oracle."""
    negative = FAMILIES["flux"].call(batch=2, guidance=3.0)["negative_prompt_embeds"]
    last = []

    def replace(module, args, kwargs, output):
        now = float(kwargs["timestep"].flatten()[0]) * (1000 if isinstance(pipe, type(make_flux())) else 1)
        step = (pipe.scheduler.timesteps - now).abs().argmin()
        d = difference(log_snr(pipe.scheduler)[step])
        if isinstance(pipe, type(make_pixart())):
            if len(output[0]) == 4:
                cond = output[0][2:]
                return (torch.cat([cond - d, cond]),)
            return None
        if torch.equal(kwargs["encoder_hidden_states"], negative):
            return (last.pop() - d,)
        last[:] = [output[0]]
        return None

    return pipe.transformer.register_forward_hook(replace, with_kwargs=True)


@pytest.mark.parametrize("order", [0, 1])
def test_a_difference_linear_in_time_is_predicted_exactly(family, order):
    pipe = family.make()
    bend(pipe, lambda time: 0.3 - 0.1 * time)
    plain = family.latents(pipe, **GUIDED)
    with accel.accelerate(
        pipe,
        accel.ForecastConfig(
            schedule=accel.Schedule(cycle=(1,), guidance_every=3, dense_first=2), order=order
        ),
    ):
        error = relative(family.latents(pipe, **GUIDED), plain)
    assert error < 1e-5 if order else error > 1e-3


def test_a_single_step_before_the_first_forecast(family):
    """No slope is known then: the difference is held, and no step counts twice (which divided by zero)."""
    pipe = family.make()
    bend(pipe, lambda time: 0.3)
    plain = family.latents(pipe, **GUIDED)
    with accel.accelerate(
        pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2, dense_first=1))
    ):
        assert relative(family.latents(pipe, **GUIDED), plain) < 1e-5


def test_it_follows_an_independent_loop():
    """The same policy written out: differences recorded, continued along the log SNR by hand."""
    pipe, family = make_flux(), FAMILIES["flux"]
    outputs, both, skipped = [], [], {2, 4, 6}

    def replay(module, args, kwargs, output):
        step, call = divmod(len(outputs), 2)
        value, times = output[0], log_snr(pipe.scheduler)
        if call == 1 and step in skipped:
            (a, da), (b, db) = both[-2:]
            slope = (db - da) / (times[b] - times[a])
            value = outputs[-1] - (db + slope * (times[step] - times[b]))
        elif call == 1:
            both.append((step, outputs[-1] - value))
        outputs.append(value)
        return (value,)

    hook = pipe.transformer.register_forward_hook(replay, with_kwargs=True)
    expected = family.latents(pipe, **GUIDED)
    hook.remove()
    plain = family.latents(pipe, **GUIDED)
    with accel.accelerate(pipe, ALONE):
        got = family.latents(pipe, **GUIDED)
    assert relative(got, expected) < 1e-5
    assert relative(got, plain) > 1e-3


def test_removal_restores_everything_even_in_the_middle(family):
    pipe = family.make()
    plain, before = family.latents(pipe, **GUIDED), set(vars(pipe.transformer))
    for config in configs_of(family):
        with accel.accelerate(pipe, config) as handle:
            changed = family.latents(pipe, **GUIDED)
            assert torch.equal(family.latents(pipe, **GUIDED), changed)
            assert not torch.equal(changed, plain)

            def remove(pipe, step, timestep, kwargs):
                if step == 1:
                    handle.remove()
                return kwargs

            if family is FAMILIES["flux"]:
                family.latents(pipe, **GUIDED, callback_on_step_end=remove)
        assert set(vars(pipe.transformer)) == before
        assert torch.equal(family.latents(pipe, **GUIDED), plain)


def test_an_exception_leaves_the_next_run_alone():
    pipe, family = make_flux(), FAMILIES["flux"]
    with accel.accelerate(pipe, ALONE):
        expected = family.latents(pipe, **GUIDED)
        calls = []

        def fail(module, args, output):
            calls.append(1)
            if len(calls) == 5:  # the only call of the first step with one branch
                raise RuntimeError("in the middle")

        bomb = pipe.transformer.transformer_blocks[0].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            family.latents(pipe, **GUIDED)
        bomb.remove()
        assert not pipe.scheduler.step.accel_clock.running
        assert torch.equal(family.latents(pipe, **GUIDED), expected)
        other = {**GUIDED, "height": 48}
        got = family.latents(pipe, **other)
    pipe = make_flux()
    with accel.accelerate(pipe, ALONE):
        assert torch.equal(family.latents(pipe, **other), got)


def test_without_guidance_it_says_that_there_is_nothing_to_save(family):
    pipe = family.make()
    plain = family.latents(pipe)
    with accel.accelerate(pipe, ALONE) as handle:
        with pytest.warns(accel.AccelWarning, match="guidance_every=2 has nothing to save"):
            assert torch.equal(family.latents(pipe), plain)
        assert (handle.stats.share, handle.stats.branches_skipped) == (1.0, 0)


def test_composes_with_merging():
    pipe, family = make_flux(), FAMILIES["flux"]
    merging = accel.TokenMergingConfig(ratio=0.5, schedule=accel.Schedule(refresh_every=2))
    with accel.accelerate(pipe, merging) as handle:
        merged = family.latents(pipe, **GUIDED)
        with accel.accelerate(pipe, ALONE) as second:
            both = family.latents(pipe, **GUIDED)
            assert torch.equal(family.latents(pipe, **GUIDED), both)
            flags = [s.branch_skipped for s in second.stats.steps]
            assert [s.branch_skipped for s in handle.stats.steps] == flags
        assert torch.equal(family.latents(pipe, **GUIDED), merged)
    assert not torch.equal(both, merged)


def test_one_schedule_has_partial_steps_forecasts_and_skipped_branches():
    pipe, family = make_flux(), FAMILIES["flux"]
    with accel.accelerate(pipe, WITH_PRUNING) as handle:
        family.latents(pipe, **{**GUIDED, "steps": 11})
    steps = handle.stats.steps
    # dense dense | 0 .3 0 1 | 0 .3 0 1 | dense; the unconditional branch is computed at the dense ones
    assert [s.branch_skipped for s in steps] == [i in (3, 7) for i in range(11)]
    assert [s.computed for s in steps][3] == 5 * 29 // 2
    assert [s.calls for s in steps] == [1 if s.branch_skipped else 2 for s in steps]


@pytest.mark.parametrize("cycle", [(1, 0.4), (0.4,), (0.4, 1, 0)], ids=str)
@pytest.mark.parametrize("every", [2, 3])
def test_kept_keys_and_values_of_both_branches_are_there(cycle, every):
    """Whichever steps compute the unconditional branch, a partial one finds its keys and values."""
    pipe, family = make_flux(), FAMILIES["flux"]
    freeze(pipe)
    plain = family.latents(pipe, **{**GUIDED, "steps": 12})
    config = accel.TokenPruningConfig(schedule=accel.Schedule(cycle=cycle, guidance_every=every))
    with accel.accelerate(pipe, config):
        assert relative(family.latents(pipe, **{**GUIDED, "steps": 12}), plain) < 1e-5


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_equals_eager(family, how):
    pipe = family.make(**family.shallow)
    options = {"guidance": 3.0, "steps": 8}
    with accel.accelerate(pipe, ALONE):
        expected = family.latents(pipe, **options)
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    with accel.accelerate(pipe, ALONE):
        assert relative(family.latents(pipe, **options), expected) < 1e-5
        torch._dynamo.utils.counters.clear()
        family.latents(pipe, **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


# Bad input


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_settings_out_of_range(value):
    with pytest.raises(ConfigError, match="guidance_every must be a whole number >= 1"):
        accel.Schedule(guidance_every=value)


@pytest.mark.parametrize("cls", [accel.ForecastConfig, accel.TokenPruningConfig])
def test_no_step_whose_branches_it_could_choose(cls):
    with pytest.raises(ConfigError, match="guidance_every=2 has no effect"):
        cls(schedule=accel.Schedule((0,), guidance_every=2))
    cls(schedule=accel.Schedule((0,), late_cycle=(0, 1), guidance_every=2))


def test_both_branches_in_one_batch_and_token_plans():
    pipe, family = make_pixart(), FAMILIES["pixart"]
    with (
        accel.accelerate(pipe, WITH_PRUNING),
        pytest.raises(UnsupportedError, match=r"in one batch.*guidance_every=1"),
    ):
        family.latents(pipe, **GUIDED)
    with (
        accel.accelerate(pipe, ALONE),
        accel.accelerate(pipe, accel.TokenMergingConfig(ratio=0.5)),
        pytest.raises(UnsupportedError, match="in one batch"),
    ):
        family.latents(pipe, **GUIDED)


def test_two_methods_that_forecast():
    pipe = make_flux()
    with (
        accel.accelerate(pipe, ALONE),
        pytest.raises(ConfigError, match=r"one schedule.*guidance_every"),
    ):
        accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5,)))
