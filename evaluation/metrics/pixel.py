"""Pixel metrics of image pairs: PSNR and SSIM (Wang et al., 2004).

Images are (B, 3, H, W), uint8 or float in [0, 1]. Functions return one value per pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def psnr(images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, (B,); infinite for identical images."""
    a, b = _pair(images_a, images_b)
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


def ssim(images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
    """Structural similarity, (B,): Gaussian window of 11 pixels, sigma 1.5, population covariance,
    mean over colours and over the positions where the window fits, as in the paper."""
    a, b = _pair(images_a, images_b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11 pixels, the images are {a.shape[-2]} x {a.shape[-1]}")
    channels = a.shape[1]
    window = torch.exp(-((torch.arange(11, dtype=a.dtype, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean((1, 2, 3))


class _PairMean:
    """Mean over pairs as update/compute."""

    higher_is_better = True

    def __init__(self) -> None:
        self._sum, self.n = 0.0, 0

    def _add(self, values_B: torch.Tensor) -> None:
        self._sum += float(values_B.double().sum())
        self.n += len(values_B)

    def compute(self) -> float:
        if not self.n:
            raise ValueError("no image pairs")
        return self._sum / self.n


class PSNR(_PairMean):
    name = "psnr"

    def update(self, images_a: torch.Tensor, images_b: torch.Tensor) -> None:
        self._add(psnr(images_a, images_b))


class SSIM(_PairMean):
    name = "ssim"

    def update(self, images_a: torch.Tensor, images_b: torch.Tensor) -> None:
        self._add(ssim(images_a, images_b))


def as_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 or float images as float64 in [0, 1]: SSIM's variances cancel too much in float32."""
    if images.dtype == torch.uint8:
        return images.to(torch.float64) / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], not {images.dtype}")
    return images.to(torch.float64)


def _pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"image pairs must both be (B, C, H, W): {tuple(a.shape)}, {tuple(b.shape)}")
    return as_float(a), as_float(b)
