"""Multiply-accumulates of a denoising loop: a cost that no other load on the machine changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from accel.core.capability import denoisers_of


class Count:
    """`macs` of the denoiser's calls, in matrix products, attention and convolutions."""

    macs: int = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Count]:
    """Count what the denoiser computes inside the `with` block; text encoders and autoencoder are left out.

    Enter it after accelerating `pipe`. Counts with torch.utils.flop_counter, which slows the run down and does
    not see into compiled code; a multiply-accumulate is two of its operations.
    """
    count, before = Count(), 0
    module, _ = denoisers_of(pipe)[0]
    with FlopCounterMode(display=False) as counter:

        def starts(*_: Any) -> None:
            nonlocal before
            before = counter.get_total_flops()

        def ends(*_: Any) -> None:
            count.macs += (counter.get_total_flops() - before) // 2

        hooks = [module.register_forward_pre_hook(starts, prepend=True), module.register_forward_hook(ends)]
        try:
            yield count
        finally:
            for hook in hooks:
                hook.remove()
