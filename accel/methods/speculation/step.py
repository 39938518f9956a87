"""What happens between two forwards: verify a window, re-draft what was not reached, draft what enters.

Pure functions of tensors without data-dependent shapes: nothing here waits for the device, so that a step can be
compiled or captured in a CUDA graph.

Why it is exact. Call everything that is drawn for slot j, in any round, its noise. A draft and its q at slot j are
functions of the noise of slots <= j and < j; whether slot j is verified in a round depends on slots < j alone.
By induction over rounds a draft follows its q given the noise of the slots before: a fresh one was drawn from it, or
is an earlier slot's token, so that q is one-hot; a re-draft is drawn from the new p, whose window is a function of
earlier slots (fresh noise, or the slot's own old noise again, which no earlier slot has seen). So speculative
sampling at slot j gives p given everything before, whatever happens behind it. Verification may not use the noise
that the draft came from: given the draft it is no longer noise. Verification by noise is simpler: the token is the one that the slot's noise gives for p, whatever
the draft was, and the draft only decides whether the forward that saw it can be used for the next slot.

Shapes: B images, W slots of a window, V vocabulary, N slots of an image, S = N + 2 W with room for windows that
reach beyond the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accel.core.decoding import Sampling, draw
from accel.kernels.verify import noise_at

from .draft import above, carry, inverse_cdf, residual
from .verify import Rule, accepted, exact


class State(NamedTuple):
    """A batch between two forwards. Slots below `finished_B` are final, the others hold drafts.

    Attributes:
        token_BS: int64, finished tokens, drafts, and beyond the end whatever was drafted there.
        finished_B: int64, finished slots of each image, 1 ... N.
        forwards_B: int64, forwards that each image has needed so far.
        round_BS: int32, which forward made each slot final, from 1; 0: the prompt's.
        spent_BS: float32, total variation spent at each finished slot.
        q_BWV: (B, W - 1, V), what the drafts in the window were drawn from; (B, 0, V) if noise verifies.

    Steps make a new one. A decoder's round writes it over the one that it keeps, so that it can be captured.
    """

    token_BS: Tensor
    finished_B: Tensor
    forwards_B: Tensor
    round_BS: Tensor
    spent_BS: Tensor
    q_BWV: Tensor


class Window(NamedTuple):
    """What a forward is about: slots finished_B ... finished_B + W - 1, of which the last is not drafted yet."""

    slot_BW: Tensor
    draft_BW: Tensor
    forced_BW: Tensor  # -1 where a token is sampled


def begin(
    first_BV: Tensor, forced_S: Tensor, token_B: Tensor, draft_BW: Tensor, width: int, q_BWV: Tensor
) -> State:
    """The state before the first forward: slot 0 is final, the window's drafts (slots 1 ... W - 1) are given."""
    images, places = first_BV.shape[0], forced_S.shape[0]
    token_BS = torch.zeros(images, places, dtype=torch.int64, device=first_BV.device)
    token_BS[:, 0], token_BS[:, 1:width] = token_B, draft_BW
    token_BS = torch.where(forced_S >= 0, forced_S, token_BS)
    return State(
        token_BS,
        torch.ones(images, dtype=torch.int64, device=first_BV.device),
        torch.zeros(images, dtype=torch.int64, device=first_BV.device),
        torch.zeros_like(token_BS, dtype=torch.int32),
        torch.zeros_like(token_BS, dtype=torch.float32),
        q_BWV,
    )


def feed(state: State, width: int) -> tuple[Tensor, Tensor]:
    """(tokens (B, W), their first slots (B,)) for the next forward: the last finished token and W - 1 drafts."""
    at_B = state.finished_B - 1
    index_BW = at_B[:, None] + torch.arange(width, device=at_B.device)
    return state.token_BS.gather(1, index_BW), at_B


