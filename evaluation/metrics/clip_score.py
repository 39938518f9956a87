"""CLIP score (Hessel et al., 2104.08718): how well an image fits its prompt, 100 x max(cos, 0).

Of embeddings: torchmetrics' loads a model by its hub name, ours come from a folder whose hash is recorded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def clip_score(image_embeddings_BD: torch.Tensor, text_embeddings_BD: torch.Tensor) -> torch.Tensor:
    """Scores (B,) in [0, 100] of image and text embeddings, pair by pair; higher is better."""
    cosine = F.cosine_similarity(image_embeddings_BD.double(), text_embeddings_BD.double())
    return 100 * cosine.clamp(min=0)
