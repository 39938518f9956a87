"""Fused operations, one folder each: a reference that is the ground truth and runs everywhere, a Triton kernel, and
the operation that chooses between them (`dispatch`).

    accel.kernels.use("reference")              # from now on; "auto" is the default, "triton" fails where it cannot
    with accel.kernels.use("triton", check=True): ...     # and every index is checked, at the price of a wait

The environment variable ACCEL_KERNELS sets the same at the start. `accel info` says what runs, and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dispatch import status, use

__all__ = ["status", "use"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import dispatch

        return getattr(dispatch, name)
    raise AttributeError(f"module 'accel.kernels' has no attribute {name!r}")
