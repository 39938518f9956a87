"""Device values on their way to the host, read later, and those that keep their place."""

from __future__ import annotations

import torch
from torch import Tensor


def put_into(kept: Tensor | None, values: Tensor) -> Tensor:
    """The values, where `kept` is if they fit: CUDA graphs and compiled code know the place. What a run in inference
    mode has made cannot be written by one outside of it."""
    there = kept is not None and (kept.shape, kept.dtype, kept.device) == (
        values.shape,
        values.dtype,
        values.device,
    )
    if not there or (kept.is_inference() and not torch.is_inference_mode_enabled()):  # type: ignore[union-attr]
        return values
    assert kept is not None
    return kept.copy_(values)


class Readback:
    """Values of a device tensor, read one step (or one round of decoding) later.

    Reading at once would make the host wait for everything queued. One step later the device has a whole step
    of work queued behind the values, so it never runs dry, and the decision stays the same in every run.

    Args:
        values: read before anything that is queued after this.
        into: one that has been read and is not needed any more; its pinned memory is used again.
    """

    def __init__(self, values: Tensor, into: Readback | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values.detach()
        if values.is_cuda:
            event = torch.cuda.Event() if into is None else into._event
            assert event is not None, "its values were on another device"
            self._host = (
                torch.empty_like(values, device="cpu", pin_memory=True) if into is None else into._host
            )
            self._host.copy_(values.detach(), non_blocking=True)
            event.record()
            self._event = event

    def read(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
