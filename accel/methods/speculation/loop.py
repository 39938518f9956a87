"""The decoder's loop: feed a window, take the step, until every image is finished.

Shapes: B images, W tokens of a window, N slots of an image, S = N + 2 W, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.core.decoding import Sampling, TokenModel, draw
from accel.core.readback import Readback

from .config import SpeculativeDecodingConfig
from .draft import inverse_cdf
from .randomness import Randomness
from .step import State, begin, feed, noise_step, ratio_step
from .verify import Rule

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


def speculate(
    model: TokenModel,
    sampling: Sampling,
    config: SpeculativeDecodingConfig,
    width: int,
    step: Step,
    randomness: Randomness,
    on_slots: Callable[[int], None] = lambda slots: None,
    *,
    late: bool = False,
) -> tuple[State, int]:
    """Decode a batch.

    Args:
        width: W, tokens fed per forward, 2 <= W <= N.
        step: what `step_of` gave.
        randomness: with a ring of `ring_of` slots.
        on_slots: called with the number of slots that are finished in every image.
        late: the host reads how far the images are once per round. True: of the round before, so that a GPU
            always has a round to work on; a batch then runs one forward more than it needs.

    Returns:
        The last state, all finished, and the number of forwards.
    """
    slots = model.forced_N.shape[0]
    forced_S = pad(model.forced_N, (0, 2 * width), value=-1)
    known = [1] * model.images
    randomness.refill([0] * model.images)  # slot 0's noise, too
    state = start(model, sampling, config, width, randomness, forced_S)
    uses_uniform = config.verifies_by == "ratio"
    forwards = 0
    pending: Readback | None = None
    while min(known) < slots:
        randomness.refill(known)
        if hasattr(model, "at_most"):
            model.at_most = max(known) - 1 + (width if late else 0)
        token_BW, at_B = feed(state, width)
        logits_BWV = model.forward(token_BW, at_B)
        uniform_BW4 = randomness.uniform(width, 4) if uses_uniform else None
        state = step(state, logits_BWV, uniform_BW4, randomness.exponential_BRV, forced_S)
        forwards += 1
        before, pending = pending, Readback(state.finished_B)
        readable = before if late else pending
        if readable is not None:
            known = readable.read().tolist()
        on_slots(min(known))
    return state, forwards
