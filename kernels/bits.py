"""Pieces that several kernels share: numbers whose order as integers is the order that is wanted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(f):
    """float32 -> int32 in the same order; -0 is 0."""
    f = tl.where(f == 0, 0.0, f)
    b = f.to(tl.int32, bitcast=True)
    return tl.where(b < 0, b ^ 0x7FFFFFFF, b)


@triton.jit
def number(b):
    """The float32 of an `ordered` int32."""
    return tl.where(b < 0, b ^ 0x7FFFFFFF, b).to(tl.float32, bitcast=True)
