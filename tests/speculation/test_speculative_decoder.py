"""The decoder in a pipeline: attaching, windows, statistics, and how many forwards it saves."""

import gc
import re
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from small_models import OneGenerator, PictureModel, TableModel, generators

import accel
from accel.core.decoding import Sampling, decode
from accel.core.randomness import Randomness
from accel.errors import (
    AccelWarning,
    AlreadyAcceleratedError,
    ConfigError,
    UnknownNameError,
    UnsupportedError,
)
from accel.methods.speculation import SpeculativeDecodingConfig
from accel.methods.speculation.decoder import SpeculativeDecoder
from accel.methods.speculation.loop import ring_of, speculate, step_of
from accel.methods.speculation.verify import rule_of
from accel.methods.speculation.windows import seconds

Config = SpeculativeDecodingConfig


class FakePipeline:
    """What the method knows of a pipeline: it draws its tokens through `decoder`."""

    def __init__(self):
        self.decoder = decode

    def __call__(self, images=2, seed=0, side=6):
        model = PictureModel(images, side=side, vocabulary=32)
        return self.decoder(model, Sampling(), generators(*range(seed, seed + images)), lambda slots: None)


FIXED = Config(window=8, auto_disable=False)


def test_attached_and_removed():
    pipe = FakePipeline()
    plain, before = pipe(), dict(vars(pipe))
    with accel.accelerate(pipe, FIXED) as handle:
        assert torch.equal(pipe(), plain)
        assert handle.stats.tokens_per_forward > 1.5
        assert isinstance(pipe.decoder, SpeculativeDecoder)
        with pytest.raises(AlreadyAcceleratedError):
            accel.accelerate(pipe, FIXED)
    assert vars(pipe) == before
    assert pipe.decoder is decode
    handle.remove()
    assert pipe.decoder is decode


def test_a_decoder_of_the_class_is_given_back_as_such():
    class Classy:
        decoder = staticmethod(decode)

    pipe = Classy()
    with accel.accelerate(pipe, FIXED):
        assert "decoder" in vars(pipe)
    assert vars(pipe) == {}
    assert pipe.decoder is decode


def test_replace_and_presets():
    pipe = FakePipeline()
    accel.accelerate(pipe, "lossless")
    handle = accel.accelerate(pipe, "grouped", replace=True)
    assert handle.config == Config(group_size=32)
    assert pipe.decoder.config is handle.config
    handle.remove()
    assert pipe.decoder is decode
    assert accel.configs.load("lossless") == Config()


def test_nobody_is_kept_alive():
    pipe = FakePipeline()
    accel.accelerate(pipe, FIXED)
    gc.collect()
    assert isinstance(pipe.decoder, SpeculativeDecoder), "a handle that nobody kept is still attached"
    with pytest.raises(AlreadyAcceleratedError):
        accel.accelerate(pipe, FIXED)
    alive = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("pipe", [SimpleNamespace(), SimpleNamespace(decoder=torch.nn.Linear(1, 1))])
def test_other_pipelines_are_refused(pipe):
    with pytest.raises(UnsupportedError, match="needs an autoregressive pipeline"):
        accel.accelerate(pipe, FIXED)


# Statistics


def test_statistics_add_up():
    decoder = SpeculativeDecoder(FIXED)
    model, seen = PictureModel(3, side=6, vocabulary=32), []
    token_BN = decoder(model, Sampling(), generators(1, 2, 3), seen.append)
    stats = decoder.stats
    assert token_BN.shape == (3, 36)
    assert stats.forwards == len(model.forwards)
    assert set(model.forwards) == {8}
    assert (stats.runs, stats.images, stats.slots, stats.plain_forwards) == (1, 3, 3 * 35, 35)
    assert stats.forwards == int(stats.forwards_B.max()) < 35
    assert stats.tokens_per_forward == 3 * 35 / int(stats.forwards_B.sum())
    # Rounds rise along an image, from the prompt's 0 to its last; a run is as long as its round says.
    rounds = stats.rounds_BN
    assert rounds[:, 0].eq(0).all()
    assert rounds.diff(dim=1).ge(0).all()
    assert torch.equal(rounds[:, -1].long(), stats.forwards_B)
    for row, run in zip(rounds.tolist(), stats.runs_BN.tolist(), strict=True):
        assert run == [row.count(r) for r in row]
    assert stats.runs_BN.max() <= 8
    assert stats.spent_BN.eq(0).all()
    assert stats.tv_per_token == 0
    assert seen == sorted(seen)
    assert seen[-1] == 36
    assert "lossless" in str(stats)
    assert stats.as_dict()["runs_BN"] == stats.runs_BN.tolist()
    decoder(PictureModel(1, side=6, vocabulary=32), Sampling(), generators(5))
    assert (stats.runs, stats.images, stats.slots, stats.plain_forwards) == (2, 4, 4 * 35, 70)
    stats.reset()
    assert (stats.runs, stats.rounds_BN, stats.tokens_per_forward) == (0, None, 1.0)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Config(tv_budget=0.05), 0.05),
        (Config(relaxation="mixture", tv_budget=0.05), 0.05),
        (Config(group_size=8), 1.0),
    ],
)
def test_spent_variation_is_counted_and_within_the_budget(config, most):
    config = Config(**{**vars(config), "window": 8, "auto_disable": False})
    decoder = SpeculativeDecoder(config)
    decoder(PictureModel(8, side=6, vocabulary=32), Sampling(), generators(*range(8)))
    spent = decoder.stats.spent_BN
    assert 0 < spent.max() <= most + 1e-6
    assert spent[:, 0].eq(0).all()
    assert decoder.stats.tv_per_token == pytest.approx(float(spent[:, 1:].mean()), abs=1e-6)
    assert "lossless" not in str(decoder.stats)


