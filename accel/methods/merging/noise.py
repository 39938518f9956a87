"""Random numbers for choosing tokens, from a counter and no generator.

A hash of (seed, draw, position) touches neither the pipeline's nor the global generator, gives the same
numbers on every device, and can be traced by torch.compile, which a `torch.Generator` cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(count: int, seed: int, draw: Tensor) -> Tensor:
    """(count,) float32 in [0, 1), on the device of `draw`, an int64 scalar that numbers the draws.

    Two rounds of the finaliser of MurmurHash3 (A. Appleby, public domain).
    """
    x = torch.arange(count, device=draw.device, dtype=torch.int64)
    x = _mix(x + _mix(draw + ((seed * 0x9E3779B9 + 1) & _MASK)))
    return (x >> 8).float() / (1 << 24)  # 24 bits: all that float32 holds, so that 1.0 cannot appear


def _mix(x: Tensor) -> Tensor:
    # int64 products wrap around; the low 32 bits are right all the same.
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
