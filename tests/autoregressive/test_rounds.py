"""Captured rounds draw what eager ones draw: on the CPU replayed by a tape of operators, on a GPU by CUDA graphs."""

from __future__ import annotations

import warnings

import pytest
import tape
import tiny_janus
import torch
from tiny_janus import PROMPTS

import accel
from accel.core.rounds import CudaGraphs, Rounds, why
from accel.errors import AccelWarning, NumericsError
from accel.methods.speculation import SpeculativeDecodingConfig, decoder, verify
from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive import model as model_module
from accel.pipelines.autoregressive.janus import Janus
from accel.pipelines.autoregressive.kept import Kept, compiled

Config = SpeculativeDecodingConfig
CONFIGS = {
    "plain": None,
    "noise": Config(window=4, auto_disable=False),
    "maximal": Config(window=4, auto_disable=False, drafting="maximal"),
    "gumbel": Config(window=4, auto_disable=False, drafting="gumbel", verification="ratio"),
    "grouped": Config(window=4, auto_disable=False, group_size=8),
}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Several numbers of places to look at, although the image is small."""
    monkeypatch.setattr(model_module, "_STEP", 16)


def kept(way: str) -> Kept:
    """How rounds run: recorded on a tape; as they are, with compiled layers; in CUDA graphs."""
    if way == "captured":
        return Kept()
    capture, compiler = (
        (lambda body: body, compiled) if way == "compiled" else (tape.capture, lambda function: function)
    )
    return Kept(lambda device, failed: capture, compiler, devices=("cpu",))


def pipeline(device: str = "cpu", **options) -> AutoregressivePipeline:
    options = {"grid": 5, "context": 64, **options}
    janus = Janus(tiny_janus.model(**options).requires_grad_(False), tiny_janus.tokenizer())
    pipe = AutoregressivePipeline(janus, graphs=False).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe, prompts=PROMPTS, seeds=(1, 2, 3, 4), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(prompts)]]
    options = {"temperature": 1.0, "top_k": 20, **options}
    return pipe(list(prompts), generator=generators, output_type="tokens", **options).images


WAYS = [
    "taped",
    pytest.param("compiled", marks=pytest.mark.slow),
    pytest.param("captured", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_rounds_draw_what_eager_ones_draw(way, name, monkeypatch):
    """Greedy and sampled, other prompts, seeds and guidance on the same captured rounds, ragged, over the end."""
    # Read late by both: where noise and uniform numbers come from one generator, it decides on their order.
    monkeypatch.setattr(decoder, "_late", lambda model: True)
    # On the CPU numpy sorts, which a tape of torch's operators does not see.
    monkeypatch.setattr(verify, "ranked", lambda p_BWV: p_BWV.sort(dim=-1, stable=True))
    pipe = pipeline("cuda" if way == "captured" else "cpu")
    calls = (
        {"temperature": 0},
        {},
        {"prompts": PROMPTS[::-1], "seeds": (9, 8, 8, 6), "guidance_scale": 5.0},
    )

    def all_of_them():
        if CONFIGS[name] is None:
            return [tokens(pipe, **call) for call in calls]
        with accel.accelerate(pipe, CONFIGS[name]):
            return [tokens(pipe, **call) for call in calls]

    expected = all_of_them()
    assert not torch.equal(expected[1], expected[2])
    pipe.graphs, pipe._kept = True, kept(way)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelWarning)  # a capture that failed would be one
        got = all_of_them()
    for eager, captured in zip(expected, got, strict=True):
        assert torch.equal(eager, captured)


def models(pipe) -> list:
    return list(pipe._kept._models.values())


def replays(pipe) -> int:
    return sum(replay is not None for model in models(pipe) for replay in model.rounds._replays.values())


def test_rounds_are_captured_once_and_kept(monkeypatch):
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    tokens(pipe)
    (model,), captured = models(pipe), replays(pipe)
    assert captured == 3, "looking at 16, 32 and 48 places"
    tokens(pipe)
    assert replays(pipe) == 4, "and the prompt"
    recorded = []
    monkeypatch.setattr(tape, "_Tape", lambda: recorded.append(1))
    tokens(pipe, seeds=(5, 6, 7, 8))
    assert models(pipe) == [model]
    monkeypatch.undo()
    assert recorded == []
    tokens(pipe, PROMPTS[:1])  # another batch size; on a CPU there is no room beside the last used
    assert len(models(pipe)) == 1
    assert models(pipe) != [model]


def test_a_round_that_python_decides_would_be_seen():
    """The negative control: a number that Python counts stays what it was while the round was recorded."""
    counter, total = [0], torch.zeros(())

    def body():
        counter[0] += 1
        total.add_(counter[0])

    replay = tape.capture(body)
    assert total == 0, "a recording changes nothing"
    body()
    replay()
    assert total == 2 + 1


@pytest.mark.parametrize("change", ["replaced", "hook", "to", "in place"])
def test_what_was_captured_goes_with_the_weights(change):
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    before = tokens(pipe)
    head = pipe.model.model.generation_head.vision_head.weight
    layer = pipe.adapter.backbone.layers[0].mlp
    if change == "hook":
        layer.register_forward_hook(lambda module, args, out: out * 0.5)
    elif change == "replaced":
        head.data = head.data.flip(0).clone()
    elif change == "in place":
        head.data.copy_(head.data.flip(0).clone())
    else:
        pipe.to(torch.float64)
    changed = tokens(pipe)
    pipe.graphs = False
    assert torch.equal(tokens(pipe), changed)
    if change != "to":
        assert not torch.equal(before, changed)


def test_rounds_go_when_the_decoder_is_removed():
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    tokens(pipe)
    tokens(pipe)  # the prompts, too
    plain = replays(pipe)
    with accel.accelerate(pipe, CONFIGS["noise"]):
        tokens(pipe)
        assert replays(pipe) > plain
    assert replays(pipe) == plain
    pipe.release()
    assert models(pipe) == []


@pytest.mark.parametrize("name", ["plain", "noise"])
def test_of_the_samplings_the_last_two_stay(name):
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    if CONFIGS[name] is not None:
        accel.accelerate(pipe, CONFIGS[name])
    of, kept_of = [], []
    for temperature in (1.0, 0.9, 0.8, 0.9):
        tokens(pipe, temperature=temperature)
        rounds = models(pipe)[0].rounds
        of.append({key[1].temperature for key in rounds._replays if key[0] != "prefill"})
        kept_of.append(len(rounds._kept))
    assert of == [{1.0}, {1.0, 0.9}, {0.9, 0.8}, {0.8, 0.9}]
    assert kept_of[1] == kept_of[2] == kept_of[3]


def test_widths_that_lost_are_forgotten():
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    accel.accelerate(pipe, Config(auto_disable=False))
    tokens(pipe)
    rounds = models(pipe)[0].rounds
    widths = {key[2] for key in (*rounds._kept, *rounds._replays) if key[0] is pipe.decoder}
    assert len(widths) == 1
    timed = pipe.decoder._timed
    assert len(next(iter(timed.values()))) > 2, "more than one width was timed"
    pipe.graphs = False
    tokens(pipe)
    tokens(pipe, guidance_scale=1.0)
    assert len(timed) == 3, "eager rounds, and those without guidance, take another time"


def test_a_capture_that_fails_is_told_once_and_decoding_goes_on():
    pipe = pipeline()
    expected = tokens(pipe)

    def refuses(device, failed):
        def capture(body):
            failed("RuntimeError: no")

        return capture

    pipe.graphs, pipe._kept = True, Kept(refuses, lambda function: function, devices=("cpu",))
    with pytest.warns(
        AccelWarning, match=r"without CUDA graphs.*: RuntimeError: no\. graphs=False"
    ) as warned:
        got = [tokens(pipe), tokens(pipe)]
    assert len(warned) == 1
    assert all(torch.equal(one, expected) for one in got)


@pytest.mark.parametrize("way", WAYS)
def test_prompts_of_other_lengths_are_captured_in_few(way):
    """Padded to 16, 32, 64 ... places, and beyond what is captured as they are: the tokens of prompts as they are."""
    pipe = pipeline("cuda" if way == "captured" else "cpu", context=128)
    short, long = list(PROMPTS), [prompt + " and a star" * 8 for prompt in PROMPTS]
    longest = [prompt + " and a star" * 20 for prompt in PROMPTS]
    calls = (
        long,
        short,
        [short[1]] * 4,
        long,
        [short[0], long[1], short[2], short[3]],
        short,
        longest,
        longest,
    )
    expected = [tokens(pipe, prompts, temperature=0) for prompts in calls]
    assert len({str(one) for one in expected}) > 3
    pipe.graphs, pipe._kept = True, kept(way)
    for prompts, wanted in zip(calls[:6], expected, strict=False):
        assert torch.equal(tokens(pipe, prompts, temperature=0), wanted)
    (model,) = models(pipe)
    lengths = {
        key[1]: replay is not None for key, replay in model.rounds._replays.items() if key[0] == "prefill"
    }
    assert lengths == {16: True, 64: True, 32: False}, "captured where one came again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "_PROMPT_TOKENS", 8 * 64)
        for wanted in expected[6:]:
            assert torch.equal(tokens(pipe, longest, temperature=0), wanted)
        (model,) = models(pipe)
        assert not any(key[0] == "prefill" for key in model.rounds._replays)


def test_in_bfloat16_captured_rounds_differ_by_their_shapes_alone(monkeypatch):
    """Prompts that are padded, and more places looked at, round otherwise: near, not equal. With eager shapes, equal."""
    pipe = pipeline().to(torch.bfloat16)
    expected = tokens(pipe)
    layout, logits = pipe.adapter.layout(None, None), []
    for rounds in (Rounds(), Rounds(tape.capture)):
        logits.append(model_module.PromptedModel(pipe.adapter, layout, PROMPTS, 2.0, rounds=rounds).first_BV)
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()
    pipe.graphs, pipe._kept = True, kept("taped")
    monkeypatch.setattr(model_module, "_PROMPT_TOKENS", 0)
    monkeypatch.setattr(model_module, "_BUCKETS", 1000)
    assert torch.equal(tokens(pipe), expected)
    assert replays(pipe)
    assert torch.equal(tokens(pipe), expected)


def test_what_stands_behind_a_prompt_would_be_seen(monkeypatch):
    """The negative control: rows that begin their image behind the padding give other tokens."""
    pipe = pipeline(context=128)
    expected = tokens(pipe, temperature=0)
    pipe.graphs, pipe._kept = True, kept("taped")
    once = model_module.PromptedModel._prompt

    def behind(self, embedding_RPD):
        self.start_R.fill_(embedding_RPD.shape[1])
        return once(self, embedding_RPD)

    monkeypatch.setattr(model_module.PromptedModel, "_prompt", behind)
    assert not torch.equal(tokens(pipe, temperature=0), expected)


@pytest.mark.parametrize("name", ["plain", "noise"])
def test_calls_in_and_out_of_inference_mode_share_what_is_kept(name):
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    if CONFIGS[name] is not None:
        accel.accelerate(pipe, CONFIGS[name])
    with torch.inference_mode():
        first = tokens(pipe)
    (model,) = models(pipe)
    assert not first.is_inference()
    assert torch.equal(tokens(pipe), first)
    with torch.inference_mode():
        assert torch.equal(tokens(pipe), first)
    assert models(pipe) == [model], "made once"


@pytest.mark.parametrize("graphs", [True, False])
def test_a_model_made_in_inference_mode_draws_out_of_it(graphs):
    expected = tokens(pipeline())
    with torch.inference_mode():
        pipe = pipeline()
    assert next(pipe.model.parameters()).is_inference()
    pipe.graphs, pipe._kept = graphs, kept("taped")
    assert torch.equal(tokens(pipe), expected)
    assert torch.equal(tokens(pipe), expected)


def test_a_recorder_that_breaks_off_is_told_with_what_is_free(monkeypatch):
    """And counts nothing as held. That torch is put back onto its stream is the recorder's own (`graphs.Cuda`)."""

    class Breaks:
        device = torch.device("cpu")

        def record(self, body):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 2**30))
    said = []
    capture = CudaGraphs(Breaks(), said.append)
    assert capture(lambda: None) is None
    assert said == ["out of memory: it asked for 2.00 GiB, 3 MiB are free. A smaller batch leaves room"]
    assert capture.nbytes == 0


