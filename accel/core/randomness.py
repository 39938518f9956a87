"""Random numbers of a batch, each image's from its own generator.

Shapes: B images, R slots of a ring, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .rounds import to_front

#: Slots whose noise is drawn by one call. On a GPU every call is a launch, which a round of its own would notice.
CHUNK = {"cuda": 16}


class Randomness:
    """What decoders draw from: uniform numbers per forward, and the noise that belongs to slots.

    The noise of slot n is the n-th draw of V exponentials from the image's generator, whatever the decoder, so the
    same seed gives all of them the same; on a GPU draws are made `CHUNK` slots at a time, which gives other
    numbers, but to all alike. It is drawn when a window comes near, into a ring.

    Args:
        generators: one per image, on the model's device.
        vocabulary, slots: V, and N of an image.
        ring: slots whose noise must be there at once; 0 if no noise per slot is needed.

    Attributes:
        exponential_BRV: noise of slot n at n % R. Ones where nothing was drawn yet: those slots do not count.
            The same tensor for every batch.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        vocabulary: int,
        slots: int,
        ring: int,
        device: torch.device,
    ) -> None:
        self.slots, self._reach, self._chunk = slots, ring, CHUNK.get(device.type, 1)
        chunks = -(-(ring + self._chunk - 1) // self._chunk) if ring else 0
        self.ring = chunks * self._chunk
        self.exponential_BRV = torch.ones(len(generators), self.ring, vocabulary, device=device)
        self.restart(generators)

    @property
    def nbytes(self) -> int:
        return self.exponential_BRV.nbytes

    def restart(self, generators: Sequence[torch.Generator]) -> None:
        """A new batch: nothing is drawn yet."""
        self.generators = generators
        self._drawn = [0] * len(generators)

    def only(self, index_B: Tensor) -> Randomness:
        """Of some images, to go on with, in the memory of all."""
        images = index_B.tolist()
        part = copy.copy(self)
        part.generators = [self.generators[image] for image in images]
        part._drawn = [self._drawn[image] for image in images]
        part.exponential_BRV = to_front(self.exponential_BRV, index_B)
        return part

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1)."""
        rows = [torch.rand(shape, generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)

    def refill(self, finished: Sequence[int]) -> None:
        """Draw the noise that is needed from each image's first unfinished slot on; earlier ones are forgotten."""
        if not self.ring:
            return
        for image, (generator, start) in enumerate(zip(self.generators, finished, strict=True)):
            while self._drawn[image] < min(start + self._reach, self.slots):
                at = self._drawn[image] % self.ring
                self.exponential_BRV[image, at : at + self._chunk].exponential_(generator=generator)
                self._drawn[image] += self._chunk
