"""Unmerging that carries detail on, and cycles of budgets in token merging."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, Watch, make_flux
from diffusers import FlowMatchHeunDiscreteScheduler

import accel
from accel.core.schedule import Schedule
from accel.errors import ConfigError, UnsupportedError
from accel.methods.merging import Matching
from accel.pipelines.registry import find

Config = accel.TokenMergingConfig


def method_on(pipe):
    return next(iter(pipe.scheduler.step.accel_clock._listeners)).method


def tokens_of(name, prediction):
    """(B, N, c), written again: FLUX predicts tokens, PixArt 2x2 patches of noise and, behind them, of variance."""
    if name == "flux":
        return prediction
    B, _, h, w = prediction.shape
    x = prediction[:, :4].reshape(B, 4, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_keep_their_mean_and_tokens_their_own_deviation(name):
    family = FAMILIES[name]
    pipe, seen = family.make(), []
    raw = []
    first = pipe.transformer.register_forward_hook(lambda m, a, out: raw.append(out[0].clone()))
    config = Config(schedule=Schedule(dense_first=2, refresh_every=2), order=1, dense_blocks_first=1)
    with first, accel.accelerate(pipe, config):
        method = method_on(pipe)

        def record(args, kwargs, out):
            if method.state.forecasts and method.run.phase.budget < 1:
                call = len(method.run.outputs) - 1
                seen.append((raw[-1], method.state.forecasts[call], out[0].clone(), method.groups[-1].plan))

        with Watch(pipe.transformer, record):
            family.latents(pipe, steps=6, guidance=3.0)
    assert len(seen) >= 3
    for computed, forecast, given, plan in seen:
        computed_BNc, forecast_BNc, given_BNc = (tokens_of(name, x) for x in (computed, forecast, given))
        assert not torch.allclose(given, computed, atol=1e-3)
        for b in range(given_BNc.shape[0]):
            owner = plan.owner[min(b, plan.owner.shape[0] - 1)]
            for slot in owner.unique():
                group = owner == slot
                mean = computed_BNc[b, group].mean(0)
                deviation = forecast_BNc[b, group] - forecast_BNc[b, group].mean(0)
                torch.testing.assert_close(given_BNc[b, group], mean + deviation, rtol=1e-4, atol=1e-4)
        if name == "pixart":  # the variance has no part in it
            assert torch.equal(given[:, 4:], computed[:, 4:])


def test_tokens_go_back_to_where_they_came_from(family):
    pipe = family.make()
    adapter = find(pipe.transformer)
    shape = (2, 96, 16) if family is FAMILIES["flux"] else (2, 8, 16, 24)
    prediction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x_BNc = adapter.tokens.of(pipe.transformer, prediction, (8, 12))
    assert torch.equal(adapter.tokens.put(pipe.transformer, prediction, x_BNc, (8, 12)), prediction)
    changed = adapter.tokens.put(pipe.transformer, prediction, x_BNc + 1, (8, 12))
    assert torch.equal(adapter.tokens.of(pipe.transformer, changed, (8, 12)), x_BNc + 1)


@pytest.mark.parametrize("order", [0, 1])
def test_a_cycle_without_merging_is_a_forecast(family, order):
    pipe = family.make()
    both = {"cycle": (0, 1), "order": order, "dense_steps_first": 2, "dense_steps_last": 1}
    with accel.accelerate(pipe, accel.ForecastConfig(**both)):
        expected = family.latents(pipe, steps=7, guidance=3.0)
    with accel.accelerate(pipe, Config(**both)) as handle:
        assert torch.equal(family.latents(pipe, steps=7, guidance=3.0), expected)
        assert [s.computed > 0 for s in handle.stats.steps] == [True, True, False, True, False, True, True]
    assert not torch.equal(family.latents(pipe, steps=7, guidance=3.0), expected)


def test_every_budget_has_a_plan_of_its_own():
    pipe = make_flux()  # 5 blocks
    config = Config(
        cycle=(0.5, 0.25, 0, 1),
        matching=Matching(protect=0),
        dense_steps_first=1,
        dense_steps_last=0,
        dense_blocks_first=0,
    )
    with accel.accelerate(pipe, config) as handle:
        FAMILIES["flux"].latents(pipe, steps=8)
        assert [s.computed // 5 for s in handle.stats.steps] == [96, 48, 24, 0, 96, 48, 24, 0]
        assert [s.built for s in handle.stats.steps] == [0, 1, 1, 0, 0, 1, 1, 0]
        assert handle.stats.cache_bytes > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unmerge": "keep"}, "carry, copy"),
        ({"order": 3}, "0, 1 or 2"),
        ({"cycle": ()}, "budgets in"),
        ({"cycle": (0.5, 1.5)}, "budgets in"),
        ({"cycle": (0, 1), "dense_steps_first": 0}, ">= 1"),
        ({"cycle": (0.5, 0.05)}, "leaves 0.05 of the tokens"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_slopes_need_one_call_per_time():
    pipe = make_flux()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with accel.accelerate(pipe, Config(order=1)), pytest.raises(UnsupportedError, match="same timestep"):
        pipe.scheduler.set_timesteps(6)
    with accel.accelerate(pipe, Config()):  # holding needs no slope
        pipe.scheduler.set_timesteps(6)