def test_measured_distance_of_two_slots_is_the_predicted_one():
    """Slot 1's law given slot 0, counted over many images, is as far from the model's as the stats say."""
    images = 40_000
    for config in (
        Config(group_size=2, window=2, auto_disable=False),
        Config(relaxation="mixture", tv_budget=0.1, window=2, auto_disable=False),
    ):
        model = TableModel(images, forced=(-1, -1), seed=2)
        step = step_of(config, Sampling(), rule_of(config), 2)
        state, _ = speculate(model, Sampling(), config, 2, step, OneGenerator(model, 2))
        law = model.law(Sampling())
        some = 0.0
        for first in range(4):
            rows = state.token_BS[:, 0] == first
            spent = state.spent_BS[rows, 1]
            counted = torch.bincount(state.token_BS[rows, 1], minlength=4).double() / int(rows.sum())
            distance = float((counted - law[first] / law[first].sum()).abs().sum() / 2)
            assert spent.eq(spent[0]).all()
            assert distance == pytest.approx(float(spent[0]), abs=2 * int(rows.sum()) ** -0.5)
            some = max(some, distance)
        assert some > 0.05


# Forwards


def tokens_per_forward(config, images=12, side=12):
    decoder = SpeculativeDecoder(config)
    decoder(PictureModel(images, side=side), Sampling(), generators(*range(images)))
    return decoder.stats.tokens_per_forward


def test_coupled_drafts_need_fewer_forwards():
    """On a picture-like model of 144 slots (measured: SJD 2.7, maximal 4.8 with a width of 16). The bounds are a
    tenth below what was measured; the seeds are fixed."""
    common = {"window": 16, "auto_disable": False}
    sjd = tokens_per_forward(Config(drafting="independent", fresh="uniform", **common))
    uniform = tokens_per_forward(Config(drafting="maximal", fresh="uniform", **common))
    maximal = tokens_per_forward(Config(drafting="maximal", **common))
    gumbel = tokens_per_forward(Config(drafting="gumbel", verification="ratio", **common))
    noise = tokens_per_forward(Config(**common))
    grouped = tokens_per_forward(Config(group_size=8, **common))
    assert 2.0 < sjd < uniform < maximal < grouped
    assert uniform > 1.25 * sjd
    assert min(maximal, gumbel, noise) > 1.5 * sjd


def test_work_per_image_is_linear_in_its_tokens():
    """Twice the slots take about twice the forwards, and memory per window does not grow with them."""
    few, many = tokens_per_forward(FIXED, side=8), tokens_per_forward(FIXED, side=16)
    assert many > 0.8 * few
    sizes = set()

    class Spy(SpeculativeDecoder):
        def _step(self, model, sampling):
            step = super()._step(model, sampling)

            def watched(state, logits, uniform, noise, forced):
                sizes.add((noise.numel(), state.q_BWV.numel()))
                return step(state, logits, uniform, noise, forced)

            return watched

    for side in (6, 12):
        for config in (FIXED, Config(window=8, auto_disable=False, drafting="maximal")):
            Spy(config)(PictureModel(2, side=side), Sampling(), generators(1, 2))
    assert len(sizes) == 2


