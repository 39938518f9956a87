"""Multiply-accumulates of a denoising loop: a cost that no other load on the machine changes.

torch's counter knows the attention kernels of CUDA only. It looked into the others' parts until torch 2.14, which
takes them whole and counts 0 for them; a formula of our own is what it then finds, and nothing is counted twice
where it still looks inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from accel.core.capability import denoisers_of

#: Attention kernels of devices other than CUDA, as far as this torch has them.
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)


def attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of attention from the shapes (B, heads, tokens, width) of its inputs: the products of queries and
    keys, and of weights and values. What a mask excludes is counted, as for CUDA's kernels."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _formulas() -> dict[Any, Any]:
    known = (getattr(torch.ops.aten, name, None) for name in _ATTENTION)
    return {operation: attention_operations for operation in known if operation is not None}


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
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:

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
