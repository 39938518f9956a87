"""Fréchet distance between Gaussians fitted to features (Heusel et al., 1706.08500: FID).

Moments are streamed in float64 (Chan et al.'s pairwise update), so memory does not grow with the
number of images. The matrix square root is taken by symmetric eigendecomposition instead of
scipy's `sqrtm`: tr (C1 C2)^1/2 = tr (C1^1/2 C2 C1^1/2)^1/2, whose argument is symmetric and positive
semidefinite, so nothing complex can appear and nothing needs an epsilon on the diagonal. That, the moments
and the refusal of too few images are why this is by hand; torchmetrics and clean-fid are what the tests compare with.

Shapes: N images, D features.
"""

from __future__ import annotations

import torch

from accel.evaluation.errors import EvaluationError


class Moments:
    """Running mean (D,) and covariance (D, D) of features, float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: torch.Tensor | None = None
        self._scatter: torch.Tensor | None = None  # sum of (x - mean)(x - mean)^T

    def update(self, features_ND: torch.Tensor) -> None:
        """Add a batch of features."""
        x = features_ND.detach().to(torch.float64)
        if x.ndim != 2:
            raise ValueError(f"features must be (N, D), not {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError("features contain NaN or infinity")
        if not len(x):
            return
        mean = x.mean(0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the moments another process streamed."""
        if other.mean is not None and other._scatter is not None:
            self._merge(other.n, other.mean, other._scatter)

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (D, D). `EvaluationError` if n <= D: it would be singular."""
        if self.mean is None or self._scatter is None:
            raise EvaluationError("no features: nothing to take a covariance of")
        if self.n <= len(self.mean):
            raise EvaluationError(
                f"n = {self.n} images are too few for the covariance of {len(self.mean)} features "
                f"(at least {len(self.mean) + 1}); KID has no such limit"
            )
        return self._scatter / (self.n - 1)

    def _merge(self, n: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self.mean is None or self._scatter is None:
            self.n, self.mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features have {len(mean)} dimensions, before they had {len(self.mean)}")
        total = self.n + n
        delta = mean - self.mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two Gaussians; lower is closer."""
    a, b = covariance_a.to(torch.float64), covariance_b.to(torch.float64)
    values, vectors = torch.linalg.eigh(a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mean_a.to(torch.float64) - mean_b.to(torch.float64)).square().sum()
    # Rounding can leave a distance of equal Gaussians a hair below zero.
    return max(float(shift + a.trace() + b.trace() - 2 * cross), 0.0)


class FrechetDistance:
    """FID as update/compute. Which extractor made the features belongs beside every value."""

    name = "fid"
    higher_is_better = False

    def __init__(self) -> None:
        self.reference, self.samples = Moments(), Moments()

    def update(self, features_ND: torch.Tensor, *, reference: bool) -> None:
        (self.reference if reference else self.samples).update(features_ND)

    def compute(self) -> float:
        a, b = self.reference, self.samples
        covariances = a.covariance, b.covariance  # both raise before a mean could be missing
        assert a.mean is not None
        assert b.mean is not None
        return frechet_distance(a.mean, covariances[0], b.mean, covariances[1])
