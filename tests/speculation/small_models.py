"""Models behind the contract whose whole law is known, and one that is like a picture."""

import torch
from torch import Tensor

from accel.core.randomness import Randomness


class Written:
    """Remembers what was fed where, as a cache of keys and values does; logits may depend on nothing else.

    Whatever lies behind the last fed slot is poisoned, and logits of slots from N on are NaN: nobody may use them.
    """

    def __init__(self, images: int, vocabulary: int, forced: list[int]) -> None:
        self.images, self.vocabulary = images, vocabulary
        self.forced_N = torch.tensor(forced)
        self.slots = len(forced)
        self._fed_BS = torch.full((images, self.slots + 200), -1)
        self.forwards: list[int] = []  # widths
        self.first_BV = self.logits(torch.zeros(images, dtype=torch.int64), 1)[:, 0]

    def forward(self, token_BW: Tensor, at_B: Tensor) -> Tensor:
        width = token_BW.shape[1]
        self.forwards.append(width)
        place_S = torch.arange(self._fed_BS.shape[1])
        self._fed_BS.masked_fill_(place_S >= at_B[:, None], -1)
        self._fed_BS.scatter_(1, at_B[:, None] + torch.arange(width), token_BW)
        logits_BWV = self.logits(at_B + 1, width)
        beyond_BW = at_B[:, None] + 1 + torch.arange(width) >= self.slots
        return logits_BWV.masked_fill(beyond_BW[..., None], torch.nan)

    def logits(self, slot_B: Tensor, width: int) -> Tensor:
        raise NotImplementedError


class TableModel(Written):
    """Every prefix has logits of its own, from a table; guidance mixes two of them."""

    def __init__(
        self,
        images: int,
        vocabulary: int = 4,
        forced: tuple[int, ...] = (-1,) * 4,
        guidance: float = 1.0,
        seed: int = 0,
        sharpness: float = 1.5,
        row: int = 0,
    ) -> None:
        self.row = row
        generator = torch.Generator().manual_seed(seed)
        prefixes = (vocabulary + 1) ** (len(forced) - 1) * 2
        both = sharpness * torch.randn(2, prefixes, vocabulary, generator=generator)
        self.table = both[1] + guidance * (both[0] - both[1])
        super().__init__(images, vocabulary, list(forced))

    def logits(self, slot_B: Tensor, width: int) -> Tensor:
        out = []
        for w in range(width):
            index_B = torch.ones_like(slot_B)
            for s in range(self.slots - 1):
                token_B = self._fed_BS[:, s]
                inside_B = s < slot_B + w
                assert not (inside_B & (slot_B + w < self.slots) & (token_B < 0)).any(), (
                    "read what was not fed"
                )
                index_B = torch.where(inside_B, self._next(index_B, token_B), index_B)
            out.append(self.table[index_B.clamp(max=len(self.table) - 1)])
        return torch.stack(out, 1)

    def _next(self, index_B: Tensor, token_B: Tensor) -> Tensor:
        return (index_B - 1) * (self.vocabulary + 1) + token_B.clamp(0, self.vocabulary) + 2

    def law(self, sampling) -> Tensor:
        """(V, V, ..., V): the probability of every sequence of sampled tokens."""
        p, index = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
        for forced in self.forced_N.tolist():
            if forced >= 0:
                index = self._next(index, torch.tensor(forced))
                continue
            step = sampling.probabilities(self.table[index]).double()
            p = (p[:, None] * step).flatten()
            index = self._next(index[:, None], torch.arange(self.vocabulary)).flatten()
        return p.reshape((self.vocabulary,) * int((self.forced_N < 0).sum()))


class PictureModel(Written):
    """A grid of codes that continue what is left of them, above them, and the picture as a whole: smooth,
    peaky, every slot depends on all before it."""

    def __init__(self, images: int, side: int = 12, vocabulary: int = 128, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.side = self.row = side
        self.codebook_VD = torch.randn(vocabulary, 6, generator=generator)
        self.prompt_BD = torch.randn(images, 6, generator=generator)
        self.bias_V = 0.5 * torch.randn(vocabulary, generator=generator)
        super().__init__(images, vocabulary, [-1] * side * side)

    def logits(self, slot_B: Tensor, width: int) -> Tensor:
        slot_BW = slot_B[:, None] + torch.arange(width)
        codes_BSD = self.codebook_VD[self._fed_BS.clamp(min=0)]
        sums_BSD = codes_BSD.cumsum(1)

        def at(values_BSD: Tensor, place_BW: Tensor) -> Tensor:
            index = place_BW.clamp(min=0)[..., None].expand(-1, -1, values_BSD.shape[-1])
            return values_BSD.gather(1, index) * (place_BW >= 0)[..., None]

        above, left = at(codes_BSD, slot_BW - self.side), at(codes_BSD, slot_BW - 1)
        left = torch.where((slot_BW % self.side == 0)[..., None], above, left)
        mean = at(sums_BSD, slot_BW - 1) / slot_BW.clamp(min=1)[..., None]
        middle = 0.45 * left + 0.35 * above + 0.15 * mean + 0.3 * self.prompt_BD[:, None]
        squared = (middle.square().sum(-1, keepdim=True) + self.codebook_VD.square().sum(-1)) / 2
        return 2 * (middle @ self.codebook_VD.T - squared) + self.bias_V


class OneGenerator(Randomness):
    """The whole batch from one generator, all slots at once: thousands of images in a moment."""

    def __init__(self, model: Written, width: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.images = model.images
        shape = (model.images, model.slots + 2 * width, model.vocabulary)
        self.exponential_BRV = torch.empty(shape).exponential_(generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand((self.images, *shape), generator=self.generator)

    def refill(self, finished) -> None:
        pass


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def z_score(token_BN: Tensor, law: Tensor) -> float:
    """How far the counts of sequences are from their law: (chi-square - degrees of freedom) / its deviation.

    Impossible sequences give infinity; rare ones (fewer than 5 expected) are counted together.
    """
    vocabulary, images = law.shape[0], token_BN.shape[0]
    index_B = torch.zeros(images, dtype=torch.int64)
    for token_B in token_BN.T:
        index_B = index_B * vocabulary + token_B
    counts = torch.bincount(index_B, minlength=law.numel()).double()
    expected = law.flatten() * images
    if counts[expected == 0].any():
        return float("inf")
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)
