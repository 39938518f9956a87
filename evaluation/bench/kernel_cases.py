"""The calls that `accel bench kernels` measures and that are compiled without a GPU: the sizes of FLUX.1 at 1024 x 1024
(4096 tokens of 3072 channels, half of them kept, a quarter destinations), and of a small model.

Shapes: N tokens, M destinations, K slots, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.kernels import detail, forecast, match, merge, plan, unmerge, verify
from accel.kernels.dispatch import OPS, Op
from accel.kernels.plan import reference as plans

N, M, K, C, GRID = 4096, 1024, 2048, 3072, (64, 64)
MODULES = (detail, forecast, match, merge, plan, unmerge, verify)  # importing them fills OPS


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        op: the operation's name.
        note: what is special about it.
        arguments: (device, dtype) -> its arguments; on `meta`, their shapes alone.
        bytes: read and written at least, as a function of the bytes of a value.
        flops: floating-point operations at least.
        measured: None for a call that is only compiled.
    """

    op: str
    note: str
    arguments: Callable[[str, torch.dtype], tuple[Any, ...]]
    bytes: Callable[[int], int]
    flops: int = 0
    measured: bool = True

    @property
    def name(self) -> str:
        return f"{self.op} {self.note}".rstrip()

    @property
    def operation(self) -> Op:
        return OPS[self.op]


def values(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def destinations(device: str, rows: int, tokens: int, count: int) -> Tensor:
    if device == "meta":
        return torch.empty(rows, count, dtype=torch.int64, device=device)
    score = torch.rand(rows, tokens, device=device)
    return score.argsort(1)[:, :count].sort(1).values


def similarities(device: str, tokens: int = N, count: int = M) -> tuple[Tensor, Tensor]:
    """(best, target) as of random features."""
    dst = destinations(device, 1, tokens, count)
    choice = torch.randint(count, (1, tokens), device=device)
    best = torch.rand(1, tokens, device=device).scatter(1, dst, -torch.inf)
    return best, dst.gather(1, choice)


def tables(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return plans.plan(*similarities(device), K)


def _match(
    tokens: int, count: int, channels: int, copies: int
) -> Callable[[str, torch.dtype], tuple[Any, ...]]:
    def arguments(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
        return (
            values(device, dtype, copies, tokens, channels),
            destinations(device, 1, tokens, count),
            torch.zeros(1, tokens, dtype=torch.bool, device=device),
        )

    return arguments


def _merge(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    _, owner, size, segments = tables(device)
    return values(device, dtype, 1, N, C), owner, size, segments


def _unmerge(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    new, old = (values(device, dtype, 1, K, C) for _ in range(2))
    return values(device, dtype, 1, N, C), new, old, tables(device)[1], True


def _forecast(order: int, *stamps: int) -> Callable[[str, torch.dtype], tuple[Any, ...]]:
    def arguments(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
        history = [values(device, dtype, 1, N, 64) for _ in range(order + 1)]
        times = [values(device, torch.float32, *stamps) * 0.1 - i for i in range(order + 1)]
        return history, times, 0.5, 0.75

    return arguments


def _correct(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    new, old = (values(device, dtype, 1, N, 64) for _ in range(2))
    return new, old, values(device, torch.float32, 1, N, 64), values(device, torch.float32)


def _verify(images: int) -> Callable[[str, torch.dtype], tuple[Any, ...]]:
    """Janus-Pro's vocabulary, a window of 16 slots."""

    def arguments(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
        ring = torch.empty(images, 48, 16384, device=device).exponential_()
        slots = torch.arange(16, device=device).expand(images, -1).contiguous() + 7
        return values(device, torch.float32, images, 16, 16384) * 2, ring, slots, 1.0, 2048

    return arguments


CASES = (
    Case("match", "", _match(N, M, C, 1), lambda b: b * N * C, 2 * N * M * C),
    Case("match", "guidance", _match(N, M, C, 2), lambda b: 2 * b * N * C, 4 * N * M * C),
    Case("match", "small", _match(1024, 256, 256, 2), lambda b: 2 * b * 1024 * 256, 4 * 1024 * 256 * 256),
    Case("plan", "", lambda device, _: (*similarities(device), K), lambda b: N * 32),
    Case("segments", "", lambda device, _: (tables(device)[1], K), lambda b: N * 16),
    Case("merge", "", _merge, lambda b: b * (N + K) * C),
    Case("unmerge", "", _unmerge, lambda b: 2 * b * (N + K) * C),
    Case("detail", "", lambda device, dtype: (values(device, dtype, 1, N, C), *GRID), lambda b: b * N * C),
    Case("forecast", "", _forecast(1), lambda b: 3 * b * N * 64),
    Case("forecast", "per token", _forecast(1, 1, N, 1), lambda b: (3 * b * 64 + 8) * N),
    Case("forecast", "order 2", _forecast(2, 1, N, 1), lambda b: (4 * b * 64 + 12) * N, measured=False),
    Case("correct", "", _correct, lambda b: (3 * b + 4) * N * 64),
    Case("verify", "", _verify(1), lambda b: 8 * 16 * 16384),
    Case("verify", "8 images", _verify(8), lambda b: 8 * 8 * 16 * 16384),
)


def chain(x: Tensor, dst: Tensor, y: Tensor) -> Tensor:
    """What a merged span adds to a step: a plan from its tokens, reduced tokens, and the change of each slot back."""
    best, target = match.match(x, dst)
    _, owner, size, segments = plan.plan(best, target, y.shape[1])
    reduced = merge.merge(x, owner, size, segments)
    return unmerge.unmerge(x, y, reduced, owner, complete=True)
