"""Dynamic chunking: scores, the tokens that are kept, and how results come back; against brute force."""

import math

import pytest
import torch
from conftest import FAMILIES, make_flux, make_pixart

import accel
from accel.errors import ConfigError, UnsupportedError
from accel.methods.chunking import routers
from accel.methods.chunking.dechunk import kept_plan

Config = accel.DynamicChunkingConfig


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(i, j, grid):
    rows, columns = range(max(i - 1, 0), min(i + 2, grid[0])), range(max(j - 1, 0), min(j + 2, grid[1]))
    return [(r, c) for r in rows for c in columns]


def test_the_cosine_router_by_hand():
    grid = (4, 5)
    x = numbers(2, 20, 6)
    found = routers.Cosine()(x, x, grid)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                mean = sum(x[b, r * 5 + c] for r, c in near(i, j, grid)) / len(near(i, j, grid))
                one = x[b, i * 5 + j]
                wanted = (1 - one @ mean / (one.norm() * mean.norm())) / 2
                assert abs(found[b, i * 5 + j] - wanted) < 1e-5


def test_the_predictability_router_by_hand():
    """Inside of the picture: what the mean of eight neighbours leaves. Corners are kept."""
    grid = (4, 5)
    x = numbers(1, 20, 6)
    found = routers.Predictability()(x, x, grid)
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for i in (1, 2):
        for j in (1, 2, 3):
            others = [unit[0, r * 5 + c] for r, c in near(i, j, grid) if (r, c) != (i, j)]
            residual = (unit[0, i * 5 + j] - sum(others) / 8).square().mean()
            assert abs(found[0, i * 5 + j] - 1 / (1 + math.exp(-residual))) < 1e-5
    assert found[0, [0, 4, 15, 19]].tolist() == [1.0] * 4