@pytest.mark.gpu
def test_a_round_that_waits_leaves_torch_on_its_stream():
    pipe, stream, waits = pipeline("cuda"), torch.cuda.current_stream(), [True]
    expected = tokens(pipe)

    class Waits(type(pipe.adapter)):
        def logits(self, hidden_RWD):
            if waits[0] and torch.cuda.is_current_stream_capturing():
                hidden_RWD.sum().item()
            return super().logits(hidden_RWD)

    pipe.adapter.__class__ = Waits
    pipe.graphs = True
    with pytest.warns(AccelWarning, match="could not be captured"):
        assert torch.equal(tokens(pipe), expected)
    assert torch.cuda.current_stream() == stream
    waits[0] = False
    assert torch.rand(2, device="cuda").isfinite().all(), "its random numbers are not the recording's"
    assert torch.equal(tokens(pipe, PROMPTS[:1]), expected[:1]), "another batch size is captured all the same"
    assert replays(pipe) > 0


def test_a_capture_that_fails_is_tried_again_for_another_batch():
    pipe, asked = pipeline(), []

    def refuses_large_ones(device, failed):
        def capture(body):
            asked.append(body)
            return failed("out of memory") if len(asked) == 1 else tape.capture(body)

        return capture

    pipe.graphs, pipe._kept = True, Kept(refuses_large_ones, lambda function: function, devices=("cpu",))
    with pytest.warns(AccelWarning, match="out of memory"):
        tokens(pipe)
    tokens(pipe, PROMPTS[:1])
    assert replays(pipe) > 0
    before = len(asked)
    tokens(pipe)
    assert len(asked) == before


