"""What a decoder sees of an autoregressive image model, and plain decoding.

A model family is behind `TokenModel`: a few forwards over windows of tokens, each image of the batch at its own
position. Plain decoding asks for one token at a time, speculative decoding (`accel.methods.speculation`) for
windows; neither knows about prompts, guidance, caches or the model's own vocabulary.

Shapes: B images, W tokens of a window, N slots of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from accel.kernels.verify import noise_at, probabilities, verify

from .checks import check, is_number, is_whole
from .randomness import Randomness
from .readback import Readback
from .rounds import reach, rounds_of


class TokenModel(Protocol):
    """A batch of prompts that has been read (prefilled), ready to continue with image tokens.

    A slot is a place in the sequence of image tokens, from 0. Some slots may be forced: an end-of-line token
    stands there and is injected, never sampled.

    Attributes:
        images: B, the images of the batch.
        vocabulary: V, the number of tokens an image slot can hold. Ids are 0 ... V - 1, whatever the model's
            own numbering is; everything that cannot be an image token is already cut away.
        forced_N: (N,) int64 on the device: the token that stands at each slot, -1 where it is sampled. A forced
            token may lie outside of 0 ... V - 1: it is only ever fed, not sampled.
        first_BV: float32 logits for slot 0, from the prompt.

    It may say more, which decoders can do without: `codebook_VD`, the code that each token stands for (`CheckpointAdapter`),
    and `row`, how many slots after a token the one right below it stands. If it has `at_most`, a decoder that knows
    how far the images are sets it before each forward: no `at_B` is larger, so that nothing behind need be looked at;
    `seen(width)` then says what the forward's shapes depend on. `rounds` (`accel.core.rounds.Rounds`) says that all its
    tensors stay where they are, and runs rounds. Where `shrinks` is true, `only(images)` gives the
    model for some of its images, which goes on in the memory of all. `nan_B` (int64) and `check(values of nan_B)` find NaN. A decoder puts the tokens
    (B, N or more) that it writes, finished ones and drafts, where the model has `drawn_BS`, for previews.
    """

    images: int
    vocabulary: int
    forced_N: Tensor
    first_BV: Tensor

    def forward(self, token_BW: Tensor, at_B: Tensor) -> Tensor:
        """Feed W tokens per image and return the float32 logits (B, W, V) of the slots after each.

        token_BW[b, w] stands at slot at_B[b] + w; logits[b, w] are for slot at_B[b] + w + 1, after guidance.
        Keys and values of the fed slots are (over)written; everything cached from slot at_B[b] + W on counts
        as not there. So going back after a rejected draft is nothing but a smaller `at_B`. Slots from N on
        may be fed (the end of a window); their logits mean nothing.

        Never waits for the device. Shapes depend on B and W alone.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits. The same for every decoder, so that they draw from one distribution.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens can be drawn; None: all.
        top_p: only the smallest set of tokens with at least this probability can be drawn (Holtzman et al.
            2020), after top_k; None: all.

    Raises:
        ConfigError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check(
            is_number(self.temperature) and self.temperature >= 0,
            "temperature",
            "a number >= 0",
            self.temperature,
        )
        if self.top_k is not None:
            check(
                is_whole(self.top_k) and self.top_k >= 1, "top_k", "a whole number >= 1 or None", self.top_k
            )
        if self.top_p is not None:
            check(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1] or None", self.top_p)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits → (..., V) float32 probabilities; one-hot if the temperature is 0."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        p = probabilities(logits, self.temperature, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
            outside = sorted_p.cumsum(-1) - sorted_p >= self.top_p  # all before it already reach top_p
            p = p.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def draw(self, logits_BWV: Tensor, noise_BRV: Tensor, slot_BW: Tensor) -> Tensor:
        """(B, W) tokens that the slots' own noise gives; slot n's is at n mod R."""
        if self.temperature > 0 and (self.top_p is None or self.top_p == 1):
            return verify(logits_BWV, noise_BRV, slot_BW, self.temperature, self.top_k)
        return draw(self.probabilities(logits_BWV), noise_at(noise_BRV, slot_BW))


#: (model, sampling, one generator per image, called with the number of finished slots) → tokens (B, N).
#: Generators live on the model's device; an image's tokens depend on its own generator alone.
Decoder = Callable[[TokenModel, Sampling, Sequence[torch.Generator], Callable[[int], None]], Tensor]


def draw(p: Tensor, exponential: Tensor) -> Tensor:
    """(..., V) probabilities and exponential noise → (...) tokens: an exact sample, without waiting for the device.

    argmax p / e with e ~ Exp(1) is the Gumbel-max trick: the smallest of exponentials with rates p.
    """
    return (p / exponential).argmax(-1)


def decode(
    model: TokenModel,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_slots: Callable[[int], None] = lambda slots: None,
) -> Tensor:
    """Plain decoding, one token after the other: the `Decoder` that every other one is measured against."""
    rounds, slots = rounds_of(model), model.forced_N.shape[0]
    key = (decode, sampling)
    rounds.turn_to(*key)
    plain = rounds.keep(key, lambda: PlainRound(model, sampling, generators))
    plain.begin(model, generators)
    show(model, plain.token_BN)
    told = Told(model, rounds.captures)
    on_slots(1)
    for slot in range(1, slots):
        plain.randomness.refill([slot] * model.images)
        seen = reach(model, 1, slot - 1)
        rounds.run((*key, seen), partial(plain, model))
        told.read(plain.slot_B)
        on_slots(slot + 1)
    return plain.token_BN.clone()


def show(model: Any, token_BS: Tensor) -> None:
    """Let the model know where an image's tokens are written."""
    if hasattr(model, "drawn_BS"):
        model.drawn_BS = token_BS


class PlainRound:
    """Plain decoding's round and what it writes: each image's last token is fed, and the next one drawn.

    Attributes:
        token_BN: tokens so far.
        slot_B: the slot that is drawn next.
    """

    def __init__(self, model: TokenModel, sampling: Sampling, generators: Sequence[torch.Generator]) -> None:
        slots, device = model.forced_N.shape[0], model.first_BV.device
        self.sampling = sampling
        self.randomness = Randomness(generators, model.vocabulary, slots, 1, device)
        self.token_BN = torch.zeros(model.images, slots, dtype=torch.int64, device=device)
        self.slot_B = torch.zeros(model.images, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.randomness.nbytes

    def begin(self, model: TokenModel, generators: Sequence[torch.Generator]) -> None:
        """A new batch, its slot 0 drawn from the prompt's logits."""
        self.randomness.restart(generators)
        self.randomness.refill([0] * model.images)
        self.slot_B.zero_()
        self._draw(model, model.first_BV)

    def __call__(self, model: TokenModel) -> None:
        at_B = self.slot_B - 1
        self._draw(model, model.forward(self.token_BN.gather(1, at_B[:, None]), at_B)[:, 0])

    def _draw(self, model: TokenModel, logits_BV: Tensor) -> None:
        slot_B = self.slot_B.clamp(max=model.forced_N.shape[0] - 1)  # a round that is timed does not stop
        ring_BRV = self.randomness.exponential_BRV
        drawn_B = self.sampling.draw(logits_BV[:, None], ring_BRV, slot_B[:, None])[:, 0]
        forced_B = model.forced_N[slot_B]
        token_B = torch.where(forced_B >= 0, forced_B, drawn_B)
        self.token_BN.scatter_(1, slot_B[:, None], token_B[:, None])
        torch.add(slot_B, 1, out=self.slot_B)


class Told:
    """What the host is told of each round: (B,) numbers, and whether logits were NaN.

    Args:
        late: reads the round before, so that a GPU always has a round to work on; None is read in the first. NaN
            is then found a round later; else when the model is asked, at the end.
    """

    def __init__(self, model: Any, late: bool) -> None:
        self._model, self._late = model, late
        self._nan_B = getattr(model, "nan_B", None) if late else None
        self._pending: list[Readback] = []
        self._before: tuple[Readback, Sequence[int]] | None = None

    def only(self, images: Sequence[int], nan_B: Tensor | None) -> None:
        """From the next round on of some of the images, whose NaN are told there."""
        if self._pending:
            self._before, self._pending = (self._pending[-1], images), []
        self._nan_B = None if self._nan_B is None else nan_B

    def read(self, values_B: Tensor) -> list[int] | None:
        """Send the values off; what is known by now.

        Raises:
            NumericsError: the model's logits were NaN.
        """
        if not self._late:
            return None
        values_B = torch.cat(
            [values_B] if self._nan_B is None else [values_B, self._nan_B]
        )  # a copy of its own
        spare = self._pending.pop(0) if len(self._pending) == 2 else None
        self._pending.append(Readback(values_B, spare))
        if self._before is not None:
            (before, chosen), self._before = self._before, None
            known = self._known(before)
            return [known[image] for image in chosen]
        return self._known(self._pending[0]) if len(self._pending) == 2 else None

    def _known(self, of: Readback) -> list[int]:
        known = of.read().tolist()
        if self._nan_B is None:
            return known
        images = len(known) // 2
        self._model.check(known[images:])
        return known[:images]
