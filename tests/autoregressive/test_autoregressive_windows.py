"""What decoders stand on: windows equal single tokens, also after going back; no waiting; linear memory; graphs."""

from __future__ import annotations

import pytest
import tiny_janus
import torch
from tiny_janus import PROMPTS
from torch.utils._python_dispatch import TorchDispatchMode

from accel.core.decoding import Sampling, decode
from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive import model as model_module
from accel.pipelines.autoregressive.cache import PlacedCache
from accel.pipelines.autoregressive.janus import Janus
from accel.pipelines.autoregressive.model import PromptedModel, forward_once

SLOTS, CODES = 16, 64


@pytest.fixture(scope="module")
def janus():
    return Janus(tiny_janus.model().requires_grad_(False), tiny_janus.tokenizer())


def prompted(janus, guidance=3.0, prompts=PROMPTS, **options) -> PromptedModel:
    with torch.no_grad():
        return PromptedModel(janus, janus.layout(None, None), prompts, guidance, **options)


@pytest.fixture(scope="module")
def token_BN():
    return torch.randint(CODES, (len(PROMPTS), SLOTS), generator=torch.Generator().manual_seed(0))


def without_cache(janus, prompt: str, token_N: torch.Tensor, guidance: float) -> torch.Tensor:
    """(N, V) logits for slots 0 ... N - 1 from one full causal pass with nothing of ours but the prompt."""
    model, tokenizer = janus.model, janus.tokenizer
    ids = torch.tensor(tokenizer([f"{prompt}{tokenizer.boi_token}"])["input_ids"])
    empty = torch.full_like(ids, tokenizer.pad_token_id)
    empty[:, 0], empty[:, -1] = ids[0, 0], ids[0, -1]
    image = model.prepare_embeddings_for_image_generation(token_N[None, :-1])
    logits = []
    for prompt_ids in (ids, empty):
        embedded = torch.cat([model.get_input_embeddings()(prompt_ids), image], 1)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits.append(model.model.generation_head(hidden)[0, ids.shape[1] - 1 :])
    conditional, unconditional = logits
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def one_by_one(model, token_BN):
    """(B, N, V): logits for every slot, each from a forward of one token."""
    at_B = torch.zeros(model.images, dtype=torch.int64)
    logits = [
        model.forward(token_BN[:, slot : slot + 1], at_B + slot)[:, 0]
        for slot in range(token_BN.shape[1] - 1)
    ]
    return torch.stack([model.first_BV, *logits], 1)


