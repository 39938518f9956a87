"""Similarity by tensor cores, with the gather of destinations inside and no matrix of similarities outside.

A token's best is kept as one integer, (ordered similarity, first destination), so that `atomic_max` over blocks of
destinations gives the same in any order. Measured on an H100 (N 4096, D 1024, C 3072, bfloat16): tiles of
128 x 256 x 64 with plain loads 47 us, with descriptors (TMA) 50; norms made in the same loop gave wrong choices.

Shapes: G plan rows, N tokens, M destinations, D channels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.bits import number, ordered
from accel.kernels.dispatch import INTERPRETED
from accel.kernels.launch import ceil_div, channels, launch


@triton.jit(do_not_specialize=["N"])
def norms(x, scale, key, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """1 / length of every row of every copy; keys begin below everything."""
    row = tl.program_id(1).to(tl.int64) * N + tl.program_id(0)
    d = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        v = tl.load(x + row * D + start + d, mask=start + d < D, other=0.0).to(tl.float32)
        total += v * v
    tl.store(scale + row, 1.0 / tl.maximum(tl.sqrt(tl.sum(total, 0)), 1e-12))
    tl.store(key + row, tl.full((), -(2**63), tl.int64))


@triton.jit(do_not_specialize=["N", "M", "G"])
def best(x, dst, scale, key, N, M, G, D: tl.constexpr, COPIES: tl.constexpr,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The best destination of BM tokens among BN; G rows of COPIES copies whose similarities are averaged."""
    g = tl.program_id(1)
    across = tl.cdiv(M, BN)
    row = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    here = tl.where(row < N, row, 0)
    at = tl.load(dst + g * M + column, mask=column < M, other=0).to(tl.int32)
    at = tl.minimum(tl.maximum(at, 0), N - 1)
    dots = tl.zeros((BM, BN), tl.float32)
    left = tl.load(scale + g.to(tl.int64) * N + here)
    right = tl.load(scale + g.to(tl.int64) * N + at)
    for copy in tl.static_range(COPIES):
        base = (copy * G + g).to(tl.int64) * N
        if copy > 0:  # the sum so far in this copy's lengths, so that one product follows the other
            left_now = tl.load(scale + base + here)
            right_now = tl.load(scale + base + at)
            dots = dots * (left / left_now)[:, None] * (right / right_now)[None, :]
            left = left_now
            right = right_now
        a_at = x + base * D + here[:, None] * D + k[None, :]
        b_at = x + base * D + at[:, None] * D + k[None, :]
        for start in range(0, D, BK):
            if D % BK == 0:
                a = tl.load(a_at + start)
                b = tl.load(b_at + start)
            else:
                a = tl.load(a_at + start, mask=k[None, :] < D - start, other=0.0)
                b = tl.load(b_at + start, mask=k[None, :] < D - start, other=0.0)
            if WIDE:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
    similar = tl.where(column[None, :] < M, dots * right[None, :], float("-inf"))
    high = tl.max(similar, 1)
    first = tl.min(tl.where(similar == high[:, None], column[None, :], M - 1), 1)
    packed = (ordered(high * (left / COPIES)).to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)
    tl.atomic_max(key + g.to(tl.int64) * N + row, packed, mask=row < N)


@triton.jit(do_not_specialize=["N", "M"])
def unpack(key, dst, exempt, similarity, target, N, M, EXEMPT: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    at = g.to(tl.int64) * N + i
    packed = tl.load(key + at, mask=inside, other=0)
    value = number((packed >> 32).to(tl.int32))
    if EXEMPT:
        value = tl.where(tl.load(exempt + at, mask=inside, other=0) != 0, float("-inf"), value)
    first = tl.where(inside, 0x7FFFFFFF - (packed & 0x7FFFFFFF), 0)
    tl.store(similarity + at, value, mask=inside)
    tl.store(target + at, tl.load(dst + g * M + first, mask=inside, other=0), mask=inside)


def match(x_BNC: Tensor, dst_GD: Tensor, exempt_GN: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, D = x_BNC.shape
    G, M = dst_GD.shape
    scale = x_BNC.new_empty(B, N, dtype=torch.float32)
    key = x_BNC.new_empty(B, N, dtype=torch.int64)
    similarity = x_BNC.new_empty(G, N, dtype=torch.float32)
    target = torch.empty_like(similarity, dtype=torch.int64)
    block, warps = channels(D)
    launch(norms, (N, B), x_BNC, scale, key, N, D=D, BLOCK=block, num_warps=warps)
    bm, bn, bk, warps, stages = _tile(x_BNC, N, M, G)
    grid = (ceil_div(N, bm) * ceil_div(M, bn), G)
    launch(best, grid, x_BNC, dst_GD, scale, key, N, M, G, D=D, COPIES=B // G, BM=bm, BN=bn, BK=bk,
           WIDE=INTERPRETED, num_warps=warps, num_stages=stages)  # fmt: skip
    marks = dst_GD if exempt_GN is None else exempt_GN
    launch(unpack, (ceil_div(N, 256), G), key, dst_GD, marks, similarity, target, N, M,
           EXEMPT=exempt_GN is not None, BLOCK=256, num_warps=4)  # fmt: skip
    return similarity.scatter_(1, dst_GD, -math.inf), target


def _tile(x: Tensor, N: int, M: int, G: int) -> tuple[int, int, int, int, int]:
    """(tokens, destinations and channels of a block, warps, stages)."""
    if x.dtype == torch.float32:
        return 64, 64, 32, 8, 2  # exact products, without tensor cores
    if INTERPRETED or ceil_div(N, 128) * ceil_div(M, 256) * G < 64:
        return 64, 64, 64, 4, 3  # few tokens: more blocks than the large tile gives
    if triton.runtime.driver.active.get_current_target().arch in (90, 100, 103):
        return 128, 256, 64, 8, 3
    # The large one spills on an A100, and consumer GPUs have 99 KB of shared memory.
    return 128, 128, 32, 8, 3
