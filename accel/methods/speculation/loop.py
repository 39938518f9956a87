"""The decoder's loop: feed a window, take the step, until every image is finished.

Shapes: B images, W tokens of a window, N slots of an image, S = N + 2 W, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.core.decoding import Sampling, TokenModel, Told, draw, show
from accel.core.randomness import Randomness
from accel.core.rounds import reach, rounds_of, to_front

from .config import SpeculativeDecodingConfig
from .draft import inverse_cdf
from .step import State, begin, feed, noise_step, ratio_step
from .verify import Rule

#: Finished images leave the batch when at most this part of it goes on.
_LEFT = 0.75
#: (state, logits (B, W, V), uniform numbers (B, W, 4) or None, noise (B, R, V), forced (S,)) → state.
Step = Callable[[State, Tensor, Tensor | None, Tensor, Tensor], State]


def fresh_of(config: SpeculativeDecodingConfig, row: int) -> str:
    """Where fresh drafts come from: there is no "above" where it is not known how long a row is."""
    return "last" if config.fresh == "above" and not row else config.fresh


def step_of(
    config: SpeculativeDecodingConfig, sampling: Sampling, rule: Rule, slots: int, row: int = 0
) -> Step:
    """The step that a configuration asks for; compiled if it says so.

    Args:
        row: slots of a row of the image; 0: unknown.
    """
    step: Callable[..., State]
    fresh = fresh_of(config, row)
    if config.verifies_by == "noise":
        step = partial(_noise_step, sampling=sampling, fresh=fresh, slots=slots, row=row)
    else:
        step = partial(
            ratio_step,
            sampling=sampling,
            rule=rule,
            drafting=config.drafts_by,
            fresh=fresh,
            slots=slots,
            row=row,
        )
    return torch.compile(step, fullgraph=True, dynamic=False) if config.compile else step


def _noise_step(
    state: State,
    logits_BWV: Tensor,
    uniform: None,
    exponential_BRV: Tensor,
    forced_S: Tensor,
    **settings: Any,
) -> State:
    return noise_step(state, logits_BWV, exponential_BRV, forced_S, **settings)


def ring_of(config: SpeculativeDecodingConfig, width: int, late: bool) -> int:
    """Slots whose noise must be there at once: the window, the one that enters behind it, and if the host knows
    only the round before, the window by which it is late."""
    return width * (3 if late else 2) if config.drafts_by == "gumbel" else 0


def start(
    model: TokenModel,
    sampling: Sampling,
    config: SpeculativeDecodingConfig,
    width: int,
    randomness: Randomness,
    forced_S: Tensor,
) -> State:
    """Slot 0 from the prompt's logits, and drafts for the first window."""
    p_BV = sampling.probabilities(model.first_BV)
    q_BWV = p_BV[:, None].expand(-1, width - 1, -1)
    if config.drafts_by == "gumbel":
        token_B = draw(p_BV, randomness.exponential_BRV[:, 0])
    else:
        token_B = inverse_cdf(p_BV, randomness.uniform(1)[:, 0])
    if config.fresh == "uniform":
        q_BWV = torch.full_like(q_BWV, 1 / model.vocabulary)
    if config.drafts_by == "gumbel" and config.fresh != "uniform":
        draft_BW = draw(q_BWV, randomness.exponential_BRV[:, 1:width])
    else:
        draft_BW = inverse_cdf(q_BWV, randomness.uniform(width - 1))
    if config.verifies_by == "noise":
        q_BWV = q_BWV[:, :0]
    return begin(model.first_BV, forced_S, token_B, draft_BW, width, q_BWV)


class WindowRound:
    """A round of windows and what it writes: feed, forward, step, and the new state over the old.

    Attributes:
        state: where the images are.
    """

    def __init__(
        self, model: TokenModel, width: int, step: Step, randomness: Randomness, state: State, uniform: bool
    ):
        self.width, self.step, self.randomness = width, step, randomness
        self.state = State(*(torch.empty_like(part, memory_format=torch.contiguous_format) for part in state))
        self.forced_S = pad(model.forced_N, (0, 2 * width), value=-1)
        self.uniform_BW4 = (
            torch.zeros(model.images, width, 4, device=model.first_BV.device) if uniform else None
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.state)

    def begin(self, state: State) -> None:
        """A new batch."""
        self._write(state)

    def __call__(self, model: TokenModel) -> None:
        logits_BWV = model.forward(*feed(self.state, self.width))
        noise_BRV = self.randomness.exponential_BRV
        self._write(self.step(self.state, logits_BWV, self.uniform_BW4, noise_BRV, self.forced_S))

    def only(self, index_B: Tensor) -> WindowRound:
        """Of some images, to go on with, in the memory of all."""
        part = copy.copy(self)
        part.state = State(*(to_front(whole, index_B) for whole in self.state))
        part.randomness = self.randomness.only(index_B)
        if self.uniform_BW4 is not None:
            part.uniform_BW4 = self.uniform_BW4[: len(index_B)]
        return part

    def _write(self, state: State) -> None:
        for mine, new in zip(self.state, state, strict=True):
            mine.copy_(new)


