"""Means of segments: one program a slot and block of channels walks the slot's list, in its order, so that two runs
are equal. Measured on an H100 (N 4096, K 2048, C 3072, bfloat16): 16.3 us, the bytes take 13.0.

Shapes: B batch, N tokens, K slots, D channels, P plan rows (1 or B).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.launch import ceil_div, channels, launch
from accel.kernels.plan.triton import segments as list_segments


@triton.jit(do_not_specialize=["N", "K", "stride"])
def mean(x, segments, out, N, K, stride, D: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    slot = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2)
    inside = d < D
    lists = segments + b.to(tl.int64) * stride
    j = tl.load(lists + slot)
    last = tl.load(lists + slot + 1)
    count = last - j
    rows = x + b.to(tl.int64) * N * D + d
    total = tl.zeros((BLOCK,), tl.float32)
    while j < last:
        for ahead in tl.static_range(AT_ONCE):
            n = tl.load(lists + K + 1 + j + ahead, mask=j + ahead < last, other=0).to(tl.int64)
            live = tl.full((BLOCK,), j + ahead, tl.int32) < last
            if D % BLOCK == 0:
                total += tl.load(rows + n * D, mask=live, other=0.0).to(tl.float32)
            else:
                total += tl.load(rows + n * D, mask=live & inside, other=0.0).to(tl.float32)
        j += AT_ONCE
    y = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + (b.to(tl.int64) * K + slot) * D + d, y.to(out.dtype.element_ty), mask=inside)


def merge(x_BNC: Tensor, owner_PN: Tensor, size_PK: Tensor, segments: Tensor | None) -> Tensor:
    B, N, D = x_BNC.shape
    P, K = size_PK.shape
    lists = list_segments(owner_PN, K)[1] if segments is None else segments
    out = x_BNC.new_empty(B, K, D)
    block, warps = channels(D)
    launch(mean, (K, ceil_div(D, block), B), x_BNC, lists, out, N, K, lists.shape[1] if P > 1 else 0,
           D=D, BLOCK=block, AT_ONCE=2, num_warps=warps)  # fmt: skip
    return out
