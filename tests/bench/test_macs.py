"""Counted multiply-accumulates: by hand on a tiny model, and CAT Pruning's claim on the built-in one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel.evaluation.bench.macs import _formulas, counted


def macs_of(pipe, call, config=None):
    if config is None:
        with counted(pipe) as count:
            call()
        return count.macs
    with accel.accelerate(pipe, config), counted(pipe) as count:
        call()
    return count.macs


N, T, D = 96, 7, 32  # image tokens, text tokens, width


def attention(queries: int, keys: int) -> int:
    return 2 * queries * keys * D


def mlp(tokens: int, inner: int = 4 * D) -> int:
    return 2 * tokens * D * inner


def pixart_macs(blocks: int = 3) -> int:
    """One image: a timestep is embedded for each of a batch."""
    own = N * 4 * D * D + attention(N, N)
    text = N * 2 * D * D + T * 2 * D * D + attention(N, T)
    embed = N * (4 * 2 * 2) * D + T * (16 * D + D * D)
    time = 256 * D + D * D + D * 6 * D
    return blocks * (own + text + mlp(N)) + embed + time + N * D * (8 * 2 * 2)


def flux_macs(dual: int = 2, single: int = 3) -> int:
    """One image; guidance-distilled embedding is off, so that time and pooled text modulate alone."""
    both = N + T
    modulation = D * 6 * D
    two = 2 * modulation + both * 4 * D * D + attention(both, both) + mlp(both)
    one = D * 3 * D + both * 3 * D * D + attention(both, both) + both * D * 4 * D + both * 5 * D * D
    time = (256 + D) * D + (D + D) * D  # of the timestep and of the pooled text
    embed = N * 16 * D + T * D * D
    return dual * two + single * one + time + embed + D * 2 * D + N * D * 16


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "closed", "output"), [("flux", flux_macs, "latent"), ("pixart", pixart_macs, "pt")]
)
def test_a_denoisers_products_are_counted_and_nothing_else(name, closed, output, batch):
    """Attention is in it on every torch: 2.14's own count for the kernel of the CPU is 0. The autoencoder, which
    makes pixels of PixArt's latents, is not."""
    family = FAMILIES[name]
    pipe = family.make()
    got = macs_of(pipe, lambda: family.latents(pipe, steps=3, batch=batch, output_type=output))
    assert got == 3 * batch * closed()


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_is_counted_once_by_any_kernel(backend):
    """The one that has a formula here, and the one that is counted by its parts."""
    q, k, v = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter, sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 3 * 10 * 7 * (8 + 8)


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
    config = accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2, dense_first=1))
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