@pytest.mark.parametrize("way", ["strength", "hook", "new"])
def test_what_else_a_round_calls_is_looked_at_too(way):
    """Python decides in the head, or at its calls; and a head that was put there without new parameters."""

    class Scaled(torch.nn.Linear):
        strength = 1.0

        def forward(self, x):
            return self.strength * super().forward(x)

    pipe = pipeline()
    head = pipe.model.model.generation_head
    old = head.vision_head
    new = Scaled(old.in_features, old.out_features, bias=old.bias is not None).requires_grad_(False)
    new.weight, new.bias = old.weight, old.bias
    if way == "strength":
        head.vision_head = new
    pipe.graphs, pipe._kept = True, kept("taped")
    before = tokens(pipe, temperature=0.5)
    if way == "strength":
        new.strength = -1.0
    elif way == "hook":
        old.register_forward_hook(lambda module, args, out: -out)
    else:
        new.strength, head.vision_head = -1.0, new
    got = tokens(pipe, temperature=0.5)
    pipe.graphs = False
    assert torch.equal(got, tokens(pipe, temperature=0.5))
    assert not torch.equal(got, before)


@pytest.mark.parametrize("name", ["plain", "noise", "maximal"])
def test_nan_stops_the_image_in_the_round_after(name):
    """With its position, and long before the image's end."""
    pipe = pipeline()
    pipe.graphs, pipe._kept = True, kept("taped")
    if CONFIGS[name] is not None:
        accel.accelerate(pipe, CONFIGS[name])
    tokens(pipe)
    with torch.no_grad():
        pipe.model.model.generation_embeddings.weight.fill_(torch.nan)  # in place: what was captured stays
    seen = []
    with pytest.raises(NumericsError, match=r"4 of 4 images, first in image 0 at slot 1 \(row 0, column 1\)"):
        pipe(
            list(PROMPTS),
            output_type="tokens",
            callback_on_step_end=lambda p, slots, n, k: seen.append(slots),
        )
    assert max(seen) < (5 if name == "plain" else 13), "three windows"
    assert models(pipe) == [], "its cache holds NaN"


