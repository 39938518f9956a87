"""A model family behind the `TokenModel` that decoders see: prefill, windows, guidance, rollback.

Guidance doubles the rows: the conditional ones first, then the unconditional ones. Both are fed the same tokens at
the same slots, so going back takes both back.

Shapes: B images, R rows (B or 2 B), P prompt tokens of the longest row, W tokens of a window, N slots,
V vocabulary, S cached places, of which the first K are looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.core.rounds import Rounds
from accel.errors import NumericsError, UnsupportedError

from .adapter import CheckpointAdapter, Layout, Prefix
from .cache import PlacedCache
from .stack import Stack

#: Cached places come in these steps, so that few shapes are compiled and rows of the mask stay aligned.
_STEP = 64
#: Prompts are captured for lengths of this times a power of two, and as they are beyond so many tokens of all rows, where
#: they are not bound by launches any more.
_PROMPT, _PROMPT_TOKENS = 16, 4096
#: How many different numbers of places forwards look at, at most, where each is captured for itself.
_BUCKETS = 8


class PromptedModel:
    """Prompts that have been read, ready to continue: the `accel.core.decoding.TokenModel` of every family.

    Args:
        adapter: the loaded model.
        layout: the slots of an image.
        prompts: one per image.
        guidance: 1 does not run unconditional rows; above 1, logits = u + guidance * (c - u) in float32.
        forward: runs a forward; `forward_once` or a compiled version of it.
        grow: look only at the places that can have been written. Shapes then depend on how far the images are,
            too, which compiled code is compiled anew for.
        stack: the backbone's layers, if they are to run as `Stack`.
        rounds: how rounds of decoding run; what is kept there is good for all prompts that `read` takes.

    Raises:
        UnsupportedError: a prompt and the image do not fit into the model's context.
    """

    def __init__(
        self,
        adapter: CheckpointAdapter,
        layout: Layout,
        prompts: Sequence[Any],
        guidance: float = 1.0,
        *,
        forward: Callable[..., Tensor] | None = None,
        grow: bool = False,
        stack: Stack | None = None,
        rounds: Rounds | None = None,
    ) -> None:
        self.adapter, self.layout, self.stack = adapter, layout, stack
        self.images, self.vocabulary = len(prompts), adapter.vocabulary
        self.codebook_VD, self.row = adapter.codebook_VD, layout.row
        self.guided = guidance > 1
        prefix = self._prefix(prompts)
        self.dtype, device = prefix.embedding_RPD.dtype, prefix.embedding_RPD.device
        self.rounds = rounds or Rounds()
        self.guidance = torch.zeros((), device=device)  # a tensor: no new graph for every value
        self.start_R = torch.zeros(len(prefix.lengths), dtype=torch.int64, device=device)
        self.forced_N = torch.tensor(layout.forced, device=device)
        # One place more than there are slots: tokens of windows that reach beyond the end go there.
        self.places = _up(max(prefix.lengths) + layout.slots + 1, _STEP)
        self._step = _up(-(-self.places // _BUCKETS), _STEP) if self.rounds.captures else _STEP
        self.key_values = PlacedCache(adapter.layers, len(prefix.lengths), self.places)
        self._forward, self._grow = forward or forward_once, grow
        #: The image's tokens so far, if the decoder shows them.
        self.drawn_BS: Tensor | None = None
        #: Which images those of `only` are, and their `nan_B`.
        self._image_B, self._parts = torch.arange(self.images, device=device), list[tuple[Tensor, Tensor]]()
        #: The first place of each image whose logits were NaN; `places` if there is none.
        self.nan_B = torch.full((self.images,), self.places, device=device)
        #: Memory for `start_R` and `nan_B` of parts.
        self._of_parts = torch.empty_like(self.start_R), torch.empty_like(self.nan_B)
        self._read(prefix, guidance)

    def read(self, prompts: Sequence[Any], guidance: float) -> bool:
        """Take other prompts, as many and as guided as those before. False: they are too long for this memory."""
        assert (len(prompts), guidance > 1) == (self.images, self.guided)
        prefix = self._prefix(prompts)
        if max(prefix.lengths) + self.layout.slots + 1 > self.places:
            return False
        self._read(prefix, guidance)
        return True

    def _prefix(self, prompts: Sequence[Any]) -> Prefix:
        prefix = self.adapter.prefix(prompts, self.layout, self.guided)
        _check_fits(prefix, self.adapter, self.layout, self.images)
        return prefix

    def _read(self, prefix: Prefix, guidance: float) -> None:
        self._longest, self.drawn_BS = max(prefix.lengths), None
        self.guidance.fill_(guidance)
        self.start_R.copy_(torch.tensor(prefix.lengths))
        self.nan_B.fill_(self.places)
        self._parts.clear()
        self.first_BV = self._prefill(prefix)
        #: The furthest slot that the next forward can begin at, if a decoder knows.
        self.at_most: int | None = None
        self.nan_B.copy_(
            torch.where(self.first_BV.sum(-1).isnan(), self.start_R[: self.images] - 1, self.nan_B)
        )

    def _prefill(self, prefix: Prefix) -> Tensor:
        given_RPD = prefix.embedding_RPD
        rows, length, width = given_RPD.shape
        padded = min(_PROMPT * 2 ** max(0, -(-length // _PROMPT) - 1).bit_length(), self.places)
        if not self.rounds.captures or rows * padded > _PROMPT_TOKENS:
            return self._prompt(given_RPD)
        # Zeros behind the prompts: nobody sees those places before an image's tokens are written there.
        key = "prefill", padded
        embedding_RPD = self.rounds.keep(key, lambda: given_RPD.new_empty(rows, padded, width))
        embedding_RPD[:, :length], embedding_RPD[:, length:] = given_RPD, 0
        first_BV = self.rounds.keep(
            ("first",), lambda: torch.empty(self.images, self.vocabulary, device=given_RPD.device)
        )

        def prompt() -> None:
            first_BV.copy_(self._prompt(embedding_RPD))

        self.rounds.run(key, prompt)
        return first_BV

    def _prompt(self, embedding_RPD: Tensor) -> Tensor:
        """First logits (B, V) of embedded prompts, whose keys and values are written."""
        rows, length = embedding_RPD.shape[:2]
        place_RP = torch.arange(length, device=self.start_R.device).expand(rows, length)
        hidden_RPD = run_rows(self, embedding_RPD, place_RP, length)
        last_R1D = hidden_RPD[torch.arange(rows, device=place_RP.device), self.start_R - 1][:, None]
        return guide(self, self.adapter.logits(last_R1D))[:, 0]

    @property
    def nbytes(self) -> int:
        """Memory of the cache and of what decoders keep, in bytes."""
        return self.key_values.nbytes + self.rounds.nbytes

    def seen(self, width: int) -> int:
        """How many places the next forward of `width` tokens looks at: all that it can see, and few numbers."""
        if not self._grow or self.at_most is None:
            return self.places
        return min(_up(self._longest + self.at_most + width, self._step), self.places)

    def forward(self, token_BW: Tensor, at_B: Tensor) -> Tensor:
        """See `accel.core.decoding.TokenModel`."""
        return self._forward(self, token_BW, at_B, self.seen(token_BW.shape[1]))

    @property
    def shrinks(self) -> bool:
        """Whether fewer rows are less work, not shapes that are compiled anew."""
        return self._grow

    def only(self, images: Sequence[int]) -> PromptedModel:
        """Some of the images, to go on with while the others are finished, in the memory of all: captured rounds of as
        many images find theirs there. `check` of the whole tells of their NaN."""
        part, index_B = copy.copy(self), torch.tensor(images, device=self.start_R.device)
        index_R = torch.cat([index_B, index_B + self.images]) if self.guided else index_B
        part.images, part.drawn_BS, part._image_B = len(images), None, self._image_B[index_B]
        part.key_values, part.first_BV = self.key_values.only(index_R), self.first_BV[index_B]
        # The whole's own say where its images begin, and what NaN there were.
        starts_R, nans_B = self._of_parts
        self._parts[-1:] = [(self._image_B, self.nan_B.clone())]  # a list that parts share
        part.start_R, part.nan_B = starts_R[: len(index_R)], nans_B[: len(images)]
        part.start_R.copy_(self.start_R[index_R])
        part.nan_B.copy_(self.nan_B[index_B])
        self._parts.append((part._image_B, part.nan_B))
        return part

    def so_far(self, finished: int) -> tuple[Tensor, int] | None:
        """Tokens (B, rows * columns) of an image of which only some slots are finished, and how many of its rows are: those
        below repeat the last of them. None if there is no row yet, or the decoder does not show its tokens.
        """
        layout = self.layout
        rows = min(finished // layout.row, layout.rows)
        if not rows or self.drawn_BS is None or layout.picture is not None:
            return None
        slot_N = torch.arange(layout.slots, device=self.drawn_BS.device)
        done = rows * layout.row
        slot_N = torch.where(slot_N < done, slot_N, done - layout.row + slot_N % layout.row)
        return layout.finished(self.drawn_BS[:, slot_N]), rows

    def check(self, nan: Sequence[int] | None = None) -> None:
        """Say where logits were NaN, if they were.

        Args:
            nan: the values of `nan_B`; None waits for the device: call it so once, at the end.

        In a window, a later token's NaN shows from the window's first slot on: attention multiplies what it does
        not see by 0.

        Raises:
            NumericsError: names the first image and its slot.
        """
        if nan is not None and min(nan) >= self.places:
            return
        for image_B, nan_B in self._parts:
            self.nan_B[image_B] = torch.minimum(self.nan_B[image_B], nan_B)
        slots = (self.nan_B - self.start_R[: self.images] + 1).tolist()
        bad = [(slot, image) for image, slot in enumerate(slots) if slot < self.layout.slots]
        if bad:
            slot, image = min(bad)
            row, column = divmod(slot, max(1, self.layout.slots // self.layout.rows))
            raise NumericsError(
                f"the model's logits are NaN for {len(bad)} of {self.images} images, first in image {image} at "
                f"slot {slot} (row {row}, column {column}). float16 overflows in many models: load with "
                "torch_dtype=torch.bfloat16 or torch.float32, and check the weights"
            )


def forward_once(model: PromptedModel, token_BW: Tensor, at_B: Tensor, seen: int) -> Tensor:
    """One forward of a window. Shapes depend on B, W and `seen` alone; nothing waits for the device."""
    embedding = model.adapter.embed(token_BW)
    if model.guided:
        embedding, at_B = embedding.repeat(2, 1, 1), at_B.repeat(2)
    window_W = torch.arange(token_BW.shape[1], device=at_B.device)
    place_RW = ((model.start_R + at_B)[:, None] + window_W).clamp(max=model.places - 1)
    hidden_RWD = run_rows(model, embedding, place_RW, seen)
    logits_BWV = guide(model, model.adapter.logits(hidden_RWD))
    nan_BW = logits_BWV.sum(-1).isnan()  # NaN anywhere makes the sum NaN; one pass instead of two
    first_B = torch.where(nan_BW, place_RW[: model.images], model.places).amin(1)
    torch.minimum(model.nan_B, first_B, out=model.nan_B)
    return logits_BWV


def run_rows(model: PromptedModel, embedding_RWD: Tensor, place_RW: Tensor, seen: int) -> Tensor:
    """Last hidden states (R, W, D) of tokens at these places, which write their keys and values there."""
    visible_R1WK = model.key_values.aim(place_RW, seen)
    bias = torch.zeros((), dtype=embedding_RWD.dtype, device=place_RW.device)
    # A bias in the model's own type: attention would convert a boolean mask in every layer.
    bias_R1WK = torch.where(visible_R1WK, bias, -torch.inf)
    position = model.adapter.positions(place_RW, model.start_R, model.layout)
    if model.stack is not None:
        return model.stack(
            embedding_RWD, bias_R1WK, *model.adapter.rotary(embedding_RWD, position), model.key_values
        )
    return model.adapter.hidden(embedding_RWD, bias_R1WK, position, model.key_values)


def guide(model: PromptedModel, logits_RWV: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): (R, W, V) → (B, W, V) float32."""
    logits_RWV = logits_RWV.float()
    if not model.guided:
        return logits_RWV
    conditional_BWV, unconditional_BWV = logits_RWV.chunk(2)
    return unconditional_BWV + (conditional_BWV - unconditional_BWV) * model.guidance


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _check_fits(prefix: Prefix, adapter: CheckpointAdapter, layout: Layout, images: int) -> None:
    context, longest = adapter.context, max(prefix.lengths)
    if context is None or longest + layout.slots <= context:
        return
    row = prefix.lengths.index(longest)
    raise UnsupportedError(
        f"prompt {row % images} has {longest} tokens and an image takes {layout.slots}: together more than the "
        f"{context} that {adapter.name} can take. Shorten the prompt to {max(0, context - layout.slots)} tokens"
    )