@torch.no_grad()
def test_one_by_one_equals_a_full_pass(janus, token_BN):
    got = one_by_one(prompted(janus), token_BN)
    for image, prompt in enumerate(PROMPTS):
        expected = without_cache(janus, prompt, token_BN[image], 3.0)
        torch.testing.assert_close(got[image], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ragged_windows_with_rollbacks(janus, token_BN, guidance, grow):
    """Each image goes on at its own pace: windows of right tokens followed by wrong ones that are taken back."""
    expected = one_by_one(prompted(janus, guidance), token_BN)
    model = prompted(janus, guidance, grow=grow)
    right = torch.tensor([[1, 5, 3, 2], [4, 1, 1, 5], [2, 2, 5, 1], [5, 3, 1, 1]])  # tokens right, per round
    at_B = torch.zeros(len(PROMPTS), dtype=torch.int64)
    padded = torch.cat([token_BN, token_BN.new_zeros(len(PROMPTS), 8)], 1)
    went_back = over_the_end = False
    for turn in range(8):
        right_B = right[:, turn % 4]
        true_BW = padded.gather(1, at_B[:, None] + torch.arange(5))
        wrong_BW = torch.arange(5) >= right_B[:, None]
        logits = model.forward(torch.where(wrong_BW, (true_BW + 1) % CODES, true_BW), at_B)
        for image, (at, count) in enumerate(zip(at_B.tolist(), right_B.tolist(), strict=True)):
            count = min(count, SLOTS - 1 - at)
            if count > 0:
                want = expected[image, at + 1 : at + 1 + count]
                torch.testing.assert_close(logits[image, :count], want, atol=1e-4, rtol=1e-4)
        went_back |= bool((right_B < 5).any())
        over_the_end |= bool((at_B + 5 > SLOTS).any())
        at_B = (at_B + right_B).clamp(max=SLOTS - 1)
    assert went_back
    assert over_the_end
    assert at_B.tolist() == [SLOTS - 1] * len(PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("told", [0, -8])
def test_a_decoder_that_knows_how_far_the_images_are_need_not_look_behind(janus, token_BN, monkeypatch, told):
    """Windows of 4 that move on by one token: twice as much is fed as is looked at. With a lie it shows."""
    monkeypatch.setattr(model_module, "_STEP", 4)
    expected, looked = one_by_one(prompted(janus), token_BN), []

    def forward(model, token_BW, at_B, seen):
        looked.append(seen)
        return forward_once(model, token_BW, at_B, seen)

    model = prompted(janus, grow=True, forward=forward)
    longest, wrong = int(model.start_R.max()), 0.0
    for at in range(SLOTS - 4):
        model.at_most = at + told
        logits = model.forward(token_BN[:, at : at + 4], torch.full((len(PROMPTS),), at))
        wrong = max(wrong, float((logits - expected[:, at + 1 : at + 5]).abs().max()))
    if told:
        assert not wrong < 1e-2  # NaN or far off
    else:
        assert wrong < 1e-4
        assert all(seen < longest + at + 4 + 4 for at, seen in enumerate(looked))


@torch.no_grad()
def test_a_mask_that_sees_rejected_tokens_fails(janus, token_BN, monkeypatch):
    """The negative control: everything written counts, also what lies after the query."""
    expected = one_by_one(prompted(janus), token_BN)
    own = PlacedCache.aim

    def sees_all_written(self, place_RW, seen):
        mask = own(self, place_RW, seen)
        return mask | (torch.arange(seen) <= place_RW.amax(1)[:, None, None])[:, None]

    monkeypatch.setattr(PlacedCache, "aim", sees_all_written)
    model = prompted(janus)
    logits = model.forward(token_BN[:, :5], torch.zeros(len(PROMPTS), dtype=torch.int64))
    assert (logits[:, 0] - expected[:, 1]).abs().max() > 1e-2


class Waits(TorchDispatchMode):
    """Collects the operators that read a tensor's value or make a shape of it."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in self.names:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_waits_for_the_device(janus, token_BN, monkeypatch):
    model = prompted(janus)
    generators = [torch.Generator().manual_seed(seed) for seed in range(model.images)]
    with Waits() as waits:
        for name in ("tolist", "numpy", "cpu"):  # not operators, on the CPU
            monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: waits.found.append(name) or [])
        model.forward(token_BN[:, :5], torch.tensor([0, 1, 2, 3]))
        decode(model, Sampling(top_k=20, top_p=0.9), generators)
        assert waits.found == []
        assert int(token_BN[0, 0]) >= 0
        model.check()
    assert waits.found == ["aten::_local_scalar_dense", "tolist"]


def test_memory_is_linear_in_tokens():
    """Keys and values are what they must be, and one forward of a 4x longer image does not hold 16x as much."""
    sizes = []
    for grid in (8, 16, 32):
        model = tiny_janus.model(grid=grid, context=grid**2 + 32, layers=1).requires_grad_(False)
        one = prompted(Janus(model, tiny_janus.tokenizer()), prompts=PROMPTS[:1])
        config = model.config.text_config
        numbers = 2 * 2 * one.places * config.num_key_value_heads * config.head_dim  # keys, values; two rows
        assert one.key_values.nbytes == 4 * numbers
        assert 0 <= one.places - grid**2 - max(one.start_R.tolist()) - 1 < 64
        largest = Largest()
        with torch.no_grad(), largest:
            one.forward(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([grid**2 - 2]))
        sizes.append(largest.numbers)
    assert sizes[2] <= 4.5 * sizes[1]


class Largest(TorchDispatchMode):
    """The largest tensor that comes out of an operator."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@torch.no_grad()
def test_a_thousand_tokens():
    model = tiny_janus.model(grid=32, context=1088, layers=1).requires_grad_(False)
    pipe = AutoregressivePipeline(Janus(model, tiny_janus.tokenizer()))
    pipe.set_progress_bar_config(disable=True)
    got = pipe("two", guidance_scale=1.0, temperature=0, output_type="tokens").images
    assert got.shape == (1, 1024)
    expected = without_cache(pipe.adapter, "two", got[0], 1.0).argmax(-1)
    assert (got[0] == expected).float().mean() > 0.99  # ties within rounding


@torch.no_grad()
def test_compiled_equals_eager(janus, token_BN):
    """One graph, no breaks; the same graph takes other prompts and another guidance."""
    torch.compiler.reset()
    compiled = torch.compile(forward_once, fullgraph=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for guidance, prompts in ((3.0, PROMPTS), (5.0, PROMPTS[::-1])):
        eager = prompted(janus, guidance, prompts)
        traced = prompted(janus, guidance, prompts, forward=compiled)
        for at in (0, 3, 2):
            at_B = torch.tensor([at, at + 1, at, at + 2]) if at else torch.zeros(4, dtype=torch.int64)
            window = token_BN[:, at : at + 4]
            torch.testing.assert_close(
                traced.forward(window, at_B), eager.forward(window, at_B), atol=1e-5, rtol=1e-5
            )
        traced.check()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_pipeline_draws_the_same(tmp_path):
    folder = tiny_janus.save(tmp_path, tiny_janus.model())
    results = []
    for compiled in (False, True):
        pipe = AutoregressivePipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.compile()
        results.append(pipe(list(PROMPTS), temperature=0, output_type="tokens").images)
    assert torch.equal(*results)


@pytest.mark.gpu
@torch.no_grad()
def test_forward_can_be_captured_in_a_cuda_graph(token_BN):
    janus = Janus(tiny_janus.model().requires_grad_(False).to("cuda"), tiny_janus.tokenizer())
    token_BN = token_BN.to("cuda")
    expected = one_by_one(prompted(janus), token_BN)
    model = prompted(janus)
    token_BW, at_B = token_BN[:, :4].clone(), torch.zeros(4, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model.forward(token_BW, at_B)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.forward(token_BW, at_B)
    for at in (0, 4, 8):
        token_BW.copy_(token_BN[:, at : at + 4])
        at_B.fill_(at)
        graph.replay()
        torch.testing.assert_close(logits, expected[:, at + 1 : at + 5], atol=1e-3, rtol=1e-3)
