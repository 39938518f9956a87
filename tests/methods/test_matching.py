"""Matching against brute force: loops over tokens, written from the papers' text."""

import math

import pytest
import torch
from conftest import FAMILIES, make_pixart

import accel
from accel.kernels.detail import detail
from accel.kernels.match import match
from accel.kernels.match.reference import features
from accel.methods import importance
from accel.methods.merging import matching, noise
from accel.pipelines.registry import find


def grid_features(height, width, channels=6, batch=1, seed=0):
    return torch.randn(batch, height * width, channels, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float((a / a.norm()) @ (b / b.norm()))


def brute_force_merge(x_NC, destinations, merged_count, exempt=()):
    """Bipartite soft matching of one image in plain Python: [(set of members, destination or itself)]."""
    sources = [n for n in range(len(x_NC)) if n not in destinations and n not in exempt]
    best = {n: max(destinations, key=lambda d: cosine(x_NC[n], x_NC[d])) for n in sources}
    ranked = sorted(sources, key=lambda n: -cosine(x_NC[n], x_NC[best[n]]))
    merged = ranked[:merged_count]
    members = {n: {n} for n in range(len(x_NC)) if n not in merged}
    for n in merged:
        members[best[n]].add(n)
    return members


def as_members(plan, row=0):
    members = {}
    for n, slot in enumerate(plan.owner[row].tolist()):
        members.setdefault(int(plan.dst[row, slot]), set()).add(n)
    return members


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_merge_plan_matches_brute_force(grid):
    x = grid_features(*grid)
    tokens = grid[0] * grid[1]
    dst = matching.destinations(torch.rand(1, tokens), grid, 2)
    exempt = matching.top_mask(torch.rand(1, tokens), 3)
    best, target = match(x, dst, exempt)
    keep = tokens - 9
    plan = matching.merge_plan(best, target, keep)
    expected = brute_force_merge(x[0], dst[0].tolist(), 9, exempt[0].nonzero().flatten().tolist())
    assert as_members(plan) == expected
    assert plan.size[0].sum() == tokens
    assert (plan.dst[0].diff() > 0).all()  # in the order of the grid


def test_one_destination_per_cell_and_uniform():
    grid, counts = (4, 5), torch.zeros(20)
    for draw in range(400):
        dst = matching.destinations(noise.uniform(20, 0, torch.tensor(draw))[None], grid, 2)
        cells = [(d // 5 // 2, d % 5 // 2) for d in dst[0].tolist()]
        assert sorted(cells) == [(r, c) for r in range(2) for c in range(3)]
        counts[dst[0]] += 1
    full = counts.view(4, 5)[:, :4]
    assert (full - 100).abs().max() < 45  # 100 +- 5 sigma
    assert (counts.view(4, 5)[:, 4] - 200).abs().max() < 50  # the cut cells have two tokens


def test_noise_is_uniform_and_depends_on_all_its_inputs():
    a = noise.uniform(4096, 0, torch.tensor(0))
    assert abs(a.mean() - 0.5) < 0.02
    assert abs(a.std() - 12**-0.5) < 0.01
    for other in (noise.uniform(4096, 1, torch.tensor(0)), noise.uniform(4096, 0, torch.tensor(1))):
        assert abs(torch.corrcoef(torch.stack([a, other]))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 0.06
    assert torch.equal(a, noise.uniform(4096, 0, torch.tensor(0)))


def test_shared_features_average_the_cosine():
    x = grid_features(3, 4, batch=4)
    shared = features(x, 1)
    assert math.isclose(
        float(shared[0, 2] @ shared[0, 7]), sum(cosine(x[b, 2], x[b, 7]) for b in range(4)) / 4, abs_tol=1e-6
    )
    # Two halves of guidance over two images: rows 0 and 2 of the batch are the same image.
    paired = features(x, 2)
    assert math.isclose(
        float(paired[1, 2] @ paired[1, 7]),
        (cosine(x[1, 2], x[1, 7]) + cosine(x[3, 2], x[3, 7])) / 2,
        abs_tol=1e-6,
    )


def test_cell_size_leaves_room():
    assert matching.cell_size((8, 8), 16) == 2
    assert matching.cell_size((8, 8), 15) == 3
    assert matching.cell_size((5, 7), 11) == 3
    assert matching.cell_size((1, 1), 1) is None


def test_local_detail_finds_the_edge():
    x = torch.zeros(1, 8, 8, 3)
    x[:, :, 4:] = 1
    score = detail(x.flatten(1, 2), (8, 8)).view(8, 8)
    assert (score[:, 3:5] > 1).all()
    assert (score[:, :3].abs() < 1e-4).all()
    assert (score[:, 5:].abs() < 1e-4).all()


def test_guidance_magnitude_in_two_calls_and_batched():
    cond, uncond = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = torch.stack(
        [torch.stack([(cond[b, n] - uncond[b, n]).norm() for n in range(5)]) for b in range(2)]
    )
    torch.testing.assert_close(importance.guidance_magnitude((cond, uncond), 2), expected)
    torch.testing.assert_close(importance.guidance_magnitude((torch.cat([uncond, cond]),), 2), expected)
    assert importance.guidance_magnitude((cond,), 2) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_tomesd_block_by_brute_force(name):
    """The published scheme, block by block, in loops: merge the block's input, run it, copy the change back."""
    family = FAMILIES[name]
    pipe = family.make()
    sites = find(pipe.transformer).tokens.sites(pipe.transformer)
    with accel.accelerate(pipe, accel.TokenMergingConfig.tomesd(0.5)) as handle:
        run = next(iter(pipe.scheduler.step.accel_clock._listeners))
        builds = []
        build = run.method.build

        def record(x, grid):
            plan = build(x, grid)
            builds.append((x.clone(), plan))
            return plan

        run.method.build = record
        family.latents(pipe, steps=2)
        assert handle.stats.plans_built == 2 * len(sites)
        assert handle.stats.plans_reused == 0
        assert handle.stats.share == 0.5
    assert len(builds) == 2 * len(sites)
    destinations = set()
    for x, plan in builds:
        members = as_members(plan)
        grouped = [d for d, m in members.items() if len(m) > 1]
        # One destination per 2x2 cell of the 8 x 12 grid: those drawn are found again from the plan's own noise.
        draw = torch.tensor(len(destinations) + 1)
        dst = matching.destinations(noise.uniform(96, 0, draw)[None], (8, 12), 2)[0].tolist()
        destinations.add(tuple(dst))
        assert set(grouped) <= set(dst)
        assert members == brute_force_merge(x[0], dst, 48)
        reduced = plan.reduce(x)[0]
        for slot, d in enumerate(plan.dst[0].tolist()):
            mean = torch.stack([x[0, n] for n in sorted(members[d])]).mean(0)
            torch.testing.assert_close(reduced[slot], mean, rtol=0, atol=1e-5)
    assert len(destinations) == len(builds)  # drawn anew each time


def test_a_reduced_block_is_x_plus_the_expanded_change():
    pipe = make_pixart()
    block = pipe.transformer.transformer_blocks[1]
    entry, inside, left = [], [], []
    block.register_forward_pre_hook(lambda m, args: entry.append(args[0].clone()))
    config = accel.TokenMergingConfig(
        ratio=0.5, dense_blocks_first=1, dense_blocks_last=1, dense_steps_first=0, dense_steps_last=0
    )
    # Hooks run in the order in which they were attached: this one sees the block before accel does.
    block.register_forward_hook(lambda m, args, out: inside.append((args[0].clone(), out.clone())))
    with accel.accelerate(pipe, config):
        block.register_forward_hook(lambda m, args, out: left.append(out.clone()))
        group = next(iter(pipe.scheduler.step.accel_clock._listeners)).method.groups[0]
        plans, plan_for = [], group.spans[0][0].plan_for
        group.spans[0][0].plan_for = lambda x: plans.append(plan_for(x)) or plans[-1]
        pipe(**FAMILIES["pixart"].call(steps=1))
    ((reduced, computed),) = inside
    assert reduced.shape == (1, 48, 32)
    assert torch.equal(reduced, plans[0].reduce(entry[0]))
    assert torch.equal(left[0], entry[0] + plans[0].expand(computed - reduced))
