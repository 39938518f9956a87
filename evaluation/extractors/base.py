"""What a feature extractor is: a name that identifies it, a size, and a function of images."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image


class Extractor(Protocol):
    """`images` (B, 3, H, W) uint8 -> features (B, `dim`) float32 on the CPU.

    `name` holds the family, the source and a fingerprint of the weights; features of two names never
    enter one number.
    """

    name: str
    dim: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


def resize_clean(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize as clean-fid does (Parmar et al., 2104.11222): PIL bicubic with its antialiasing, per
    channel in float, clipped, not quantised. (B, 3, H, W) uint8 -> (B, 3, size, size) float in [0, 255].
    """
    channels = images.cpu().flatten(0, 1).numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))
        for channel in channels
    ]
    stacked = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return stacked.view(len(images), 3, size, size)


def resize_and_crop(images: torch.Tensor, resize: int, crop: int) -> torch.Tensor:
    """Shorter edge to `resize` (PIL bicubic on uint8, as CLIP's and DINOv2's own processors), centre
    crop. (B, 3, H, W) uint8 -> (B, 3, crop, crop) float in [0, 1]."""
    output = []
    for image in images.cpu().permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image)
        scale = resize / min(picture.size)
        width, height = (int(edge * scale) for edge in picture.size)
        picture = picture.resize((max(width, resize), max(height, resize)), Image.Resampling.BICUBIC)
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        output.append(np.array(picture.crop((left, top, left + crop, top + crop))))
    return torch.from_numpy(np.stack(output)).permute(0, 3, 1, 2).float() / 255
