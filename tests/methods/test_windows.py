"""Windows: which cells become one slot, where slots stand, and how much they weigh."""

import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_flux

import accel
from accel.core import site
from accel.core.noise_levels import clean, log_snr
from accel.core.plan import TokenPlan
from accel.core.schedule import Schedule
from accel.core.site import rotary
from accel.core.span import Span
from accel.errors import ConfigError, UnsupportedError
from accel.evaluation.scenes.render import edges_and_ground
from accel.methods import windows
from accel.pipelines.registry import find

Config = accel.TokenMergingConfig


def by_hand(score, grid, large, small):
    """Owner and representative of every token, cell by cell."""
    height, width = grid

    def cell(side, i, j):
        return [(side * i + r) * width + side * j + c for r in range(side) for c in range(side)]

    def lowest(side, count, taken):
        cells = [cell(side, i, j) for i in range(height // side) for j in range(width // side)]
        cells = [c for c in cells if not set(c) & taken]
        chosen = sorted(cells, key=lambda c: max(score[t] for t in c))[:count]  # stable: the first of equals
        return sorted(chosen)

    sixteens = lowest(4, large, set())
    fours = lowest(2, small, {t for c in sixteens for t in c})
    taken = {t for c in (*sixteens, *fours) for t in c}
    groups = [[t] for t in range(height * width) if t not in taken] + fours + sixteens
    owner = [0] * (height * width)
    for slot, group in enumerate(groups):
        for token in group:
            owner[token] = slot
    return owner, [min(g) for g in groups], [len(g) for g in groups]


@pytest.mark.parametrize(
    ("grid", "large", "small"),
    [((8, 12), 1, 5), ((7, 9), 1, 3), ((5, 6), 0, 4), ((3, 2), 0, 1), ((8, 8), 4, 0)],
)
@pytest.mark.parametrize("levels", [1000, 3])  # of scores: 3 makes ties everywhere
def test_the_plan_is_the_one_made_by_hand(grid, large, small, levels):
    N = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(1)
    score_GN = torch.randint(levels, (3, N), generator=generator).float()
    counts = windows.Counts(N, large, small)
    plan = windows.plan(score_GN, grid, counts)
    for g in range(3):
        owner, dst, size = by_hand(score_GN[g].tolist(), grid, large, small)
        assert plan.owner[g].tolist() == owner
        assert plan.dst[g].tolist() == dst
        assert plan.size[g].tolist() == size
    assert plan.centroid
    assert plan.complete
    assert [s for s, n in plan.classes for _ in range(n)] == plan.size[0].tolist()


@pytest.mark.parametrize(
    ("budget", "large", "small"), [(0.5, 0, 171), (0.33, 32, 69), (0.25, 36, 76), (1.0, 0, 0), (0.75, 0, 85)]
)
def test_counts_at_256_pixels(budget, large, small):
    counts = windows.counts((32, 32), budget)
    assert (counts.large, counts.small) == (large, small)
    assert counts.slots == 1024 - 15 * large - 3 * small


@pytest.mark.parametrize("grid", [(64, 64), (32, 32), (45, 60), (6, 5), (33, 64)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_counts_come_near_any_budget(grid, multiple):
    N = grid[0] * grid[1]
    for budget in (0.9, 0.6, 0.5, 0.4, 1 / 3, 0.3):
        counts = windows.counts(grid, budget, multiple)
        assert counts.singles >= 0
        assert abs(counts.slots - budget * N) <= (3 if multiple == 1 else 48)
        if N >= 1000 and N % 16 == 0:
            assert counts.slots % multiple == 0
    assert windows.counts((64, 64), 0.5, 16).slots == 2032


def test_a_budget_below_what_windows_can_do_is_refused_with_what_they_can():
    with pytest.raises(
        UnsupportedError, match=r"5x5 = 25 tokens keep 10 of them at least.*budget of 0.4 or more"
    ):
        windows.counts((5, 5), 0.2)
    assert windows.counts((5, 5), 0.4).slots == 10


def test_the_score_is_the_variance_of_the_neighbourhood():
    grid = (5, 7)
    x_BNC = torch.randn(2, 35, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    map_ = x_BNC.view(2, *grid, 4)
    for i in range(5):
        for j in range(7):
            near = map_[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].flatten(1, 2)
            wanted = near.var(dim=1, unbiased=False).sum(-1).float()
            torch.testing.assert_close(windows.variance(x_BNC, grid)[:, i * 7 + j], wanted)


def angles(grid, pairs=6):
    """Angle of every token and pair: half of the pairs turn with the row, half with the column."""
    row, column = (t.flatten().double() for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    speed = 1.0 / 10.0 ** torch.arange(pairs // 2)
    return torch.cat([row[:, None] * speed, column[:, None] * speed], 1)


FORMS = {
    "real": lambda a: (a.cos().repeat_interleave(2, 1), a.sin().repeat_interleave(2, 1)),
    "complex": lambda a: torch.polar(torch.ones_like(a), a),
    "matrices": lambda a: torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2)),
    "angles": lambda a: a,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batched", [False, True])
def test_a_slot_stands_at_the_centre_of_its_tokens(form, batched):
    """Half of a row down is half of the angle on: exact for cells of any size, from the table alone."""
    grid = (8, 8)
    score_GN = torch.rand(2 if batched else 1, 64, generator=torch.Generator().manual_seed(3))
    plan = windows.plan(score_GN, grid, windows.Counts(64, 1, 4))
    table = FORMS[form](angles(grid))
    text = FORMS[form](torch.full((3, 6), 0.7, dtype=torch.float64))
    both = [
        torch.cat([t, x])
        for t, x in zip(*((v if isinstance(v, tuple) else (v,)) for v in (text, table)), strict=True)
    ]
    if batched:
        both = [b.expand(2, *b.shape) for b in both]
    value = tuple(both) if form == "real" else both[0]
    side = rotary("table", image="last", dims=(1 if batched else 0,))
    found = side.follow({"table": value}.get, plan)
    for g in range(len(score_GN)):
        members = [torch.where(plan.owner[g] == k)[0] for k in range(plan.slots)]
        wanted = FORMS[form](torch.stack([angles(grid)[m].mean(0) for m in members]))
        pairs = zip(found, wanted, strict=True) if form == "real" else [(found, wanted)]
        for one, right in pairs:
            one = one[g] if batched else one
            torch.testing.assert_close(one[3:], right, atol=1e-6, rtol=0)
        for one, given in zip(found if form == "real" else [found], both, strict=True):
            assert torch.equal((one[g] if batched else one)[:3], (given[g] if batched else given)[:3])


def relative(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def attached(pipe, family, plan_for, **options):
    denoiser = pipe.transformer
    tokens = find(denoiser).tokens
    with ExitStack() as stack:
        span = Span(plan_for, tokens=lambda: 96)
        span.attach(denoiser, tokens.sites(denoiser), stack, bias=True)
        return family.latents(pipe, steps=1, **options)


def test_permuted_with_the_bias_and_centroids_on(family):
    """One token a slot, in another order: the bias is log 1 and every centre is its own token."""
    pipe = family.make()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))[None]
    plan = replace(TokenPlan.permutation(order), centroid=True, classes=((1, 96),))
    assert relative(attached(pipe, family, lambda x: plan), family.latents(pipe, steps=1)) <= 1e-5


def test_all_tokens_kept_is_the_plain_pipeline_bit_for_bit():
    pipe, family = make_flux(), FAMILIES["flux"]
    plain = family.latents(pipe, steps=4)
    # 0.999 of 96 tokens: no window fits, nothing is reduced.
    config = Config(groups="windows", schedule=Schedule(cycle=(0.999,), refresh_every=1, dense_last=0))
    with accel.accelerate(pipe, config):
        assert torch.equal(family.latents(pipe, steps=4), plain)
    with accel.accelerate(pipe, Config(groups="windows", ratio=0.5, schedule=Schedule(refresh_every=1))):
        assert not torch.equal(family.latents(pipe, steps=4), plain)


def test_windows_run_and_keep_what_was_asked_for(family):
    pipe = family.make()
    plain = family.latents(pipe, steps=4, guidance=3.0)
    config = Config(groups="windows", ratio=0.5, schedule=Schedule(refresh_every=1, dense_last=0))
    with accel.accelerate(pipe, config) as handle:
        one = family.latents(pipe, steps=4, guidance=3.0)
        assert torch.equal(family.latents(pipe, steps=4, guidance=3.0), one)
        assert handle.stats.attention in ("mask", "lse", "channel")
        assert f"by {handle.stats.attention}" in str(handle.stats)
        blocks = handle.stats.steps[0].total // 96
        assert [s.computed for s in handle.stats.steps] == [96 * blocks, *[96 + 48 * (blocks - 1)] * 3]
    assert torch.equal(family.latents(pipe, steps=4, guidance=3.0), plain)


def test_attention_that_goes_another_way_is_said_to_weigh_nothing():
    """Sized keys lose their sizes in baddbmm and softmax; masks do not."""
    from diffusers.models.attention_processor import AttnProcessor
    from tiny_others import CASES

    dit = CASES["DiT"]
    for config in (
        Config(groups="windows", ratio=0.5, schedule=Schedule(refresh_every=1), dense_blocks_first=0),
        Config(ratio=0.5, schedule=Schedule(refresh_every=1), proportional=True),
        accel.DynamicChunkingConfig(chunks="windows"),
    ):
        pipe = dit.make()
        with accel.accelerate(pipe, config) as handle:
            pipe(**dit.call(6, False, torch.float32))
            assert handle.stats.attention in ("mask", "lse", "channel")
            assert windows.NOT_WEIGHED not in handle.stats.notes
            for block in pipe.transformer.transformer_blocks:
                block.attn1.set_processor(AttnProcessor())
            pipe(**dit.call(6, False, torch.float32))
            assert handle.stats.attention is None
            assert handle.stats.notes.count(windows.NOT_WEIGHED) == 1
    pipe = FAMILIES["pixart"].make()
    pipe.transformer.set_attn_processor(AttnProcessor())
    with accel.accelerate(
        pipe, Config(groups="windows", ratio=0.5, schedule=Schedule(refresh_every=1))
    ) as handle:
        FAMILIES["pixart"].latents(pipe, steps=4)
        assert handle.stats.attention == "mask"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "squares"}, "one of matching, windows"),
        ({"groups": "windows", "dense_steps_first": 0}, "schedule.dense_first must be a whole number >= 1"),
        ({"groups": "windows", "matching": {"threshold": 0.5}}, "matching=.*threshold=0.5.* has no effect"),
        ({"groups": "windows", "matching": {"cell": 2}}, "matching=.*cell=2.* has no effect"),
        ({"groups": "windows", "refresh_layers": "all"}, "refresh_layers"),
    ],
)
def test_settings_that_windows_do_not_take(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def scheduler_of(name, **settings):
    import diffusers

    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(8)
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_clean_picture_of_noise_schedulers(name, kind):
    """A sample made of a known picture and noise, and the right prediction for it: the picture comes back, up to a
    factor."""
    scheduler = scheduler_of(name, prediction_type=kind)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    for step in (3, 5):
        ratio = math.exp(-log_snr(scheduler)[step])
        a, s = 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)
        x = x0 + ratio * noise if name.startswith("Euler") else a * x0 + s * noise
        right = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]
        found = clean(scheduler, right, x, log_snr(scheduler)[step])
        factor = (found * x0).sum() / x0.square().sum()
        assert factor > 0.05
        torch.testing.assert_close(found / factor, x0, atol=2e-3, rtol=0)


