"""Which methods go together on one model, and what is said about those that do not."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from conftest import FAMILIES, make_flux

import accel
from accel.errors import ConfigError

FORECAST, MERGING = accel.ForecastConfig(), accel.TokenMergingConfig(ratio=0.5)
PRUNING = accel.TokenPruningConfig(cycle=(0.5,))
FLUX = FAMILIES["flux"]

REFUSED = [pair for other in (FORECAST, MERGING) for pair in permutations((PRUNING, other))]


def names(pair):
    return "-".join(type(config).__name__ for config in pair)


@pytest.mark.parametrize("pair", REFUSED, ids=names)
@pytest.mark.parametrize("replace", [False, True])
def test_pruning_wants_the_model_for_itself(pair, replace):
    pipe = make_flux()
    first = accel.accelerate(pipe, pair[0])
    expected = FLUX.latents(pipe)
    with pytest.raises(
        ConfigError, match=r"token_pruning.*Put both into one schedule.*0 for steps that are forecast"
    ) as error:
        accel.accelerate(pipe, pair[1], replace=replace)
    other = "forecast" if FORECAST in pair else "token_merging"
    assert other in str(error.value)
    assert first.attached
    assert torch.equal(FLUX.latents(pipe), expected)  # the refused one has left nothing
    first.remove()
    alone = make_flux()
    with accel.accelerate(pipe, pair[1]), accel.accelerate(alone, pair[1]):
        assert torch.equal(FLUX.latents(pipe), FLUX.latents(alone))


@pytest.mark.parametrize("pair", list(permutations((FORECAST, MERGING))), ids=names)
def test_forecasts_and_merging_go_together(pair):
    pipe = make_flux()
    with accel.accelerate(pipe, pair[0]), accel.accelerate(pipe, pair[1]):
        assert FLUX.latents(pipe).isfinite().all()


def test_one_schedule_is_the_way_out():
    pipe = make_flux()
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0, 0.5))) as handle:
        FLUX.latents(pipe, steps=7)
        computed = [step.computed / step.total for step in handle.stats.steps]
    assert computed == [1, 1, 0, 0.5, 0, 0.5, 1]
