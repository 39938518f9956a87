"""The tokens that logits and noise give: what decides whether drafts stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.kernels.dispatch import FLOATS, Op, close

from . import reference
from .reference import noise_at, probabilities

__all__ = ["noise_at", "probabilities", "verify"]

#: One program holds a slot's logits in its registers; beyond, the reference.
MOST = 16384


def _suits(
    logits_BWV: Tensor, noise_BRV: Tensor, slot_BW: Tensor, temperature: float, top_k: int | None
) -> bool:
    return (
        logits_BWV.dtype in FLOATS
        and noise_BRV.dtype == torch.float32
        and slot_BW.dtype == torch.int64
        and temperature > 0
        and noise_BRV.shape[2] == logits_BWV.shape[2] <= MOST
    )


def _agrees(args: Sequence[Any], found: Tensor, truth: Tensor) -> str | None:
    """By the score of what is chosen, never by what it is: two tokens may be equally good."""
    logits_BWV, noise_BRV, slot_BW, temperature, top_k = args
    if not bool(((found >= 0) & (found < logits_BWV.shape[2])).all()):
        return "a token outside of the vocabulary"
    score_BWV = reference.probabilities(logits_BWV, temperature, top_k) / reference.noise_at(
        noise_BRV, slot_BW
    )
    chosen, most = (score_BWV.gather(-1, token[..., None]) for token in (found, truth))
    return close(chosen / most, torch.ones_like(most))


_OP = Op(
    "verify",
    "(Tensor logits, Tensor noise, Tensor slot, float temperature, int? top_k) -> Tensor",
    reference.verify,
    suits=_suits,
    agrees=_agrees,
)


def verify(
    logits_BWV: Tensor, noise_BRV: Tensor, slot_BW: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """(B, W) int64: argmax p / e, an exact sample of p = softmax(logits / temperature) among the top_k most likely
    tokens. With a slot's own noise it is the token of plain decoding, whatever the draft was.

    Args:
        noise_BRV: float32, of an exponential distribution; slot n's is at n mod R.
        slot_BW: int64, the slot that each row of logits is for.
        temperature: above 0.
        top_k: None: all.
    """
    return _OP(logits_BWV, noise_BRV, slot_BW, temperature, top_k)