def test_the_clean_picture_of_flow_matching():
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    sigma = scheduler.sigmas[3].item()
    found = clean(scheduler, noise - x0, (1 - sigma) * x0 + sigma * noise, log_snr(scheduler)[3])
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


def test_scores_of_a_coarser_grid():
    score_GN = torch.arange(30.0).view(1, 30)
    assert windows.coarser(score_GN, (5, 6), 1) is score_GN
    assert windows.coarser(score_GN, (5, 6), 2).tolist() == [[7, 9, 11, 19, 21, 23, 25, 27, 29]]


@pytest.mark.parametrize("grid", [(33, 64), (64, 33), (5, 9), (1, 3)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scores_of_a_coarser_grid_at_odd_sizes(grid, scale):
    rows, columns = site.Site("block", scale=scale).grid(grid)
    score = torch.rand(2, *grid, generator=torch.Generator().manual_seed(9))
    found = windows.coarser(score.flatten(1), grid, scale).view(2, rows, columns)
    for i in range(rows):
        for j in range(columns):
            cell = score[:, scale * i : scale * (i + 1), scale * j : scale * (j + 1)]
            assert torch.equal(found[:, i, j], cell.amax((1, 2)))


def test_compiled_whole_is_the_same_as_eager():
    """In compiled code the sizes travel with masks (FLUX) as they do in eager code: one graph for dense steps, one for reduced
    ones."""
    config = Config(groups="windows", ratio=0.5, schedule=Schedule(refresh_every=1, dense_last=0))
    family, pipe = FAMILIES["flux"], make_flux()
    with accel.accelerate(pipe, config):
        eager = family.latents(pipe, steps=4)
    torch.compiler.reset()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with accel.accelerate(pipe, config):
        assert relative(family.latents(pipe, steps=4), eager) <= 1e-5
    torch.compiler.reset()


def test_rotary_tables_are_averaged_once_for_all_blocks(monkeypatch):
    """Not in every block: 57 of them at FLUX.1's size would be 114 tables a step."""
    averaged = []
    own = site._mean
    monkeypatch.setattr(site, "_mean", lambda *args: averaged.append(1) or own(*args))
    pipe = make_flux()
    config = Config(
        groups="windows",
        schedule=Schedule(dense_first=1, dense_last=0, refresh_every=1),
        dense_blocks_first=0,
    )
    with accel.accelerate(pipe, config) as handle:
        FAMILIES["flux"].latents(pipe, steps=4)
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert blocks > 1
    reduced = sum(step.calls for step in handle.stats.steps[1:])
    assert len(averaged) == 2 * reduced  # the cosines and the sines


def test_the_clean_picture_of_flows_that_add_noise():
    """Cosmos: up to 80 times as much noise as picture, and steps get what the sample says the noise is."""
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    scheduler.register_to_config(sigma_max=80.0)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    for sigma in (35.0, 4.6, 0.5):
        found = clean(scheduler, noise, x0 + sigma * noise, -math.log(sigma))
        torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_clean_picture_of_scaled_models(name):
    scheduler = scheduler_of(name)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for sigma in (20.0, 0.9):
        x, data = x0 + sigma * noise, scheduler.config.sigma_data
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
        found = clean(scheduler, (x0 - skip * x) / out, x, -math.log(sigma))
        torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "config",
    [Config(groups="windows", dense_steps_first=1, dense_steps_last=0), accel.DynamicChunkingConfig()],
    ids=["merging", "chunking"],
)
def test_a_run_after_one_in_inference_mode(config):
    pipe = make_flux()
    with accel.accelerate(pipe, config):
        with torch.inference_mode():
            first = FAMILIES["flux"].latents(pipe, steps=4)
        assert torch.equal(FAMILIES["flux"].latents(pipe, steps=4), first)


def test_outlines_keep_more_tokens_than_the_ground():
    """On pictures whose outlines are known; scores without meaning keep no more there."""
    drawn, latents = _scenes_as_tokens()
    edge_BHW, ground_BHW = edges_and_ground(drawn, 8, 32)
    assert edge_BHW.sum((1, 2)).min() > 10
    assert not (edge_BHW & ground_BHW).any()
    wrong = torch.rand(latents.shape[:2], generator=torch.Generator().manual_seed(0))
    for budget in (0.5, 0.33):
        counts = windows.counts((32, 32), budget)
        ratios = []
        for score in (windows.variance(latents, (32, 32)), wrong):
            plan = windows.plan(score, (32, 32), counts)
            kept_BHW = (1 / plan.size).gather(1, plan.owner).unflatten(1, (32, 32))
            assert torch.allclose(kept_BHW.sum((1, 2)), torch.tensor(float(counts.slots)))
            ratios.append((kept_BHW[edge_BHW].mean() / kept_BHW[ground_BHW].mean()).item())
        assert ratios[0] > 2
        assert 0.9 < ratios[1] < 1.1


def _scenes_as_tokens():
    import numpy as np
    from diffusers import FluxPipeline

    from accel.evaluation import scenes
    from accel.pipelines import builtin

    lines = scenes.prompts("test", per_task=1, seed=0)
    drawn = scenes.sample_scenes(lines, np.random.default_rng(0))
    with torch.no_grad():
        vae = builtin.load_pipeline("cpu").vae
        latents = vae.encode(scenes.render(drawn) * 2 - 1).latent_dist.mean
    return drawn, FluxPipeline._pack_latents(latents, *latents.shape)
