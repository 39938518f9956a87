"""Every rule that calls itself lossless gives exactly the model's law of whole sequences, and two mistakes that
public implementations made do not."""

from dataclasses import replace

import pytest
import tape
import torch
from small_models import OneGenerator, TableModel, generators, z_score

from accel.core.decoding import Sampling, decode
from accel.core.rounds import Rounds
from accel.methods.speculation import SpeculativeDecodingConfig
from accel.methods.speculation.decoder import SpeculativeDecoder
from accel.methods.speculation.loop import speculate, step_of
from accel.methods.speculation.verify import rule_of

Config = SpeculativeDecodingConfig
LOSSLESS = {
    "sjd": Config.sjd(),
    "maximal": Config(drafting="maximal"),
    "maximal, uniform": Config(drafting="maximal", fresh="uniform"),
    "gumbel": Config(drafting="gumbel", verification="ratio"),
    "gumbel, uniform": Config(drafting="gumbel", verification="ratio", fresh="uniform"),
    "noise": Config(),
    "maximal, last": Config(drafting="maximal", fresh="last"),
    "gumbel, last": Config(drafting="gumbel", verification="ratio", fresh="last"),
    "noise, last": Config(fresh="last"),
    "sjd, above": Config(drafting="independent"),
}
SAMPLINGS = {
    "temperature": Sampling(temperature=1.4),
    "top-k": Sampling(top_k=3),
    "top-p": Sampling(top_p=0.8),
}
FREE = (-1,) * 5
#: An end-of-line token outside of the vocabulary after three tokens.
LINES = (-1, -1, -1, 7, -1, -1)


def sequences(model, config, sampling, width, seed, wrap=lambda step: step):
    step = wrap(step_of(config, sampling, rule_of(config), model.slots, model.row))
    state, _ = speculate(model, sampling, config, width, step, OneGenerator(model, width, seed))
    return state


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSLESS)
def test_joint_law_of_a_ragged_batch(name, guidance, sampling):
    """6000 images in one batch, each at its own position after the first forward. A seed of its own for every
    case: |z| < 4 is then missed once in thousands of cases (chi-square's tail), and never by chance again."""
    case = list(LOSSLESS).index(name) * 10 + list(SAMPLINGS).index(sampling) + (guidance > 1) * 100
    model = TableModel(6000, forced=FREE, guidance=guidance, seed=case, row=2)
    state = sequences(model, LOSSLESS[name], SAMPLINGS[sampling], 3, seed=case)
    assert state.forwards_B.unique().numel() > 1, "the batch is not ragged"
    assert abs(z_score(state.token_BS[:, :5], model.law(SAMPLINGS[sampling]))) < 4
    assert state.spent_BS[:, :5].eq(0).all()


@pytest.mark.parametrize("name", LOSSLESS)
def test_joint_law_through_rounds_that_are_replayed(name):
    """The same batch on a tape, as a GPU captures it: the second round is recorded, and the third is its replay."""
    seed = 300 + list(LOSSLESS).index(name)
    model = TableModel(6000, forced=FREE, guidance=2.5, seed=seed, row=2)
    model.rounds = Rounds(tape.capture)
    state = sequences(model, LOSSLESS[name], Sampling(), 3, seed=seed)
    assert model.forwards == [3, 3], "as it is, and once more while it was recorded; later rounds are replays"
    assert state.forwards_B.max() > 2
    assert abs(z_score(state.token_BS[:, :5], model.law(Sampling()))) < 4


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("name", LOSSLESS)
def test_joint_law_around_forced_tokens(name, width):
    model = TableModel(6000, forced=LINES, seed=width, row=4)
    state = sequences(model, LOSSLESS[name], Sampling(), width, seed=width)
    assert state.token_BS[:, 3].eq(7).all()
    drawn = state.token_BS[:, [0, 1, 2, 4, 5]]
    assert abs(z_score(drawn, model.law(Sampling()))) < 4


def test_plain_decoding_passes_the_same_test():
    model = TableModel(3000, forced=LINES)
    token_BN = decode(model, Sampling(), generators(*range(3000)))
    assert abs(z_score(token_BN[:, [0, 1, 2, 4, 5]], model.law(Sampling()))) < 4


# Negative controls: the test above can fail, and does for the two mistakes of public code.


def q_of(state, slot_BW):
    """The q that a state holds for slots of its window."""
    at = (slot_BW - state.finished_B[:, None]).clamp(0, state.q_BWV.shape[1] - 1)
    return state.q_BWV.gather(1, at[..., None].expand(-1, -1, state.q_BWV.shape[-1]))


def stale_q(step):
    """The coupling keeps a token and its old q with it."""

    def broken(state, *inputs):
        new = step(state, *inputs)
        width = state.q_BWV.shape[1]
        slot_BW = new.finished_B[:, None] + torch.arange(width)
        stayed = slot_BW < state.finished_B[:, None] + width
        stayed &= new.token_BS.gather(1, slot_BW) == state.token_BS.gather(1, slot_BW)
        return new._replace(q_BWV=torch.where(stayed[..., None], q_of(state, slot_BW), new.q_BWV))

    return broken


