"""Which tokens to compute at a partial step. Pure functions; everything stays on the device, with fixed shapes.

Shapes: G plan rows, N = H*W tokens, C clusters, K selected, F features. Scores are (G, N), larger is computed
first; +inf: must be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.core.plan import TokenPlan
from accel.core.schedule import Phase


def pool(score_GN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the 3x3 neighbourhood: errors move with the picture's parts, a single token is noise."""
    map_G1HW = score_GN.view(-1, 1, *grid)
    return F.avg_pool2d(map_G1HW, 3, stride=1, padding=1, count_include_pad=False).flatten(1)


def best_first(score_GN: Tensor, before_GN: Tensor | None = None) -> Tensor:
    """(G, N) positions ordered by score; with `before`, by that (smallest first) and by score among equals."""
    order_GN = score_GN.argsort(dim=1, descending=True, stable=True)
    if before_GN is None:
        return order_GN
    again_GN = before_GN.gather(1, order_GN).argsort(dim=1, stable=True)
    return order_GN.gather(1, again_GN)


def balanced(order_GN: Tensor, score_GN: Tensor, labels_GN: Tensor, clusters: int, count: int) -> Tensor:
    """(G, count): the best of every cluster, each with a share of the seats proportional to its total score.

    The quotas of CAT Pruning (arXiv:2502.00433) without counting on the host: seats are given as in a
    parliament, by Sainte-Lague: the r-th token of a cluster bids votes / (r + 1/2), the highest bids win.
    """
    finite_GN = torch.where(score_GN.isinf(), 0.0, score_GN) + torch.finfo(torch.float32).tiny
    votes_GC = finite_GN.new_zeros(score_GN.shape[0], clusters).scatter_add(1, labels_GN, finite_GN)
    by_cluster_GN = labels_GN.gather(1, order_GN).argsort(dim=1, stable=True)
    order_GN = order_GN.gather(1, by_cluster_GN)
    label_GN = labels_GN.gather(1, order_GN)
    size_GC = torch.zeros_like(votes_GC).scatter_add(1, labels_GN, torch.ones_like(finite_GN))
    first_GC = size_GC.cumsum(1) - size_GC
    rank_GN = torch.arange(order_GN.shape[1], device=order_GN.device) - first_GC.gather(1, label_GN)
    bid_GN = votes_GC.gather(1, label_GN) / (rank_GN + 0.5)
    sorted_GN = score_GN.gather(1, order_GN)
    bid_GN = torch.where(sorted_GN.isinf(), sorted_GN, bid_GN)  # must be computed, must not be
    return order_GN.gather(1, bid_GN.topk(count, dim=1).indices)


def grid_clusters(grid: tuple[int, int], clusters: int, device: torch.device) -> tuple[Tensor, int]:
    """(1, N) labels of rectangles of about equal size, at most `clusters` of them, and how many they are."""
    height, width = grid
    # As square as they come: the number of rows of rectangles whose sides differ least.
    choices = [(r, clusters // r) for r in range(1, clusters + 1) if r <= height and clusters // r <= width]
    rows, columns = min(choices, key=lambda rc: (abs(height / rc[0] - width / rc[1]), -rc[0] * rc[1]))
    row_H = torch.arange(height, device=device) * rows // height
    column_W = torch.arange(width, device=device) * columns // width
    return (row_H[:, None] * columns + column_W).view(1, -1), rows * columns


def kmeans(features_GNF: Tensor, clusters: int, iterations: int = 10) -> Tensor:
    """(G, N) labels. Fixed iterations, centres started at evenly spaced tokens: no random numbers, no waiting."""
    N = features_GNF.shape[1]
    start = torch.arange(clusters, device=features_GNF.device) * N // clusters
    centres_GCF = features_GNF[:, start]
    for _ in range(iterations):
        labels_GN = torch.cdist(features_GNF, centres_GCF).argmin(2)
        # One-hot products rather than scatter_add: that uses atomics on CUDA, and two runs would differ.
        member_GCN = F.one_hot(labels_GN, clusters).to(features_GNF.dtype).transpose(1, 2)
        size_GC1 = member_GCN.sum(2, keepdim=True)
        centres_GCF = torch.where(
            size_GC1 > 0, member_GCN @ features_GNF / size_GC1.clamp(min=1), centres_GCF
        )
    return torch.cdist(features_GNF, centres_GCF).argmin(2)


def plan_of(selected_GK: Tensor, tokens: int) -> TokenPlan:
    """Compute the selected positions, in the order of the grid; the others keep what they are."""
    dst_GK = selected_GK.sort(dim=1).values
    slots = torch.arange(dst_GK.shape[1], device=dst_GK.device).expand_as(dst_GK)
    owner_GN = dst_GK.new_full((dst_GK.shape[0], tokens), -1).scatter(1, dst_GK, slots)
    size_GK = torch.ones_like(dst_GK, dtype=torch.float32)
    return TokenPlan(dst_GK, owner_GN, size_GK, complete=False)


def next_opportunity(phases: Sequence[Phase], step: int) -> int:
    """The first step after `step` at which tokens are computed; the end of the run if there is none."""
    return next((s for s in range(step + 1, len(phases)) if phases[s].budget > 0), len(phases))


def bounded(phases: Sequence[Phase], max_age: int) -> tuple[Phase, ...]:
    """Make steps dense where otherwise some token might go more than `max_age` steps without being computed.

    Decided before the run, for the worst choice of tokens: at every step the freshest ones again, unless they
    are due. The selection computes first what is due, so that what holds for the worst choice holds for all.
    """
    result = list(phases)
    last: list[tuple[int, float]] = [
        (-1, 1.0)
    ]  # (step, share of the tokens computed last at it), oldest first
    for step, phase in enumerate(phases):
        until = step if phase.budget == 0 else next_opportunity(phases, step) - 1
        due = sum(share for s, share in last if until - s > max_age)
        if step > 0 and phase.budget < 1 and due > phase.budget + 1e-9:
            result[step] = replace(phase, budget=1.0)
        budget = result[step].budget
        if budget > 0:
            last = [*_without(last, until - max_age, budget), (step, budget)]
    return tuple(result)


def _without(last: list[tuple[int, float]], due: int, budget: float) -> list[tuple[int, float]]:
    """Take `budget` away: first all that was computed before step `due`, then from the freshest."""
    budget -= sum(share for step, share in last if step < due)
    kept = []
    for step, share in reversed([entry for entry in last if entry[0] >= due]):
        taken = min(share, max(budget, 0.0))
        budget -= taken
        if share - taken > 1e-9:
            kept.append((step, share - taken))
    return kept[::-1]
