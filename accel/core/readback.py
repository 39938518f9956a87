"""Device values on their way to the host, read later."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Values of a device tensor, read one step (or one round of decoding) later.

    Reading at once would make the host wait for everything queued. One step later the device has a whole step
    of work queued behind the values, so it never runs dry, and the decision stays the same in every run.
    """

    def __init__(self, values: Tensor) -> None:
        self._event = None
        self._host = values.detach()
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