def shortest_row(step):
    """All images move on as far as the one that accepted least; the others' tokens stay as drafts."""

    def broken(state, *inputs):
        new = step(state, *inputs)
        width, slots = state.q_BWV.shape[1], inputs[-1].shape[0] - 2 * (state.q_BWV.shape[1] + 1)
        running = state.finished_B < slots
        least = (new.finished_B - state.finished_B)[running].min()
        finished_B = torch.where(running, state.finished_B + least, state.finished_B)
        slot_BW = finished_B[:, None] + torch.arange(width)
        taken_back = (slot_BW < new.finished_B[:, None]) & (slot_BW < state.finished_B[:, None] + width)
        q_BWV = torch.where(taken_back[..., None], q_of(state, slot_BW), q_of(new, slot_BW))
        return new._replace(finished_B=finished_B, q_BWV=q_BWV)

    return broken


@pytest.mark.parametrize("row", [0, 2])  # fresh drafts from the window's end, from above
@pytest.mark.parametrize("name", ["maximal", "gumbel"])
@pytest.mark.parametrize("wrap", [stale_q, shortest_row])
def test_the_known_mistakes_are_seen(name, wrap, row):
    model = TableModel(10000, forced=FREE, row=row)
    state = sequences(model, LOSSLESS[name], Sampling(), 4, seed=3, wrap=wrap)
    assert z_score(state.token_BS[:, :5], model.law(Sampling())) > 10


def test_numbers_that_serve_twice_are_seen():
    """Verification and drafts need numbers that are independent of each other, within a window and between."""

    class Repeated(OneGenerator):
        def uniform(self, *shape):
            return super().uniform(*(1 for _ in shape)).expand(-1, *shape)

    model, config = TableModel(10000, forced=FREE), LOSSLESS["sjd"]
    step = step_of(config, Sampling(), rule_of(config), 5)
    state, _ = speculate(model, Sampling(), config, 4, step, Repeated(model, 4))
    assert z_score(state.token_BS[:, :5], model.law(Sampling())) > 10


# Images, not only laws.


@pytest.mark.parametrize("forced", [FREE, LINES])
@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("row", [0, 1, 2, 4])
def test_noise_verification_gives_the_images_of_plain_decoding(forced, window, row):
    seeds, sampling = range(40), Sampling(temperature=1.2, top_k=3)
    plain = decode(TableModel(40, forced=forced), sampling, generators(*seeds))
    decoder = SpeculativeDecoder(Config(window=window, auto_disable=False))
    model = TableModel(40, forced=forced, row=row)
    assert torch.equal(decoder(model, sampling, generators(*seeds)), plain)
    assert decoder.stats.tokens_per_forward > 1.1


@pytest.mark.parametrize("name", [*LOSSLESS, "group", "mixture"])
def test_greedy_is_plain_greedy(name):
    config = {
        **LOSSLESS,
        "group": Config(group_size=3, drafting="maximal"),
        "mixture": Config(relaxation="mixture", tv_budget=0.0),
    }[name]
    greedy = Sampling(temperature=0)
    plain = decode(TableModel(1, forced=LINES), greedy, generators(0))
    for seed in range(5):
        model = TableModel(1, forced=LINES, row=4)
        decoder = SpeculativeDecoder(replace(config, window=4, auto_disable=False))
        assert torch.equal(decoder(model, greedy, generators(seed)), plain)


@pytest.mark.parametrize("name", LOSSLESS)
def test_an_image_depends_on_its_own_seed_alone(name):
    config = replace(LOSSLESS[name], window=3, auto_disable=False)

    def tokens(*seeds):
        model = TableModel(len(seeds), forced=LINES, row=4)
        return SpeculativeDecoder(config)(model, Sampling(), generators(*seeds))

    together = tokens(*range(12))
    assert together.unique(dim=0).shape[0] > 6
    for seed in (0, 7, 11):
        assert torch.equal(tokens(seed)[0], together[seed])
    assert torch.equal(tokens(5, 5, 9), together[[5, 5, 9]])


def stale_one_hot(step):
    """A draft from above is verified as if it had been drawn from the law at the window's end."""

    def broken(state, logits_BWV, *inputs):
        new = step(state, logits_BWV, *inputs)
        width = state.q_BWV.shape[1]
        entered = (new.finished_B - state.finished_B)[:, None] + torch.arange(width) > width
        law_BV = Sampling().probabilities(logits_BWV[:, -1:])
        return new._replace(q_BWV=torch.where(entered[..., None], law_BV, new.q_BWV))

    return broken


@pytest.mark.parametrize("name", ["sjd, above", "maximal", "gumbel"])
def test_a_draft_from_above_is_not_one_from_a_law(name):
    model = TableModel(10000, forced=FREE, row=2)
    state = sequences(model, LOSSLESS[name], Sampling(), 2, seed=3, wrap=stale_one_hot)
    assert z_score(state.token_BS[:, :5], model.law(Sampling())) > 10
