"""Pixel metrics of image pairs: PSNR and SSIM (Wang et al., 2004), by torchmetrics.

Images are (B, 3, H, W), uint8 or float in [0, 1]. Functions return one value per pair, float64.

torchmetrics is imported when a value is asked for: it takes seconds, and fails beside a torchvision that does not
match torch.
"""

from __future__ import annotations

import torch

from accel.evaluation.weights import require_module

_BORDER = 5  # half of SSIM's window of 11 pixels


def psnr(images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, (B,); infinite for identical images."""
    a, b = _pair(images_a, images_b)
    image = require_module("torchmetrics.functional.image", "PSNR")
    return image.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
    """Structural similarity, (B,), 1 for identical images: Gaussian window of 11 pixels, sigma 1.5, population
    covariance, mean over colours and over the positions where the window fits, as in the paper. (torchmetrics' own
    mean takes in the borders, where it sees mirrored pixels.)
    """
    a, b = _pair(images_a, images_b)
    if min(a.shape[-2:]) < 2 * _BORDER + 1:
        raise ValueError(f"SSIM's window is 11 pixels, the images are {a.shape[-2]} x {a.shape[-1]}")
    if a.device.type == "cpu":
        # Grouped convolutions of doubles take 20 times as long there; what is lost was 7e-6 at most, on flat images.
        # CUDA's of floats keep 10 bits, too few for a difference of squares.
        a, b = a.float(), b.float()
    image = require_module("torchmetrics.functional.image", "SSIM")
    _, map_BCHW = image.structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = map_BCHW[..., _BORDER:-_BORDER, _BORDER:-_BORDER].double().mean((1, 2, 3))
    return inside.masked_fill((a == b).flatten(1).all(1), 1.0)  # rounding would leave flat ones beside it


def as_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 or float images as float64 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.to(torch.float64) / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], not {images.dtype}")
    return images.to(torch.float64)


def _pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"image pairs must both be (B, C, H, W): {tuple(a.shape)}, {tuple(b.shape)}")
    return as_float(a), as_float(b)
