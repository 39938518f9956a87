"""Random numbers of a batch, each image's from its own generator.

Shapes: B images, R slots of a ring, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Randomness:
    """What speculative decoding draws from: uniform numbers per forward, and the noise that belongs to slots.

    The noise of slot n is the n-th draw of V exponentials from the image's generator, as in plain decoding, so
    the same seed gives both the same. It is drawn when the window comes near, into a ring of R slots.

    Args:
        generators: one per image, on the model's device.
        vocabulary, slots: V, and N of an image.
        ring: R; 0 if no noise per slot is needed.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        vocabulary: int,
        slots: int,
        ring: int,
        device: torch.device,
    ) -> None:
        self.generators, self.slots, self.ring = generators, slots, ring
        #: Exponential noise of slot n at n % R. Ones where nothing was drawn yet: those slots do not count.
        self.exponential_BRV = torch.ones(len(generators), ring, vocabulary, device=device)
        self._drawn = [0] * len(generators)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1)."""
        rows = [torch.rand(shape, generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)

    def refill(self, finished: Sequence[int]) -> None:
        """Draw the noise of R slots from each image's first unfinished slot on; earlier ones are forgotten."""
        if not self.ring:
            return
        for image, (generator, start) in enumerate(zip(self.generators, finished, strict=True)):
            for slot in range(self._drawn[image], min(start + self.ring, self.slots)):
                self.exponential_BRV[image, slot % self.ring].exponential_(generator=generator)
                self._drawn[image] = slot + 1