def ratio_step(
    state: State,
    logits_BWV: Tensor,
    uniform_BW4: Tensor,
    exponential_BRV: Tensor,
    forced_S: Tensor,
    *,
    sampling: Sampling,
    rule: Rule,
    drafting: str,
    fresh: str,
    slots: int,
    row: int = 0,
) -> State:
    """Verify by p / q, or by a relaxation of it.

    Args:
        logits_BWV: after each fed token, so for slots finished_B ... finished_B + W - 1.
        uniform_BW4: in [0, 1): to pass, to replace, to re-draft independently, for fresh drafts.
        exponential_BRV: noise of the slots, for drafting "gumbel".
        row: slots of a row, for fresh "above".
    """
    width, vocabulary = logits_BWV.shape[1:]
    p_BWV = sampling.probabilities(logits_BWV)
    window = _window(state, width, forced_S)
    sampled_BW = window.forced_BW < 0
    # A forced token may lie outside of the vocabulary; nothing of p or q at its slot is used.
    draft_BW = torch.where(sampled_BW, window.draft_BW, 0)

    drafted_p, drafted = p_BWV[:, :-1], draft_BW[:, :-1]
    chance_BW, spent_BW = rule(drafted_p, state.q_BWV, drafted)
    pass_BW = (uniform_BW4[:, :-1, 0] < chance_BW) | ~sampled_BW[:, :-1]
    count_B = accepted(pass_BW)
    replaced_BW = inverse_cdf(residual(drafted_p, state.q_BWV), uniform_BW4[:, :-1, 1])

    if drafting == "gumbel":
        tail_BW = draw(p_BWV, noise_at(exponential_BRV, window.slot_BW))
    else:
        last_B1 = inverse_cdf(p_BWV[:, -1:], uniform_BW4[:, -1:, 1])  # no draft yet, so none to couple with
        if drafting == "independent":
            tail_BW = inverse_cdf(drafted_p, uniform_BW4[:, :-1, 2])
        else:
            # A slot is verified or re-drafted, never both in one round: the same numbers serve for either.
            # The coupling itself loses nothing, so that a budget is spent where tokens become final.
            stays_BW = uniform_BW4[:, :-1, 0] < exact(drafted_p, state.q_BWV, drafted)[0]
            tail_BW = torch.where(stays_BW, drafted, replaced_BW)
        tail_BW = torch.cat([tail_BW, last_B1], 1)

    index_W = torch.arange(width, device=count_B.device)
    replaced_BW = torch.cat([replaced_BW, tail_BW[:, -1:]], 1)
    token_BW = torch.where(index_W == count_B[:, None], replaced_BW, tail_BW)
    token_BW = torch.where(index_W < count_B[:, None], draft_BW, token_BW)
    spent_BW = torch.where(sampled_BW[:, :-1], spent_BW, 0.0)

    token_BS = _written(state, window, token_BW)
    if fresh == "above":
        enters_BW = _from_above(token_BS, window, row, vocabulary)
        enters_BWV = torch.zeros_like(p_BWV).scatter_(-1, enters_BW[..., None], 1.0)
    elif fresh == "last":
        enters_BWV = p_BWV[:, -1:].expand_as(p_BWV)
        if drafting == "gumbel":
            enters_BW = draw(p_BWV[:, -1:], noise_at(exponential_BRV, window.slot_BW + width))
        else:
            enters_BW = inverse_cdf(enters_BWV, uniform_BW4[..., 3])
    else:
        enters_BWV = torch.full_like(p_BWV, 1 / vocabulary)
        enters_BW = (uniform_BW4[..., 3] * vocabulary).long()
    moved = _advance(state, window, token_BS, count_B, enters_BW, forced_S, slots)
    spent_BS = state.spent_BS.scatter(1, window.slot_BW[:, :-1], spent_BW)
    return State(*moved[:4], spent_BS, carry(p_BWV, enters_BWV, count_B + 1))


def noise_step(
    state: State,
    logits_BWV: Tensor,
    exponential_BRV: Tensor,
    forced_S: Tensor,
    *,
    sampling: Sampling,
    fresh: str,
    slots: int,
    row: int = 0,
) -> State:
    """Verify by the slots' noise: the tokens are those of plain decoding with it, whatever the drafts are."""
    width = logits_BWV.shape[1]
    window = _window(state, width, forced_S)
    token_BW = sampling.draw(logits_BWV, exponential_BRV, window.slot_BW)
    pass_BW = (token_BW == window.draft_BW)[:, :-1] | (window.forced_BW >= 0)[:, :-1]
    token_BS = _written(state, window, token_BW)
    if fresh == "above":
        enters_BW = _from_above(token_BS, window, row, logits_BWV.shape[-1])
    else:
        last_B1V = sampling.probabilities(logits_BWV[:, -1:])
        enters_BW = draw(last_B1V, noise_at(exponential_BRV, window.slot_BW + width))
    return _advance(state, window, token_BS, accepted(pass_BW), enters_BW, forced_S, slots)


def _window(state: State, width: int, forced_S: Tensor) -> Window:
    slot_BW = state.finished_B[:, None] + torch.arange(width, device=forced_S.device)
    return Window(slot_BW, state.token_BS.gather(1, slot_BW), forced_S[slot_BW])


def _from_above(token_BS: Tensor, window: Window, row: int, vocabulary: int) -> Tensor:
    """(B, W) drafts for the slots behind the window: the tokens right above, in the first row the window's last.

    They are certain, given earlier slots: their q is one-hot. Drawing from the law of the slot above instead takes
    as many forwards (built-in model, 16 images, window 16: 55.5 against 55.1; from the window's end 65.6).
    """
    at_BW = window.slot_BW[:, :1] + above(window.slot_BW.shape[1], row, token_BS.device)
    at_BW = torch.where(at_BW < 0, window.slot_BW[:, -1:], at_BW)
    return token_BS.gather(1, at_BW).clamp(max=vocabulary - 1)  # a forced token cannot be drafted


def _written(state: State, window: Window, token_BW: Tensor) -> Tensor:
    """The batch's tokens with the window's in their places. What is not final yet is written again when it is."""
    token_BW = torch.where(window.forced_BW >= 0, window.forced_BW, token_BW)
    return state.token_BS.scatter(1, window.slot_BW, token_BW)


def _advance(
    state: State,
    window: Window,
    token_BS: Tensor,
    count_B: Tensor,
    enters_BW: Tensor,
    forced_S: Tensor,
    slots: int,
) -> State:
    """Write the drafts behind the window, and move on by the accepted tokens and one more."""
    running_B = state.finished_B < slots
    forwards_B = state.forwards_B + running_B
    behind_BW = window.slot_BW + window.slot_BW.shape[1]
    entering_forced_BW = forced_S[behind_BW]
    enters_BW = torch.where(entering_forced_BW >= 0, entering_forced_BW, enters_BW)
    round_BW = forwards_B[:, None].expand_as(window.slot_BW).int()
    return State(  # not `_replace`, of which torch.compile of 2.11 makes an empty one
        token_BS=token_BS.scatter(1, behind_BW, enters_BW),
        finished_B=(state.finished_B + count_B + 1).clamp(max=slots),
        forwards_B=forwards_B,
        round_BS=state.round_BS.scatter(1, window.slot_BW, round_BW),
        spent_BS=state.spent_BS,
        q_BWV=state.q_BWV,
    )
