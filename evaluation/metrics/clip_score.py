"""CLIP score (Hessel et al., 2104.08718): how well an image fits its prompt, 100 x max(cos, 0).

Of embeddings: torchmetrics' loads a model by its hub name, ours come from a folder whose hash is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from .pixel import _PairMean


class _Embedder(Protocol):
    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def text(self, prompts: Sequence[str]) -> torch.Tensor: ...


def clip_score(image_embeddings_BD: torch.Tensor, text_embeddings_BD: torch.Tensor) -> torch.Tensor:
    """Scores (B,) in [0, 100] of image and text embeddings, pair by pair; higher is better."""
    cosine = F.cosine_similarity(image_embeddings_BD.double(), text_embeddings_BD.double())
    return 100 * cosine.clamp(min=0)


class CLIPScore(_PairMean):
    """CLIP score as update/compute; `embedder` is a `ClipExtractor`."""

    name = "clip_score"
    higher_is_better = True

    def __init__(self, embedder: _Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def update(self, images: torch.Tensor, prompts: Sequence[str]) -> None:
        self._add(clip_score(self.embedder(images), self.embedder.text(prompts)))
