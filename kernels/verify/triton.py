"""Temperature, top-k, softmax, division by noise and argmax of a slot in one program, the top-k by its threshold.

Measured on an H100 together with guidance and the step after it (V 16384, 16 slots, top-k 2048): 41 us; as plain
operations in a graph 186, of which top-k 105.

Shapes: B images, W slots of a window, V vocabulary, R slots of the ring of noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.bits import number, ordered
from accel.kernels.launch import launch, power_of_two


@triton.jit(do_not_specialize=["W", "R", "top_k"])
def drawn(logits, noise, slot, out, temperature, W, R, top_k, V: tl.constexpr, BLOCK: tl.constexpr,
          TOP_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # image * W + slot of the window
    v = tl.arange(0, BLOCK)
    inside = v < V
    logit = tl.load(logits + row * V + v, mask=inside, other=float("-inf")).to(tl.float32) / temperature
    if TOP_K:
        # The top_k-th largest, two bits a round: three counts in one sum, as in `accel.kernels.plan`.
        lowest = -2147483648
        key = tl.where(inside, ordered(logit), lowest)
        level = tl.zeros((), tl.int64)
        one = tl.full((), 1, tl.int64)
        for turn in tl.static_range(16):
            shift = 30 - 2 * turn
            a = (level + (one << shift) + lowest).to(tl.int32)
            b = (level + ((one * 2) << shift) + lowest).to(tl.int32)
            c = (level + ((one * 3) << shift) + lowest).to(tl.int32)
            packed = (
                (key >= a).to(tl.int64) + ((key >= b).to(tl.int64) << 20) + ((key >= c).to(tl.int64) << 40)
            )
            counts = tl.sum(packed, 0)
            passed = ((counts & 0xFFFFF) >= top_k).to(tl.int64)
            passed += (((counts >> 20) & 0xFFFFF) >= top_k).to(tl.int64)
            passed += ((counts >> 40) >= top_k).to(tl.int64)
            level += passed << shift
        # Of the keys, so that the logits need no registers meanwhile.
        logit = tl.where(key >= (level + lowest).to(tl.int32), number(key), float("-inf"))
        logit = tl.where(inside, logit, float("-inf"))
    at = ((row // W) * R + tl.load(slot + row) % R) * V
    exponential = tl.load(noise + at + v, mask=inside, other=1.0)
    p = tl.exp(logit - tl.max(logit, 0))
    score = tl.where(inside, p / tl.sum(p, 0) / exponential, -1.0)
    first = tl.min(tl.where(score == tl.max(score, 0), v, V - 1), 0)
    tl.store(out + row, first.to(tl.int64))


def verify(
    logits_BWV: Tensor, noise_BRV: Tensor, slot_BW: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    B, W, V = logits_BWV.shape
    out = torch.empty_like(slot_BW)
    block = power_of_two(V)
    launch(drawn, (B * W,), logits_BWV, noise_BRV, slot_BW, out, float(temperature), W, noise_BRV.shape[1], top_k or V,
           V=V, BLOCK=block, TOP_K=top_k is not None and top_k < V, num_warps=max(4, min(16, block // 256)))  # fmt: skip
    return out