@pytest.mark.parametrize("levels", [1000, 3])
def test_kept_tokens_and_their_nearest_by_hand(levels):
    grid = (5, 6)
    score = torch.randint(levels, (2, 30), generator=torch.Generator().manual_seed(3)).float()
    plan = kept_plan(score, grid, 7)
    for g in range(2):
        kept = sorted(sorted(range(30), key=lambda t: -score[g, t])[:7])
        assert plan.dst[g].tolist() == kept
        for t in range(30):
            distances = [(k // 6 - t // 6) ** 2 + (k % 6 - t % 6) ** 2 for k in kept]
            assert plan.owner[g, t] == distances.index(min(distances))
        assert plan.size[g].tolist() == [(plan.owner[g] == k).sum().item() for k in range(7)]


def test_gaussian_dechunking_by_hand():
    grid, sigma = (5, 6), 1.3
    score = torch.rand(1, 30, generator=torch.Generator().manual_seed(4))
    plan = kept_plan(score, grid, 6, sigma)
    y = numbers(2, 6, 3)
    kept = plan.dst[0].tolist()
    p = [score[0, t].item() for t in kept]
    wanted = torch.zeros(2, 6, 3)
    for i, a in enumerate(kept):
        weight = [
            math.exp(-((a // 6 - b // 6) ** 2 + (a % 6 - b % 6) ** 2) / (2 * sigma**2)) * p[j]
            for j, b in enumerate(kept)
        ]
        smooth = sum(w * y[:, j] for j, w in enumerate(weight)) / sum(weight)
        wanted[:, i] = p[i] * y[:, i] + (1 - p[i]) * smooth
    torch.testing.assert_close(plan.expand(y), wanted[:, plan.owner[0]], atol=1e-5, rtol=1e-5)
    x = numbers(2, 30, 3, seed=1)
    torch.testing.assert_close(plan.change(x, y, y * 0.5), x + plan.expand(y * 0.5), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plan.expand(y), y[:, plan.owner[0]], atol=1e-3)
    kept = plan.clone()
    plan.mixing.zero_()  # a clone has tensors of its own
    torch.testing.assert_close(kept.expand(y), wanted[:, plan.owner[0]], atol=1e-5, rtol=1e-5)


def test_budgets_grow_as_noise_falls():
    phases = Config(budget=0.25, last_budget=0.75).full_schedule.phases(6)
    assert [phase.budget for phase in phases] == [1, 0.25, 0.375, 0.5, 0.625, 0.75]
    assert all(phase.refresh for phase in phases[1:])
    phases = Config(budget=0.5, last_budget=1.0, dense_steps_last=1).full_schedule.phases(6)
    assert [phase.budget for phase in phases] == [1, 0.5, 0.6875, 0.8125, 1, 1]


def test_chunking_with_windows_is_merging_with_windows(family):
    """One mechanism: the same pictures, bit for bit."""
    pipe = family.make()
    merging = accel.TokenMergingConfig(
        groups="windows", ratio=0.5, schedule=accel.Schedule(refresh_every=1, dense_last=0)
    )
    with accel.accelerate(pipe, merging):
        wanted = family.latents(pipe, steps=4, guidance=3.0)
    with accel.accelerate(pipe, Config(budget=0.5)):
        assert torch.equal(family.latents(pipe, steps=4, guidance=3.0), wanted)


SETTINGS = {
    "cosine": Config.dc_dit(0.5),
    "predictability": Config.dc_dit(0.5, router="predictability", sigma=2.0),
    "kept by variance": Config(chunks="tokens"),
    "cosine windows": Config(router="cosine", chunks="windows", dechunk="copy"),
    "growing": Config(budget=0.3, last_budget=0.8),
    "depth": Config(depth=(0.6, 1.4)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_runs_repeats_and_leaves(family, name):
    pipe = family.make()
    plain = family.latents(pipe, steps=4, guidance=3.0)
    with accel.accelerate(pipe, SETTINGS[name]) as handle:
        first = family.latents(pipe, steps=4, guidance=3.0)
        assert torch.isfinite(first).all()
        assert torch.equal(family.latents(pipe, steps=4, guidance=3.0), first)
        assert 0.4 < handle.stats.share < 0.85
    assert not torch.equal(first, plain)
    assert torch.equal(family.latents(pipe, steps=4, guidance=3.0), plain)


def test_parts_of_depth_have_budgets_of_their_own():
    pipe = make_flux()  # five blocks, the first one dense
    with accel.accelerate(pipe, Config(depth=(0.5, 1.5))) as handle:
        FAMILIES["flux"].latents(pipe, steps=3)
        # Two blocks with a quarter of 96 tokens, two with three quarters; counts of windows come that near.
        dense, *reduced = [step.computed for step in handle.stats.steps]
        assert dense == 5 * 96
        assert all(abs(computed - (96 + 2 * 24 + 2 * 72)) <= 12 for computed in reduced)
        assert [step.built for step in handle.stats.steps] == [0, 2, 2]


def test_the_unconditional_branch_on_fewer_tokens():
    pipe, family = make_flux(), FAMILIES["flux"]
    with accel.accelerate(pipe, Config(budget=0.5)):
        equal = family.latents(pipe, steps=3, guidance=3.0)
    with accel.accelerate(pipe, Config(budget=0.5, unconditional=0.25)) as handle:
        lite = family.latents(pipe, steps=3, guidance=3.0)
        assert [step.built for step in handle.stats.steps] == [0, 2, 2]
        assert handle.stats.steps[1].computed < 96 + 48 * 4
    assert not torch.equal(lite, equal)
    with pytest.raises(UnsupportedError, match="unconditional"):
        accel.accelerate(make_pixart(), Config(unconditional=0.25))


def test_boundary_maps_say_how_many_tokens_share_each_slot():
    pipe = make_flux()
    with accel.accelerate(pipe, Config(budget=0.5)) as handle:
        FAMILIES["flux"].latents(pipe, steps=3)
        dense, *maps = handle.boundary_maps()
        assert dense is None
        assert len(maps) == 2
        for sizes in maps:
            assert sizes.shape == (1, 8, 12)
            assert set(sizes.unique().tolist()) <= {1.0, 4.0, 16.0}
            assert (1 / sizes).sum().item() == 48  # every slot once
    with (
        accel.accelerate(pipe, "few-step") as handle,
        pytest.raises(ConfigError, match="DynamicChunkingConfig"),
    ):
        handle.boundary_maps()


def test_all_tokens_kept_is_the_plain_pipeline_bit_for_bit():
    pipe, family = make_flux(), FAMILIES["flux"]
    plain = family.latents(pipe, steps=3)
    for config in (Config(budget=0.999), Config.dc_dit(0.999), Config(budget=1.0, last_budget=0.999)):
        with accel.accelerate(pipe, config):
            assert torch.equal(family.latents(pipe, steps=3), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "sobel"}, "windows, cosine, predictability or a .safetensors file"),
        ({"router": "weights.bin"}, "safetensors"),
        ({"adapter": "weights.pt"}, "safetensors"),
        ({"budget": 0}, r"budget must be in \(0, 1\]"),
        ({"dechunk": "gaussian"}, "dechunk"),
        ({"dense_steps_first": 0}, "schedule.dense_first must be"),
        ({"depth": (0.5, 0)}, "depth"),
        ({"budget": 1.0}, "budget must be below 1"),
        ({"budget": 1.0, "unconditional": 0.5}, "budget must be below 1"),
        ({"budget": 1.0, "last_budget": 1.0}, "last_budget must be below 1"),
        (
            {"budget": 0.5, "depth": (2.0,)},
            "depth must be factors of which one times the least budget is below 1",
        ),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_what_leaves_out_something_somewhere_is_allowed():
    for settings in ({"last_budget": 1.0}, {"depth": (2.0, 1.0)}, {"depth": (2.0,), "unconditional": 0.25}):
        Config(budget=0.5, **settings)


def test_a_budget_that_windows_cannot_keep_says_which_they_can():
    pipe = make_flux()
    with (
        accel.accelerate(pipe, Config(budget=0.01)),
        pytest.raises(UnsupportedError, match=r"budget of 0\.063 or more"),
    ):
        FAMILIES["flux"].latents(pipe, steps=3)
