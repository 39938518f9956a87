"""Inception features of FID as everybody computes it: the TorchScript port of the 2015 TensorFlow
network that StyleGAN and clean-fid use, from a path the user names.

Resized as clean-fid does, to the bit (a test compares). Not by it: clean-fid depends on torchvision, which pins one
exact torch, so that installing it would replace the user's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from accel.evaluation.errors import WeightsError
from accel.evaluation.textfiles import first_line
from accel.evaluation.weights import WeightFile

from .base import resize_clean

INCEPTION = WeightFile(
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)


class InceptionExtractor:
    """2048 pool features, images resized the clean-fid way.

    The file is TorchScript, that is, a program: it is run only if its SHA-256 is the published one
    (or the `sha256` given for a file of one's own).
    """

    dim = 2048

    def __init__(
        self, path: str | Path, *, sha256: str | None = None, device: str | torch.device = "cpu"
    ) -> None:
        file = INCEPTION.check(path, sha256)
        try:
            self._layers = torch.jit.load(str(file), map_location=device).eval().layers
        except (RuntimeError, AttributeError) as error:
            raise WeightsError(
                f"{file}: not the Inception TorchScript module: {first_line(error)}"
            ) from error
        self._device = device
        self.name = f"inception:{INCEPTION.name}@{(sha256 or INCEPTION.sha256)[:8]}"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        resized = resize_clean(images, 299).to(self._device)
        return self._layers.forward((resized - 128) / 128).flatten(1).float().cpu()