@pytest.mark.parametrize("config", [Config(), Config(drafting="maximal")])
def test_reading_a_round_late_changes_nothing_but_one_forward(config):
    """As on a GPU: the noise is there in time although the host does not know how far the images are."""
    results = []
    for late in (False, True):
        model = PictureModel(5, side=8, vocabulary=32)
        step = step_of(config, Sampling(), rule_of(config), model.slots)
        ring = ring_of(config, 6, late)
        randomness = Randomness(generators(*range(5)), 32, model.slots, ring, torch.device("cpu"))
        results.append(speculate(model, Sampling(), config, 6, step, randomness, late=late))
    (prompt, forwards), (behind, more) = results
    assert more == forwards + 1
    assert torch.equal(behind.token_BS[:, :64], prompt.token_BS[:, :64])
    assert torch.equal(behind.forwards_B, prompt.forwards_B)


def test_one_slot_and_windows_wider_than_the_image():
    for slots in (1, 2, 3):
        model = TableModel(4, forced=(-1,) * slots)
        plain = decode(model, Sampling(), generators(1, 2, 3, 4))
        decoder = SpeculativeDecoder(Config(window=16, auto_disable=False))
        assert torch.equal(decoder(model, Sampling(), generators(1, 2, 3, 4)), plain)


# Choosing a window, and not to speculate


def clock(per_round):
    """A timer for which a round of W tokens takes `per_round[W]` seconds; runs what it times once."""

    def timer(action, device):
        action()
        return per_round[timer.model.forwards[-1]]

    return timer


def decode_with(config, per_round, images=2):
    timer = clock(per_round)
    decoder = SpeculativeDecoder(config, timer=timer)
    timer.model = PictureModel(images)
    token_BN = decoder(timer.model, Sampling(), generators(*range(images)))
    return decoder, timer.model, token_BN


def test_the_width_that_promises_most_per_second():
    # On a GPU a wide window costs little more than a token: the widest.
    decoder, model, _ = decode_with(Config(), {1: 1.0, 8: 1.0, 16: 1.0, 32: 1.1, 64: 1.1})
    assert decoder.stats.window == 64
    # Where time grows with width, a narrow one; hopeless widths are not even tried.
    decoder, model, _ = decode_with(Config(), {1: 1.0, 8: 1.2, 16: 1.9, 32: 4.0, 64: 8.0})
    assert decoder.stats.window == 8
    assert 64 not in model.forwards
    assert (model.forwards.count(32), model.forwards.count(16), model.forwards.count(1)) == (1, 3, 3)
    decoder, model, _ = decode_with(Config(), {1: 1.0, 8: 1.2, 16: 2.4, 32: 4.0})
    assert model.forwards.count(16) == 1, "out of reach, and not timed again"


def test_measured_gain_moves_the_choice():
    """The first batch shows that this model accepts more than was guessed: then a wider window pays."""
    timer = clock({1: 1.0, 8: 1.2, 16: 1.55, 32: 4.0, 64: 8.0})
    decoder = SpeculativeDecoder(Config(), timer=timer)
    windows = []
    for _ in range(2):
        timer.model = PictureModel(2)
        decoder(timer.model, Sampling(), generators(1, 2))
        windows.append(decoder.stats.window)
    assert windows == [8, 16]
    assert 1 not in timer.model.forwards, "widths are timed once per batch size"


def test_a_large_batch_is_judged_by_its_slowest_image():
    """What one image gains says nothing about a batch; a batch that turns out not to gain is decoded plainly."""
    per_round = {1: 1.0, 8: 2.6}
    timer = clock(per_round)
    decoder = SpeculativeDecoder(Config(window=8), timer=timer)
    timer.model = PictureModel(1)
    decoder(timer.model, Sampling(), generators(0))
    timer.model = PictureModel(12)
    decoder(timer.model, Sampling(), generators(*range(12)))
    assert decoder.stats.plain_runs == 0, "nothing is known about batches of 12 yet"
    per_round[8] = decoder.stats.tokens_per_forward  # what an image gains, but not the batch
    decoder._timed.clear()
    timer.model = PictureModel(12)
    with pytest.warns(AccelWarning, match="does not pay for a batch of 12"):
        decoder(timer.model, Sampling(), generators(*range(12)))


def test_disabled_where_windows_do_not_pay():
    slow = {1: 1.0, 8: 8.0}
    with pytest.warns(AccelWarning, match="does not pay for a batch of 2"):
        decoder, _, token_BN = decode_with(Config(window=8), slow)
    assert torch.equal(token_BN, decode(PictureModel(2), Sampling(), generators(0, 1)))
    assert (decoder.stats.plain_runs, decoder.stats.window, decoder.stats.forwards) == (1, 1, 143)
    assert decoder.stats.tokens_per_forward == 1
    assert "plainly 1 of 1" in str(decoder.stats)
    decoder, _, _ = decode_with(Config(window=8, auto_disable=False), slow)
    assert decoder.stats.plain_runs == 0
    decoder, _, _ = decode_with(Config(window=8), {1: 1.0, 8: 1.5})
    assert decoder.stats.plain_runs == 0


