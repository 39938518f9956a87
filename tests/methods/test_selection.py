"""Selecting tokens, against loops."""

from __future__ import annotations

import pytest
import torch

from accel.core.schedule import Phase, Schedule
from accel.methods.pruning import selection


def test_pool_is_the_mean_of_the_neighbours_there_are():
    score = torch.arange(12.0).view(1, 12)
    pooled = selection.pool(score, (3, 4)).view(3, 4)
    assert pooled[0, 0] == torch.tensor([0.0, 1, 4, 5]).mean()
    assert pooled[1, 1] == torch.tensor([0.0, 1, 2, 4, 5, 6, 8, 9, 10]).mean()


def test_best_first_breaks_ties_of_the_first_key_by_score():
    score = torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    assert selection.best_first(score).tolist() == [[1, 3, 2, 0]]
    assert selection.best_first(score, torch.tensor([[0.0, 1.0, 0.0, 0.5]])).tolist() == [[2, 0, 3, 1]]


def sainte_lague(score, labels, clusters, count):
    """One seat at a time to the cluster with the highest quotient."""
    votes = [score[labels == c].sum().item() for c in range(clusters)]
    members = [
        sorted((labels == c).nonzero().flatten().tolist(), key=lambda i: -score[i]) for c in range(clusters)
    ]
    chosen, taken = [], [0] * clusters
    for _ in range(count):
        open_ = [c for c in range(clusters) if taken[c] < len(members[c])]
        c = max(open_, key=lambda c: votes[c] / (taken[c] + 0.5))
        chosen.append(members[c][taken[c]])
        taken[c] += 1
    return set(chosen)


@pytest.mark.parametrize("count", [1, 7, 20, 40])
def test_balanced_gives_seats_like_a_parliament(count):
    g = torch.Generator().manual_seed(count)
    score = torch.rand(2, 40, generator=g)
    labels = torch.randint(5, (2, 40), generator=g)
    chosen = selection.balanced(selection.best_first(score), score, labels, 5, count)
    for row in range(2):
        assert set(chosen[row].tolist()) == sainte_lague(score[row], labels[row], 5, count)


def test_balanced_takes_what_must_be_computed_first_and_leaves_what_must_not():
    score = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    score[0, :5], score[0, 5:10] = torch.inf, -torch.inf
    labels = torch.arange(40)[None] % 3
    chosen = set(selection.balanced(selection.best_first(score), score, labels, 3, 20)[0].tolist())
    assert set(range(5)) <= chosen
    assert not chosen & set(range(5, 10))
    assert len(chosen) == 20


@pytest.mark.parametrize(
    ("grid", "clusters"), [((8, 12), 6), ((5, 7), 4), ((1, 9), 3), ((3, 3), 9), ((2, 2), 3)]
)
def test_grid_clusters_are_rectangles_of_about_one_size(grid, clusters):
    labels, count = selection.grid_clusters(grid, clusters, torch.device("cpu"))
    assert 1 <= count <= clusters
    assert labels.unique().tolist() == list(range(count))
    area = labels.view(grid)
    for c in range(count):
        rows, columns = (area == c).nonzero(as_tuple=True)
        assert (area == c).sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_kmeans_finds_separate_blobs_and_ends_where_lloyd_does():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 3
    x = (torch.eye(3)[truth] * 10 + torch.randn(60, 3, generator=g))[None]
    labels = selection.kmeans(x, 3)[0]
    assert all(len(labels[truth == c].unique()) == 1 for c in range(3))
    assert len(labels.unique()) == 3
    loose = torch.randn(1, 60, 2, generator=g)
    labels = selection.kmeans(loose, 4, iterations=100)[0]
    centres = torch.stack([loose[0, labels == c].mean(0) for c in range(4)])
    assert torch.equal(torch.cdist(loose[0], centres).argmin(1), labels)  # a fixed point


def test_a_plan_computes_what_was_selected():
    plan = selection.plan_of(torch.tensor([[5, 0, 3]]), 6)
    assert plan.dst.tolist() == [[0, 3, 5]]
    assert plan.owner.tolist() == [[0, -1, -1, 1, -1, 2]]
    x = torch.arange(6.0).view(1, 6, 1)
    assert plan.expand(plan.take(x)).flatten().tolist() == [0, 0, 0, 3, 0, 5]
    y = torch.zeros(2, 6, 1)
    plan.write(y, torch.ones(2, 3, 1))
    assert y[:, :, 0].tolist() == [[1, 0, 0, 1, 0, 1]] * 2
    two = selection.plan_of(torch.tensor([[5, 0], [1, 2]]), 6)
    z = torch.zeros(2, 6, 1)
    two.write(z, torch.ones(2, 2, 1))
    assert z[:, :, 0].tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0]]


def oldest(phases, max_age, choose):
    """Ages when tokens are selected by `choose` except that what is due goes first; the largest of the run."""
    N, worst = 60, 0
    last = torch.zeros(N, dtype=torch.long)
    for step, phase in enumerate(phases):
        count = -(-round(phase.budget * N * 1000) // 1000)
        until = selection.next_opportunity(phases, step) - 1
        score = choose(step, last).masked_fill(until - last > max_age, torch.inf)
        last[score.topk(count).indices] = step
        worst = max(worst, (step - last).max().item())
    return worst


CHOICES = {
    "freshest": lambda step, last: last.float(),
    "same": lambda step, last: torch.arange(60.0),
    "random": lambda step, last: torch.rand(60, generator=torch.Generator().manual_seed(step)),
    "stalest": lambda step, last: -last.float(),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cycle", [(0.3,), (0, 0.25, 0, 1), (0.1,), (0, 0, 0.5), (0.5, 0), (0,), (0.25, 0.6)])
@pytest.mark.parametrize("max_age", [1, 2, 3, 5, 9])
def test_no_choice_of_tokens_breaks_the_bound(choice, cycle, max_age):
    phases = Schedule(cycle, dense_first=2).phases(26)
    kept = selection.bounded(phases, max_age)
    assert oldest(kept, max_age, CHOICES[choice]) <= max_age
    assert all(k.budget in (p.budget, 1) for k, p in zip(kept, phases, strict=True))


def test_a_bound_that_holds_anyway_changes_nothing():
    phases = Schedule((0, 0.25, 0, 1), dense_first=2).phases(26)
    assert selection.bounded(phases, 3) == phases
    assert sum(p.dense for p in selection.bounded(phases, 2)) > sum(p.dense for p in phases)
    assert selection.bounded((Phase(1.0), Phase(0.5), Phase(0.5)), 1) == (Phase(1.0), Phase(0.5), Phase(0.5))
