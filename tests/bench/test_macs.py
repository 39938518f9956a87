"""Counted multiply-accumulates: by hand on a tiny model, and CAT Pruning's claim on the built-in one."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_pixart

import accel
from accel.evaluation.bench.macs import counted


def macs_of(pipe, call, config=None):
    if config is None:
        with counted(pipe) as count:
            call()
        return count.macs
    with accel.accelerate(pipe, config), counted(pipe) as count:
        call()
    return count.macs


def test_a_denoisers_products_are_counted_and_nothing_else():
    pipe, family = make_pixart(blocks=2), FAMILIES["pixart"]
    got = macs_of(pipe, lambda: family.latents(pipe, steps=3, output_type="pt"))
    N, T, D, caption = 96, 7, 32, 16  # tokens, text, width
    self_attention = N * 4 * D * D + 2 * N * N * D
    cross_attention = N * 2 * D * D + T * 2 * D * D + 2 * N * T * D
    block = self_attention + cross_attention + N * 8 * D * D
    embed = N * (4 * 2 * 2) * D + T * (caption * D + D * D)
    time = 256 * D + D * D + D * 6 * D
    assert got == 3 * (2 * block + embed + time + N * D * (8 * 2 * 2))


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_partial_steps_cost_their_share(family, budget):
    """What depends on the tokens costs its share; text and timestep are computed at every step."""
    pipe, steps = family.make(), 4
    plain = macs_of(pipe, lambda: family.latents(pipe, steps=steps)) / steps
    config = accel.TokenPruningConfig(cycle=(budget,), dense_steps_first=1, dense_steps_last=0)
    partial = (macs_of(pipe, lambda: family.latents(pipe, steps=steps), config) - plain) / (steps - 1)
    assert budget * plain < partial < (budget + 0.12) * plain


def test_skipped_branches_cost_nothing(family):
    pipe = family.make()
    plain = macs_of(pipe, lambda: family.latents(pipe, steps=6, guidance=3.0))
    config = accel.ForecastConfig(cycle=(1,), guidance_every=2, dense_steps_first=1)
    less = macs_of(pipe, lambda: family.latents(pipe, steps=6, guidance=3.0), config)
    # Dense first and last, and of the four between every second with one branch.
    assert less == pytest.approx(plain * (6 - 2 * 0.5) / 6, rel=1e-6)


def test_cat_takes_about_half_of_the_macs_at_28_steps():
    """CAT Pruning (arXiv:2502.00433) reports half of the MACs at 28 steps. Here 0.460: 6 of 28 steps are dense,
    a partial one costs 0.312 of a dense one (30 % of the image tokens, all text tokens)."""
    from accel.pipelines import builtin

    pipe = builtin.load_pipeline(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def call(steps):
        pipe("a photo of a red circle", num_inference_steps=steps, true_cfg_scale=1.0, output_type="latent")

    dense = macs_of(pipe, lambda: call(1))
    cat = macs_of(pipe, lambda: call(28), accel.TokenPruningConfig.cat())
    assert 0.45 < cat / (28 * dense) < 0.47
