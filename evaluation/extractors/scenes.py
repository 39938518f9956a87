"""Features for the built-in scenes world: a small CNN that counts shape-colour pairs in a picture.

Inception has never seen such pictures, and it is a 95 MB download; this network is trained on rendered scenes
(`examples/train_scenes_extractor.py`) and its penultimate layer has 64 features, so that a
covariance can be estimated from a hundred images. A distance measured with it says so and is not
comparable to a published FID.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from accel.evaluation.errors import WeightsError
from accel.evaluation.weights import fingerprint

WEIGHTS = Path(__file__).parent / "scenes_extractor.safetensors"
SIZE = 64  # pixels; every picture is brought to this size first


class ScenesNet(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> features (B, 64) and logits (B, `outputs`)."""

    def __init__(self, outputs: int, width: int = 32, features: int = 64) -> None:
        super().__init__()
        channels = (3, width, width * 2, width * 4, width * 4)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.GroupNorm(8, after),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            )
            for before, after in itertools.pairwise(channels)
        )
        # Mean *and* maximum over positions: the mean carries how much there is, the maximum that
        # something is there at all.
        self.project = nn.Linear(2 * channels[-1], features)
        self.head = nn.Linear(features, outputs)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = images * 2 - 1
        for stage in self.stages:
            x = stage(x)
        return self.project(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.silu(self.features(images)))


class ScenesExtractor:
    """The packaged network's 64 features; `path` names another trained file."""

    def __init__(self, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        from safetensors.torch import load_file

        file = Path(path) if path else WEIGHTS
        if not file.is_file():
            raise WeightsError(
                f"{file}: the scenes extractor's weights are missing; "
                "train them with: python examples/train_scenes_extractor.py"
            )
        try:
            weights = load_file(file)
            self._model = ScenesNet(outputs=len(weights["head.bias"]))
            self._model.load_state_dict(weights)
        except Exception as error:  # safetensors has its own exception type, outside every tree
            raise WeightsError(f"{file}: not the scenes extractor's weights: {error}") from error
        self._model.to(device).eval()
        self._device = device
        self.dim = self._model.project.out_features
        self.name = f"scenes:{file.name}@{fingerprint(self._model)}"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self._device).float() / 255
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        return self._model.features(x).float().cpu()
