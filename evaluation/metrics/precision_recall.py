"""Improved precision and recall (Kynkäänniemi et al., 1904.06991) of feature sets.

Precision: the share of samples inside the reference's manifold (realism). Recall: the share of the
reference inside the samples' manifold (coverage). A set's manifold is the union of balls around its
points that reach to their k-th nearest neighbour. Distances are computed in blocks. No package that is kept
up has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kernel import _blocks, _checked

_TIE = 1e-12  # of the squared lengths, some thousand times what float64 rounds


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(reference: Any, samples: Any, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of `samples` (N, D) against `reference` (M, D); higher is better."""
    a, b = _checked(reference), _checked(samples)
    if min(len(a), len(b)) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images a side: {len(a)}, {len(b)}")
    return PrecisionRecall(_covered(b, a, _radii(a, k)), _covered(a, b, _radii(b, k)))


def _radii(points: Any, k: int) -> torch.Tensor:
    """Squared distance of each point to its k-th nearest neighbour, itself excluded."""
    radii = []
    for x in _blocks(points):
        nearest = torch.full((len(x), 0), torch.inf, dtype=x.dtype)
        for y in _blocks(points):
            nearest = torch.cat([nearest, _squares(x, y)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, -1])  # k + 1 because the point itself is among them, at distance 0
    return torch.cat(radii)


def _covered(queries: Any, centres: Any, radii: torch.Tensor) -> float:
    inside = 0
    for x in _blocks(queries):
        hit = torch.zeros(len(x), dtype=torch.bool)
        start = 0
        for y in _blocks(centres):
            slack = _TIE * (x.square().sum(1)[:, None] + y.square().sum(1))
            hit |= (_squares(x, y) <= radii[start : start + len(y)] + slack).any(1)
            start += len(y)
        inside += int(hit.sum())
    return inside / len(queries)


def _squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, M), as a matrix product: pair by pair, 30 000 images a side of 2048 features
    would take hours. It rounds, a point is not at 0 from itself; `_TIE` keeps what lies on the border in."""
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
