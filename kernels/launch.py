"""The one place where kernels are launched, so that they can be compiled for a GPU that is not there instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: What is called in place of a launch, with (kernel, grid, arguments, constants and options). None: launch.
instead: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a `triton.jit` function; an empty grid runs nothing."""
    if 0 in grid:
        return
    # As it was by default up to Triton 3.9, which warns that 3.10 will not: fewer roundings, and the checks allow for them.
    meta["enable_fp_fusion"] = True
    if instead is None:
        kernel[grid](*args, **meta)
    else:
        instead(kernel, grid, args, meta)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def channels(C: int, most: int = 1024) -> tuple[int, int]:
    """(channels of a block, warps): eight values a thread, so that loads are of 128 bits at 16 bits a value."""
    block = min(most, power_of_two(C))
    return block, max(1, block // 256)