def speculate(
    model: Any,
    sampling: Sampling,
    config: SpeculativeDecodingConfig,
    width: int,
    step: Step,
    randomness: Randomness,
    on_slots: Callable[[int], None] = lambda slots: None,
    *,
    late: bool = False,
    key: tuple = ("speculate",),
) -> tuple[State, int]:
    """Decode a batch.

    Args:
        model: a `TokenModel`.
        width: W, tokens fed per forward, 2 <= W <= N.
        step: what `step_of` gave.
        randomness: with a ring of `ring_of` slots.
        on_slots: called with the number of slots that are finished in every image.
        late: the host reads how far the images are once per round. True: of the round before, so that a GPU
            always has a round to work on; a batch then runs one forward more than it needs.
        key: under which the model keeps the round for the next batch; the decoder first.

    Returns:
        The last state, all finished, and the number of forwards.
    """
    slots, rounds = model.forced_N.shape[0], rounds_of(model)
    turn = begin_round(model, sampling, config, width, step, randomness, key)
    show(model, turn.state.token_BS)
    told, leave = Told(model, late), finished_leave(model, config)
    known, forwards = [1] * model.images, 0
    whole, rows_B = turn.state, None
    part: tuple[int, ...] = ()
    while min(known) < slots:
        if leave and (images := staying(known, slots, rounds.captures)):
            index_B = torch.tensor(images, device=whole.finished_B.device)
            if rows_B is None:
                whole, rows_B = State(*(one.clone() for one in whole)), torch.arange(model.images).to(index_B)
                show(model, whole.token_BS)
            model, turn, rows_B = model.only(images), turn.only(index_B), rows_B[index_B]
            told.only(images, getattr(model, "nan_B", None))
            known, part = [known[image] for image in images], (len(images),)
        turn.randomness.refill(known)
        if turn.uniform_BW4 is not None:
            turn.uniform_BW4.copy_(turn.randomness.uniform(width, 4))
        seen = reach(model, width, max(known) - 1 + (width if late else 0))
        rounds.run((*key, width, *part, seen), partial(turn, model))
        forwards += 1
        known = told.read(turn.state.finished_B) or known if late else turn.state.finished_B.tolist()
        if rows_B is not None:
            for mine, new in zip(whole, turn.state, strict=True):
                mine[rows_B] = new
        on_slots(min(known))
    return State(*(one.clone() for one in whole)), forwards


def finished_leave(model: Any, config: SpeculativeDecodingConfig) -> bool:
    """Whether images that are finished leave the batch: where steps are not compiled for its size.

    On the built-in model 16 images took 41 to 104 forwards: half of what the batch computed was for nothing.
    """
    return getattr(model, "shrinks", False) and not config.compile


def staying(known: Sequence[int], slots: int, captured: bool) -> list[int]:
    """The images that a batch goes on with; []: with all, as too few are finished for moving keys and values to pay.

    Args:
        known: finished slots of each.
        captured: rounds are captured for numbers of images: only halves of the batch, and halves of those, filled up
            with finished ones.
    """
    going = [image for image, slot in enumerate(known) if slot < slots]
    if not captured:
        return going if len(going) <= _LEFT * len(known) else []
    images = len(known)
    while len(going) <= images // 2:
        images //= 2
    done = [image for image, slot in enumerate(known) if slot >= slots]
    return [*going, *done[: images - len(going)]] if images < len(known) else []


def begin_round(
    model: TokenModel,
    sampling: Sampling,
    config: SpeculativeDecodingConfig,
    width: int,
    step: Step,
    randomness: Randomness,
    key: tuple,
) -> WindowRound:
    """The model's round for this key, at the beginning of a batch."""
    forced_S = pad(model.forced_N, (0, 2 * width), value=-1)
    randomness.refill([0] * model.images)  # slot 0's noise, too
    state = start(model, sampling, config, width, randomness, forced_S)
    uniform = config.verifies_by == "ratio"
    turn = rounds_of(model).keep(
        (*key, width), lambda: WindowRound(model, width, step, randomness, state, uniform)
    )
    turn.begin(state)
    return turn
