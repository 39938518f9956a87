"""Tokens from logits and noise, in plain operations.

Shapes: B images, W slots of a window, V vocabulary, R slots of the ring of noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verify(
    logits_BWV: Tensor, noise_BRV: Tensor, slot_BW: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    return (probabilities(logits_BWV, temperature, top_k) / noise_at(noise_BRV, slot_BW)).argmax(-1)


def probabilities(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """(..., V) float32 of the tokens that are at least as likely as the top_k-th."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1)


def noise_at(noise_BRV: Tensor, slot_BW: Tensor) -> Tensor:
    """(B, W, V) noise of slots, from the ring."""
    ring, vocabulary = noise_BRV.shape[1:]
    return noise_BRV.gather(1, (slot_BW % ring)[..., None].expand(-1, -1, vocabulary))
