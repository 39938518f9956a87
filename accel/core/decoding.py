"""What a decoder sees of an autoregressive image model, and plain decoding.

A model family is behind `TokenModel`: a few forwards over windows of tokens, each image of the batch at its own
position. Plain decoding asks for one token at a time, speculative decoding (`accel.methods.speculation`) for
windows; neither knows about prompts, guidance, caches or the model's own vocabulary.

Shapes: B images, W tokens of a window, N slots of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .checks import check, is_number, is_whole


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
    how far the images are sets it before each forward: no `at_B` is larger, so that nothing behind need be looked at.
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
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
            outside = sorted_p.cumsum(-1) - sorted_p >= self.top_p  # all before it already reach top_p
            p = p.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p


#: (model, sampling, one generator per image, called with the number of finished slots) → tokens (B, N).
#: Generators live on the model's device; an image's tokens depend on its own generator alone.
Decoder = Callable[[TokenModel, Sampling, Sequence[torch.Generator], Callable[[int], None]], Tensor]


def noise(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """(B, *shape) float32 exponential noise, each image's from its own generator."""
    rows = [torch.empty(shape, device=g.device).exponential_(generator=g) for g in generators]
    return torch.stack(rows)


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
    slots = model.forced_N.shape[0]
    at_B = torch.zeros(model.images, dtype=torch.int64, device=model.first_BV.device)
    logits_BV, tokens = model.first_BV, []
    for slot in range(slots):
        drawn_B = draw(sampling.probabilities(logits_BV), noise(generators, model.vocabulary))
        tokens.append(torch.where(model.forced_N[slot] >= 0, model.forced_N[slot], drawn_B))
        on_slots(slot + 1)
        if slot + 1 < slots:
            logits_BV = model.forward(tokens[-1][:, None], at_B + slot)[:, 0]
    return torch.stack(tokens, 1)
