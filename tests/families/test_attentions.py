"""Kept keys and values, of every family that declares its attentions."""

from __future__ import annotations

import pytest
from conftest import freeze
from test_conformance import CASES, denoiser_of, relative

import accel
from accel.pipelines.registry import find

#: Their latents are lists, their texts padded: see `test_declarations`.
OTHERWISE = {"Qwen-Image", "Z-Image"}


@pytest.mark.parametrize("name", sorted(set(CASES) - OTHERWISE))
def test_a_frozen_denoiser_is_reproduced(name):
    """Same input at every step: kept keys and values are those of the step before, and so is every forecast."""
    case = CASES[name]
    pipe = case.make()
    if find(denoiser_of(pipe)).attentions is None:
        pytest.skip("attentions are not described")
    freeze(pipe)
    plain = case.latents(pipe, steps=6)
    with accel.accelerate(pipe, accel.TokenPruningConfig(budget=0.3)) as handle:
        assert relative(case.latents(pipe, steps=6), plain) < 1e-5
        assert handle.stats.share < 0.8
    # The negative control: computed tokens see only each other.
    with accel.accelerate(pipe, accel.TokenPruningConfig(budget=0.3, keys_values="none")):
        assert relative(case.latents(pipe, steps=6), plain) > 1e-3
