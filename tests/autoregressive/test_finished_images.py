"""Images of a batch finish after different numbers of forwards: where that costs nothing else, finished ones leave it."""

from __future__ import annotations

import re

import numpy
import pytest
import tape
import tiny_janus
import torch
from tiny_janus import PROMPTS

import accel
from accel.core.decoding import Told
from accel.core.rounds import Rounds
from accel.errors import NumericsError
from accel.methods.speculation import SpeculativeDecodingConfig as Config
from accel.methods.speculation import decoder, loop, verify
from accel.pipelines.autoregressive import AutoregressivePipeline, cache
from accel.pipelines.autoregressive import model as model_module
from accel.pipelines.autoregressive import pipeline as pipeline_module
from accel.pipelines.autoregressive.janus import Janus
from accel.pipelines.autoregressive.kept import Kept

CONFIGS = {
    "noise": Config(window=4, auto_disable=False),
    "maximal": Config(window=4, auto_disable=False, drafting="maximal"),
    "gumbel": Config(window=4, auto_disable=False, drafting="gumbel", verification="ratio"),
}


@pytest.fixture
def pipe():
    janus = Janus(tiny_janus.model(grid=6, context=64).requires_grad_(False).double(), tiny_janus.tokenizer())
    pipe = AutoregressivePipeline(janus, graphs=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def rows(monkeypatch, pipe):
    """Of every forward after the prompt: how many images were in it."""
    found: list[int] = []
    once = model_module.forward_once

    def spied(model, token_BW, at_B, seen):
        found.append(token_BW.shape[0])
        return once(model, token_BW, at_B, seen)

    monkeypatch.setattr(model_module, "forward_once", spied)
    monkeypatch.setattr(pipeline_module, "forward_once", spied)
    pipe._forward = spied
    return found


def tokens(pipe, seeds=(1, 2, 3, 4), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"temperature": 0.5, "top_k": 20, "guidance_scale": 2.0, "output_type": "tokens", **options}
    return pipe(list(PROMPTS) * (len(seeds) // 4), generator=generators, **options).images


@pytest.fixture
def taped(monkeypatch, pipe):
    """The pipeline with rounds that are recorded and replayed, and of every round how many images were in it."""
    monkeypatch.setattr(decoder, "_late", lambda model: True)  # as where rounds are captured
    monkeypatch.setattr(verify, "ranked", lambda p_BWV: p_BWV.sort(dim=-1, stable=True))
    pipe._kept = Kept(lambda device, failed: tape.capture, lambda function: function, devices=("cpu",))
    found: list[int] = []
    run = Rounds.run

    def spied(rounds, key, body):
        if key[0] != "prefill":
            found.append(body.args[0].images)
        run(rounds, key, body)

    monkeypatch.setattr(Rounds, "run", spied)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_finished_images_leave_and_nobody_notices(pipe, rows, monkeypatch, name):
    drawn, forwards, images = [], [], []
    for left in (0.0, 0.75, 0.99):  # nobody leaves; in threes and less; each at once
        monkeypatch.setattr(loop, "_LEFT", left)
        with accel.accelerate(pipe, CONFIGS[name]) as handle:
            rows.clear()
            drawn.append(tokens(pipe))
            stats = handle.stats
            drawn[-1] = torch.cat([drawn[-1], stats.rounds_BN], 1)
            forwards.append(stats.forwards_B)
            images.append(list(rows))
    assert len(set(forwards[0].tolist())) > 1, "a batch that is not ragged shows nothing"
    for i in (1, 2):
        assert torch.equal(drawn[i], drawn[0])
        assert torch.equal(forwards[i], forwards[0])
        assert len(images[i]) == len(images[0]) == max(forwards[0])
    assert set(images[0]) == {4}
    assert sum(images[2]) == forwards[0].sum(), "no forward for an image that is finished"
    assert sum(images[0]) > sum(images[1]) >= sum(images[2])


def test_a_preview_shows_those_that_have_left_too(pipe, rows, monkeypatch):
    monkeypatch.setattr(loop, "_LEFT", 0.99)
    previews = []
    with accel.accelerate(pipe, CONFIGS["noise"]):
        images = tokens(
            pipe, output_type="np", callback_on_step_end=lambda p, f, n, given: previews.append(given["preview"]())
        )  # fmt: skip
    assert rows[-1] == 1
    assert len(previews[-1]) == 4
    for shown, image in zip(previews[-1], images, strict=True):
        assert numpy.array_equal(numpy.asarray(shown), (image * 255).round().astype("uint8"))


@torch.no_grad()
def test_some_of_the_images_go_on_as_they_would_have(pipe):
    """With their own keys, positions and places in what `check` says."""
    layout = pipe.adapter.layout(None, None)
    model = model_module.PromptedModel(pipe.adapter, layout, PROMPTS, 3.0, grow=True)
    token_BW, at_B = torch.arange(20).view(4, 5) % model.vocabulary, torch.tensor([0, 0, 0, 0])
    model.forward(token_BW, at_B)
    expected = model.forward(token_BW.flip(1), at_B + 3)
    part = model.only([0, 1, 3]).only([1, 2])
    got = part.forward(token_BW.flip(1)[[1, 3]], at_B[:2] + 3)
    torch.testing.assert_close(got, expected[[1, 3]])
    model.check()
    part.nan_B[1] = part.start_R[1] + 30
    with pytest.raises(NumericsError, match="1 of 4 images, first in image 3 at slot 31 "):
        model.check()


def test_batches_that_are_compiled_stay_whole(pipe, rows, monkeypatch):
    monkeypatch.setattr(loop, "_LEFT", 0.99)
    with accel.accelerate(pipe, CONFIGS["noise"]):
        expected = tokens(pipe)
        rows.clear()
        pipe._forward = lambda *inputs: model_module.forward_once(
            *inputs
        )  # as `pipe.compile()` puts another one there
        assert torch.equal(tokens(pipe), expected)
    assert set(rows) == {4}


EIGHT = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_batch_goes_on_in_halves(pipe, taped, monkeypatch, name):
    """Token by token what the whole batch draws, on graphs of 8, 4, 2 and 1 images that later batches replay."""
    calls = [{"seeds": EIGHT}, {"seeds": EIGHT[::-1]}, {"seeds": EIGHT, "temperature": 0.6}]

    def drawn():
        found = []
        with accel.accelerate(pipe, CONFIGS[name]) as handle:
            for call in (*calls, *calls):
                images = tokens(pipe, **call)
                stats = handle.stats
                found.append((images, stats.rounds_BN.clone(), stats.forwards_B.clone()))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(loop, "finished_leave", lambda model, config: False)
        expected, whole = drawn(), list(taped)
    assert set(whole) == {8}
    pipe.graphs = True
    taped.clear()
    got = drawn()
    for one, other in zip(expected, got, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert set(taped) == {8, 4, 2, 1}
    assert len(taped) == len(whole)
    assert sum(taped) < 0.95 * sum(whole)


def test_rows_that_are_not_moved_would_be_seen(pipe, taped, monkeypatch):
    """The negative control: the first rows' keys and values, whichever images go on."""
    pipe.graphs = True
    with accel.accelerate(pipe, CONFIGS["noise"]):
        expected = tokens(pipe, EIGHT)
        monkeypatch.setattr(cache, "to_front", lambda whole, index: whole[: len(index)])
        assert not torch.equal(tokens(pipe, EIGHT), expected)


def test_previews_and_nan_of_a_captured_batch_that_shrank(pipe, taped):
    pipe.graphs = True
    previews, spoilt = [], []

    def look(pipe, finished, slots, given):
        previews.append(given["preview"]())

    def spoil(pipe, finished, slots, given):
        if taped[-1] == 2 and not spoilt:
            spoilt.append(finished)
            pipe.model.model.generation_head.vision_head.weight.data.fill_(torch.nan)

    with accel.accelerate(pipe, CONFIGS["noise"]) as handle:
        images = tokens(pipe, EIGHT, output_type="np", callback_on_step_end=look)
        assert taped[-1] < 8
        for shown, image in zip(previews[-1], images, strict=True):
            assert numpy.array_equal(numpy.asarray(shown), (image * 255).round().astype("uint8"))
        slowest = handle.stats.forwards_B[-8:].topk(2).indices.tolist()
        with pytest.raises(NumericsError, match=r"[12] of 8 images, first in image ") as raised:
            tokens(pipe, EIGHT, callback_on_step_end=spoil)
    named, slot = re.search(r"in image (\d+) at slot (\d+)", str(raised.value)).groups()
    assert int(named) in slowest
    assert int(slot) >= spoilt[0]


def test_what_the_host_knows_follows_the_images_that_stay():
    """The round on its way was the whole batch's; its numbers are told in the order of the part."""
    told = Told(object(), late=True)
    assert told.read(torch.tensor([1, 2, 3])) is None
    assert told.read(torch.tensor([4, 5, 6])) == [1, 2, 3]
    told.only([2, 0], None)
    assert told.read(torch.tensor([9, 7])) == [6, 4]
    told.only([1], None)
    assert told.read(torch.tensor([8])) == [7]
    assert told.read(torch.tensor([10])) == [8]


def test_who_stays():
    known = [9, 5, 9, 9, 4, 9, 9, 9]
    assert loop.staying(known, 9, captured=False) == [1, 4]
    assert loop.staying(known, 9, captured=True) == [1, 4]
    assert loop.staying([9, 5, 9, 5, 5, 9, 9], 9, captured=True) == [1, 3, 4], "7 halved"
    assert loop.staying([5, 5, 5, 9, 9, 9, 9, 9], 9, captured=True) == [0, 1, 2, 3], "one is finished"
    assert loop.staying([5, 5, 5, 5, 5, 9, 9, 9], 9, captured=True) == []
