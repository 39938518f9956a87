"""Kernel distances between feature sets: KID (Bińkowski et al., 1801.01401) and CMMD (Jayasumana
et al., 2401.09603).

Both take features as arrays or memory-mapped files, (N, D), and read them in blocks: no N x N
matrix is held. By hand because torchmetrics' and clean-fid's KID know independent sets only; ours here
are mostly pairs of one prompt and noise, whose resemblance has to be left out (`paired`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

_BLOCK = 1024


class KernelDistance(NamedTuple):
    """`value` and, where subsets were drawn, the standard deviation over them."""

    value: float
    std: float | None


def kernel_inception_distance(
    features_a: Any,
    features_b: Any,
    *,
    paired: bool = False,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """KID: unbiased MMD^2 with the kernel (x.y / D + 1)^3; lower is closer, can be below zero.

    With at most `subset_size` images a side all are used, once; otherwise the mean over `subsets`
    random subsets, as published.

    `paired`: row i of both comes from one prompt. Such images resemble each other more than
    images of the two distributions do, so their kernels are left out of the mean between the sets, as
    those of an image with itself are within them (Gretton et al. 2012, lemma 6). With them a set that
    is nearly its own pair gets a KID far below zero.
    """
    a, b = _checked(features_a), _checked(features_b)
    if paired and len(a) != len(b):
        raise ValueError(f"paired sets must have one length: {len(a)}, {len(b)}")
    size = min(len(a), len(b), subset_size)
    if size < 2:
        raise ValueError(f"KID needs at least 2 images a side, not {len(a)} and {len(b)}")
    kernel = _polynomial(a.shape[1])
    if len(a) <= subset_size and len(b) <= subset_size:
        return KernelDistance(_mmd(a, b, kernel, unbiased=True, paired=paired), None)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):  # sorted: a memory-mapped file is then read front to back
        rows_a = np.sort(rng.choice(len(a), size, replace=False))
        rows_b = rows_a if paired else np.sort(rng.choice(len(b), size, replace=False))
        values.append(_mmd(a[rows_a], b[rows_b], kernel, unbiased=True, paired=paired))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def cmmd(features_a: Any, features_b: Any) -> float:
    """CMMD: 1000 x MMD^2 (biased, as published) with a Gaussian kernel of sigma 10 on unit-length
    CLIP embeddings; lower is closer. The published numbers use ViT-L/14@336."""
    a, b = _checked(features_a), _checked(features_b)

    def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
        return torch.exp((x @ y.T - 1) / 100)  # exp(-|x - y|^2 / (2 sigma^2)) for unit vectors

    return 1000 * _mmd(a, b, gaussian, unbiased=False)


def _polynomial(dimensions: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, y: (x @ y.T / dimensions + 1) ** 3


def _mmd(
    a: np.ndarray,
    b: np.ndarray,
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    unbiased: bool,
    paired: bool = False,
) -> float:
    n, m = len(a), len(b)
    cross = sum(float(kernel(x, y).sum()) for x in _blocks(a) for y in _blocks(b))
    if paired:
        cross -= sum(
            float(kernel(x, y).diagonal().sum()) for x, y in zip(_blocks(a), _blocks(b), strict=True)
        )
    cross /= n * (m - 1) if paired else n * m
    within = []
    for features, count in ((a, n), (b, m)):
        total = sum(float(kernel(x, y).sum()) for x in _blocks(features) for y in _blocks(features))
        if unbiased:
            total -= sum(float(kernel(x, x).diagonal().sum()) for x in _blocks(features))
        within.append(total / (count * (count - 1) if unbiased else count * count))
    return within[0] + within[1] - 2 * cross


def _blocks(features: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(features), _BLOCK):
        yield torch.from_numpy(np.array(features[start : start + _BLOCK], dtype=np.float64))


def _checked(features: Any) -> np.ndarray:
    array = features if isinstance(features, np.ndarray) else np.asarray(features)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"features must be a non-empty (N, D), not {array.shape}")
    return array
