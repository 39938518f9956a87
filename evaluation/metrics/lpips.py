"""LPIPS (Zhang et al., 1801.03924), version 0.1, AlexNet trunk.

torchmetrics' LPIPS cannot be given weights: it takes its trunk from torchvision, which downloads it and has to match
torch exactly. So the trunk's five convolutions are written out here, for torchvision's AlexNet file at a path, checked
by its hash; the linear heads (6 kB) are torchmetrics', and so is the answer that the tests compare with.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from accel.evaluation.weights import WeightFile, load_pickle_free, require_module

from .pixel import as_float

ALEXNET = WeightFile(
    name="alexnet-owt-7be5be79.pth",
    sha256="7be5be79",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
# The statistics LPIPS normalises with, given for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs; 0 for identical ones, lower is closer."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU()),
                nn.Sequential(pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
                nn.Sequential(pool, nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
            ]
        )
        self.heads = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in (64, 192, 384, 256, 256))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, trunk: str | Path, heads: str | Path | None = None, *, sha256: str | None = None) -> LPIPS:
        """Load torchvision's AlexNet file from `trunk`; `heads` defaults to torchmetrics' copy.

        Raises `WeightsError` with path, expected hash and source if a file is missing or another.
        """
        file = ALEXNET.check(trunk, sha256)
        if heads is None:
            folder = Path(require_module("torchmetrics", "LPIPS' linear heads").__file__ or "").parent
            heads = folder / "functional" / "image" / "lpips_models" / "alex.pth"
        convolutions = load_pickle_free(file)
        linear = load_pickle_free(Path(heads))
        model = cls()
        for stage, index in zip(model.stages, (0, 3, 6, 8, 10), strict=True):
            convolution = next(layer for layer in stage.modules() if isinstance(layer, nn.Conv2d))
            convolution.load_state_dict(
                {key: convolutions[f"features.{index}.{key}"] for key in ("weight", "bias")}
            )
        for number, head in enumerate(model.heads):
            head.copy_(linear[f"lin{number}.model.1.weight"])
        return model

    def forward(self, images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
        """Distances (B,) of image pairs (B, 3, H, W), uint8 or float in [0, 1]."""
        a, b = self._normalised(images_a), self._normalised(images_b)
        total = torch.zeros(len(a), device=a.device)
        for stage, head in zip(self.stages, self.heads, strict=True):
            a, b = stage(a), stage(b)
            difference = (_unit(a) - _unit(b)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        images = as_float(images).to(self.heads[0]) * 2 - 1
        return (images - self.shift) / self.scale


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features, dim=1, eps=1e-10)