def test_merged_weights_are_the_models_own(tmp_path):
    """Views of one matrix under the old names: saved, loaded and moved as before."""
    pipe = pipeline()
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    pipe.graphs, pipe._kept = True, kept("taped")
    expected = tokens(pipe)
    attention = pipe.adapter.backbone.layers[0].self_attn
    assert (
        attention.q_proj.weight.untyped_storage().data_ptr()
        == attention.v_proj.weight.untyped_storage().data_ptr()
    )
    assert all(torch.equal(before[name], value) for name, value in pipe.model.state_dict().items())
    pipe.model.save_pretrained(tmp_path)
    again = type(pipe.model).from_pretrained(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())
    assert pipe._kept.look(pipe.adapter, True)
    assert torch.equal(tokens(pipe), expected)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 79 GiB"
            ),
            "out of memory: it asked for 2.50 GiB, 300 MiB are free. A smaller batch leaves room",
        ),
        (
            RuntimeError("operation not permitted\nwhen stream is capturing"),
            "RuntimeError: operation not permitted when",
        ),
    ],
)
def test_why_a_round_was_not_captured(error, said):
    assert why(error, 300 * 2**20).startswith(said)


def test_a_longer_prompt_takes_more_memory_and_a_shorter_one_what_is_there():
    pipe = pipeline(grid=4)
    calls = [[PROMPTS[1]], [PROMPTS[2] + " and a star" * 3], [PROMPTS[1]]]
    expected = [tokens(pipe, prompts) for prompts in calls]
    pipe.graphs, pipe._kept = True, kept("taped")
    places = []
    for prompts, wanted in zip(calls, expected, strict=True):
        assert torch.equal(tokens(pipe, prompts), wanted)
        places.append(models(pipe)[0].places)
    assert places[0] < places[1] == places[2]


def test_layers_that_something_replaced_are_called_as_they_are():
    """An adapter's linear layer, and one with a bias: not `Stack`'s, and only the bias is sure to stay what it is."""

    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 1.5 * super().forward(x)

    pipe = pipeline()
    before = tokens(pipe)
    for change in ("class", "bias"):
        attention = pipe.adapter.backbone.layers[1].self_attn
        old = attention.q_proj
        new = (Louder if change == "class" else torch.nn.Linear)(32, 32, bias=change == "bias")
        new.weight.data.copy_(old.weight)
        if change == "bias":
            torch.nn.init.constant_(new.bias, 0.7)
        attention.q_proj = new.requires_grad_(False)
        assert pipe.adapter.stack() is None
        pipe.graphs = False
        expected = tokens(pipe)
        assert not torch.equal(expected, before)
        pipe.graphs, pipe._kept = True, kept("taped")
        assert torch.equal(tokens(pipe), expected)
        assert (replays(pipe) > 0) == (change == "bias")
        attention.q_proj = old
    assert pipe.adapter.stack() is not None
