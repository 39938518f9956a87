"""Features for the built-in scenes world: a small CNN that was taught what is in a picture and how clean it is.

Inception has never seen such pictures, and it is a 95 MB download; this network (0.2 M parameters) is
trained on rendered scenes (`examples/train_scenes_extractor.py`; the card beside the weights has recipe and
measured behaviour). It has only 32 features, so that a covariance can be estimated from a hundred images. A
distance measured with it says so and is not comparable to a published FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from accel.evaluation.errors import WeightsError
from accel.evaluation.weights import fingerprint

WEIGHTS = Path(__file__).parent / "scenes_extractor.safetensors"
SIZE = 128  # pixels; every picture is brought to this size first
FEATURES = 32


class ScenesNet(nn.Module):
    """(B, 3, 128, 128) in [0, 1] -> features (B, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _stage(3, 16, 5, stride=2),
            _stage(16, 32, 3, stride=2),
            _stage(32, 64, 3, stride=2),
            _stage(64, 64, 3, stride=1),
            _stage(64, 96, 3, stride=2),
            _stage(96, 96, 3, stride=1),
        )
        self.places = nn.Conv2d(96, 8, 1)
        # The mean over positions carries how much there is, the maximum that something is there at all,
        # the places where it is.
        self.project = nn.Linear(2 * 96 + 8 * (SIZE // 16) ** 2, FEATURES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stages(images * 2 - 1)
        return self.project(torch.cat([x.mean((2, 3)), x.amax((2, 3)), self.places(x).flatten(1)], 1))


def _stage(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, after), nn.SiLU())


class ScenesExtractor:
    """The packaged network's 32 features; `path` names another trained file."""

    def __init__(self, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        from safetensors.torch import load_file

        file = Path(path) if path else WEIGHTS
        if not file.is_file():
            raise WeightsError(
                f"{file}: the scenes extractor's weights are missing; "
                "train them with: python examples/train_scenes_extractor.py"
            )
        self._model = ScenesNet()
        try:
            self._model.load_state_dict(load_file(file))
        except Exception as error:  # safetensors has its own exception type, outside every tree
            raise WeightsError(f"{file}: not the scenes extractor's weights: {error}") from error
        self._model.to(device).eval()
        self._device = device
        self.dim = FEATURES
        self.name = f"scenes{f':{file.name}' if path else ''}@{fingerprint(self._model)}"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self._device).float() / 255
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        return self._model(x).float().cpu()
