"""Feature extractors for FID, KID, CMMD, precision/recall and CLIP score.

`load("inception:PATH")`, `load("clip:FOLDER_OR_HUB_ID")`, `load("dinov2:FOLDER_OR_HUB_ID")`,
`load("scenes")`.
"""

from __future__ import annotations

import torch

from accel.evaluation.errors import EvaluationError

from .base import Extractor
from .hub import ClipExtractor, Dinov2Extractor
from .inception import InceptionExtractor
from .scenes import ScenesExtractor

__all__ = [
    "ClipExtractor",
    "Dinov2Extractor",
    "Extractor",
    "InceptionExtractor",
    "ScenesExtractor",
    "load",
]


def load(spec: str, *, device: str | torch.device = "cpu") -> Extractor:
    """Load an extractor from `KIND:SOURCE`; `scenes` needs no source, its weights are packaged."""
    kind, _, source = spec.partition(":")
    if kind == "scenes":
        return ScenesExtractor(source or None, device=device)
    if kind == "inception" and source:
        return InceptionExtractor(source, device=device)
    if kind == "clip" and source:
        return ClipExtractor(source, device=device)
    if kind == "dinov2" and source:
        return Dinov2Extractor(source, device=device)
    raise EvaluationError(
        f"extractor {spec!r}: expected scenes, inception:PATH, clip:FOLDER_OR_HUB_ID or "
        "dinov2:FOLDER_OR_HUB_ID"
    )
