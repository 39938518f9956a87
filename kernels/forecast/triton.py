"""Forecasts by divided differences, one pass over what is kept. Measured on an H100 (4096 tokens of 64 channels,
bfloat16): 2.1 us, the bytes take 0.9.

Shapes: L numbers of a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.launch import ceil_div, launch

from . import stamps_layout

_BLOCK = 1024


@triton.jit(do_not_specialize=["run", "inner"])
def newton(v0, v1, v2, s0, s1, s2, out, now, trend, L, run, inner, ORDER: tl.constexpr, SCALAR: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < L
    if SCALAR:
        t0 = tl.load(s0)
        t1 = tl.load(s1)
    else:
        at = (i // run) * inner + i % inner
        t0 = tl.load(s0 + at, mask=inside, other=0.0)
        t1 = tl.load(s1 + at, mask=inside, other=0.0)
    newest = tl.load(v0 + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(v1 + i, mask=inside, other=0.0).to(tl.float32)
    first = (newest - second) / (t0 - t1)
    reach = now - t0
    # t == t is false for NaN: there is no such value.
    change = tl.where(t1 == t1, first * reach, 0.0)
    if ORDER == 2:
        if SCALAR:
            t2 = tl.load(s2)
        else:
            t2 = tl.load(s2 + at, mask=inside, other=0.0)
        third = tl.load(v2 + i, mask=inside, other=0.0).to(tl.float32)
        bend = (first - (second - third) / (t1 - t2)) / (t0 - t2)
        change += tl.where(t2 == t2, bend * (reach * (now - t1)), 0.0)
    tl.store(out + i, (newest + trend * change).to(out.dtype.element_ty), mask=inside)


@triton.jit
def corrected(prediction, latest, missed, share, out, L, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < L
    now = tl.load(prediction + i, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(latest + i, mask=inside, other=0.0).to(tl.float32)
    value = now + (tl.load(share) * (now - before) - tl.load(missed + i, mask=inside, other=0.0))
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def forecast(values: Sequence[Tensor], stamps: Sequence[Tensor], now: float, trend: float) -> Tensor:
    layout = stamps_layout(values[0], stamps[0])
    assert layout is not None
    L = values[0].numel()
    out = torch.empty_like(values[0])
    # Of order 1, the third pointers are not read.
    launch(newton, (ceil_div(L, _BLOCK),), *values[:2], values[-1], *stamps[:2], stamps[-1], out, float(now),
           float(trend), L, *layout, ORDER=len(values) - 1, SCALAR=stamps[0].numel() == 1, BLOCK=_BLOCK,
           num_warps=4)  # fmt: skip
    return out


def correct(prediction: Tensor, latest: Tensor, missed: Tensor, share: Tensor) -> Tensor:
    L = prediction.numel()
    out = torch.empty_like(prediction)
    launch(
        corrected,
        (ceil_div(L, _BLOCK),),
        prediction,
        latest,
        missed,
        share,
        out,
        L,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out
