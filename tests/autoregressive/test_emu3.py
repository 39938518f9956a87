"""Emu3: transformers' own classes on a tiny checkpoint; constrained `generate` is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_emu3
import torch
import windows
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3Processor

from accel.errors import ConfigError, UnsupportedError
from accel.pipelines.autoregressive import AutoregressivePipeline

ROWS, COLUMNS = 3, 5
SIZE = {"height": 2 * ROWS, "width": 2 * COLUMNS}
GREEDY = {**SIZE, "temperature": 0.0, "output_type": "tokens"}


@pytest.fixture(scope="module", params=[False, True], ids=["contiguous", "scattered"])
def folder(request, tmp_path_factory):
    return tiny_emu3.save(tmp_path_factory.mktemp("emu3"), scattered=request.param)


@pytest.fixture
def pipe(folder):
    pipe = AutoregressivePipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def constrained(processor, model):
    """Which tokens may follow, as in transformers' documentation of Emu3."""
    tokens, visual = processor.tokenizer, model.model.vocabulary_mapping.image_tokens
    ends = [tokens.eof_token_id, tokens.eoi_token_id, tokens.eos_token_id]
    eol = tokens.convert_tokens_to_ids(tiny_emu3.EOL)

    def allowed(_, input_ids):
        offset = len(input_ids) - int((input_ids == tokens.image_wrapper_token_id).nonzero()[0])
        beyond = offset - (COLUMNS + 1) * ROWS
        if beyond > 0:
            return [ends[min(beyond, 3) - 1]]
        return [eol] if offset % (COLUMNS + 1) == 0 else visual

    return allowed


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_is_transformers_generate_token_for_token(folder, pipe, guidance):
    model = Emu3ForConditionalGeneration.from_pretrained(folder).eval()
    processor = Emu3Processor.from_pretrained(folder)
    header = {
        "return_for_image_generation": True,
        "ratio": f"{COLUMNS}:{ROWS}",
        "image_area": 64 * ROWS * COLUMNS,
        "return_tensors": "pt",
        "padding": True,
    }
    inputs = processor(text=list(tiny_emu3.PROMPTS), **header)
    inputs.pop("image_sizes")
    pipe.adapter.negative_prompt = "worst quality"
    negative = processor(text=["worst quality"] * len(tiny_emu3.PROMPTS), **header)
    guided = (
        {"negative_prompt_ids": negative["input_ids"], "guidance_scale": guidance} if guidance > 1 else {}
    )
    new = ROWS * (COLUMNS + 1) + 3
    sequences = model.generate(
        **inputs,
        **guided,
        max_new_tokens=new,
        do_sample=False,
        prefix_allowed_tokens_fn=constrained(processor, model),
    )[:, inputs["input_ids"].shape[1] :]
    lines = sequences[:, :-3].unflatten(1, (ROWS, COLUMNS + 1))
    expected = model.model.vocabulary_mapping.convert_bpe2img(lines).flatten(1)

    found = pipe(list(tiny_emu3.PROMPTS), guidance_scale=guidance, **GREEDY).images
    assert found.unique().numel() > 5, "a constant image would say nothing"
    assert torch.equal(found, expected.long())
    one_by_one = [pipe(prompt, guidance_scale=guidance, **GREEDY).images for prompt in tiny_emu3.PROMPTS]
    assert torch.equal(found, torch.cat(one_by_one)), "rows of a batch must not see each other"

    pixels = model.decode_image_tokens(image_tokens=sequences, height=ROWS, width=COLUMNS)
    images = processor.postprocess(list(pixels))["pixel_values"]
    ours = pipe(list(tiny_emu3.PROMPTS), guidance_scale=guidance, **{**GREEDY, "output_type": "pil"}).images
    for image, own in zip(images, ours, strict=True):
        assert own.size == (2 * COLUMNS, 2 * ROWS)
        difference = np.asarray(image, dtype=int) - np.asarray(own, dtype=int)
        assert abs(difference).max() <= 1  # it cuts to 8 bits, we round


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_windows_and_rollbacks(pipe, guidance):
    assert windows.worst_difference(pipe, tiny_emu3.PROMPTS, guidance, **SIZE) < 1e-5


def test_an_end_of_line_changes_what_follows(pipe):
    """The negative control: had it no embedding of its own, the test above would pass all the same."""
    model = windows.prompted(pipe, ["two"], 1.0, **SIZE)
    assert model.forced_N.tolist() == ([-1] * COLUMNS + [tiny_emu3.CODES]) * (ROWS - 1) + [-1] * COLUMNS
    with torch.no_grad():
        end = model.forward(model.forced_N[None, COLUMNS : COLUMNS + 1], torch.tensor([0]))
        code = model.forward(torch.tensor([[0]]), torch.tensor([0]))
    assert (end - code).abs().max() > 0.1


def test_defaults_are_the_authors(pipe):
    defaults = pipe.adapter.defaults()
    assert (defaults.guidance_scale, defaults.top_k) == (3.0, 2048)
    assert pipe.adapter.layout(None, None).rows == 90  # 720 pixels at 8 to a code


def test_bad_input(pipe):
    with pytest.raises(ConfigError, match="multiples of 2 pixels"):
        pipe("two", height=5, width=4)
    with pytest.raises(UnsupportedError, match="Shorten the prompt"):
        pipe("a" * 300, **SIZE)


def test_a_vocabulary_without_image_codes_is_refused(tmp_path):
    folder = tiny_emu3.save(tmp_path)
    config = Emu3Config.from_pretrained(folder)
    config.vocabulary_map.pop("<|visual token 000007|>")
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedError, match="47 of 48 image codes"):
        AutoregressivePipeline.from_pretrained(str(folder))