def test_timing_does_not_touch_the_images():
    plain = decode(PictureModel(2), Sampling(), generators(0, 1))
    _, _, token_BN = decode_with(Config(window=8), {1: 1.0, 8: 1.1})
    assert torch.equal(token_BN, plain)


def test_the_default_timer_waits_and_repeats():
    calls = []

    def action():
        calls.append(0)
        time.sleep(0.05)  # somebody else's turn
        until = time.process_time() + 0.004
        while time.process_time() < until:
            pass

    assert 0.004 <= seconds(action, torch.device("cpu")) < 0.05
    assert len(calls) == 2


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, 'window must be a whole number >= 2 or "auto", got 1'),
        ({"window": 8.0}, "window must be"),
        ({"drafting": "tree"}, "drafting must be one of auto, gumbel, maximal, independent, got 'tree'"),
        ({"verification": "none"}, "verification must be one of"),
        ({"fresh": "copy"}, "fresh must be one of"),
        ({"relaxation": "both"}, "relaxation must be one of"),
        ({"group_size": 0}, "group_size must be a whole number >= 1 (1 is lossless), got 0"),
        ({"group_size": 2.5}, "group_size must be"),
        ({"probability_filter": 0}, "probability_filter must be in (0, 1] or None, got 0"),
        ({"distance_filter": -1.0}, "distance_filter must be > 0 or None"),
        ({"mixture_weight": 0.0}, "mixture_weight must be in (0, 1]"),
        ({"tv_budget": 1.0}, "tv_budget must be in [0, 1) or None, got 1.0"),
        ({"auto_disable": 1}, "auto_disable must be true or false"),
        ({"compile": "yes"}, "compile must be true or false"),
        ({"relaxation": "mixture"}, "needs tv_budget >= 0 or mixture_weight < 1"),
        ({"relaxation": "mixture", "tv_budget": 0.1, "group_size": 4}, "needs relaxation='group'"),
        ({"relaxation": "mixture", "tv_budget": 0.1, "mixture_weight": 0.9}, "leave mixture_weight out"),
        ({"mixture_weight": 0.9}, "needs relaxation='mixture'"),
        ({"fresh": "uniform"}, "it goes with verification='ratio' or with drafting='maximal'"),
        ({"verification": "noise", "drafting": "maximal"}, "it needs drafting='gumbel'"),
        ({"verification": "noise", "drafting": "gumbel", "group_size": 2}, "and nothing relaxed"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**settings)


def test_auto_settings():
    assert (Config().drafts_by, Config().verifies_by, Config().lossless) == ("gumbel", "noise", True)
    relaxed = Config(group_size=4)
    assert (relaxed.drafts_by, relaxed.verifies_by, relaxed.lossless) == ("maximal", "ratio", False)
    assert Config(verification="ratio").drafts_by == "maximal"
    assert Config(tv_budget=0.0).lossless
    assert Config(tv_budget=0.1).group_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert Config(tv_budget=0.1, group_size=24).group_sizes == (1, 2, 4, 8, 16, 24)
    assert Config(group_size=24).group_sizes == (24,)
    assert Config.gsd(25).group_size == 25
    assert (Config.gsd().distance_filter, Config.gsd().probability_filter) == (0.5, 0.15)
    assert Config.sjd().lossless
    with pytest.raises(UnknownNameError, match="probability_filter"):
        accel.configs.load({"method": "speculative_decoding", "probability_filtre": 0.1})


def test_what_the_model_must_offer():
    config = Config(group_size=40, window=8, auto_disable=False)
    with pytest.raises(ConfigError, match=r"group_size must be 1 to the model's vocabulary of 32, got 40"):
        SpeculativeDecoder(config)(PictureModel(1, side=4, vocabulary=32), Sampling(), generators(0))
    config = Config(group_size=3, distance_filter=0.5, window=8, auto_disable=False)
    with pytest.raises(UnsupportedError, match="TableModel does not offer: pass distance_filter=None"):
        SpeculativeDecoder(config)(TableModel(1), Sampling(), generators(0))
    SpeculativeDecoder(config)(PictureModel(1, side=4, vocabulary=32), Sampling(), generators(0))


def test_a_near_codebook_groups_less():
    """No pair of codes is near enough: groups of one, nothing spent."""
    config = Config(group_size=8, distance_filter=1e-6, window=8, auto_disable=False)
    decoder = SpeculativeDecoder(config)
    decoder(PictureModel(2, side=6, vocabulary=32), Sampling(), generators(0, 1))
    assert decoder.stats.tv_per_token < 1e-6
