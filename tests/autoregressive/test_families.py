"""What every family owes its decoders: windows that change nothing, one compiled graph, codes to compare."""

from __future__ import annotations

import pytest
import tiny_emu3
import tiny_glm_image
import tiny_llamagen
import torch

import accel
from accel.methods.speculation import SpeculativeDecodingConfig
from accel.pipelines.autoregressive import AutoregressivePipeline

#: name -> (how a checkpoint is written, options of from_pretrained, prompts, arguments of a call)
FAMILIES = {
    "emu3": (
        tiny_emu3.save,
        {},
        list(tiny_emu3.PROMPTS),
        {"height": 6, "width": 10, "guidance_scale": 3.0},
    ),
    "glm-image": (
        tiny_glm_image.save,
        {"subfolder": "vision_language_encoder"},
        list(tiny_glm_image.PROMPTS),
        {"height": 64, "width": 96},
    ),
    "llamagen-classes": (tiny_llamagen.save, {}, [1, 2, 3], {}),
    "llamagen-captions": (
        lambda folder: tiny_llamagen.save(folder, text=True),
        {},
        list(tiny_llamagen.PROMPTS),
        {},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    save, options, prompts, call = FAMILIES[request.param]
    pipe = AutoregressivePipeline.from_pretrained(str(save(tmp_path)), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts, {**call, "temperature": 0.0, "output_type": "tokens"}


def test_speculative_decoding_changes_no_greedy_token(family):
    pipe, prompts, call = family
    plain = pipe(prompts, **call).images
    with accel.accelerate(pipe, SpeculativeDecodingConfig(window=4, auto_disable=False)) as handle:
        assert torch.equal(pipe(prompts, **call).images, plain)
    assert (handle.stats.window, handle.stats.plain_runs) == (4, 0)
    assert handle.stats.tokens_per_forward > 1, (
        "no draft was ever right: rolling back was all that was tested"
    )


@pytest.mark.slow
def test_one_graph(family):
    """Traced without a break, and the same tokens; the backend is not what is tested."""
    pipe, prompts, call = family
    plain = pipe(prompts, **call).images
    pipe.compile(backend="eager")
    assert torch.equal(pipe(prompts, **call).images, plain)


def test_bfloat16_and_codes(family):
    pipe, prompts, call = family
    pipe.to(torch.bfloat16)
    tokens = pipe(prompts, **call).images
    assert tokens.min() >= 0
    assert tokens.max() < pipe.adapter.vocabulary
    codes = pipe.adapter.codebook_VD
    if codes is not None:
        assert codes.shape[0] == pipe.adapter.vocabulary
        assert pipe.adapter.codebook_VD is codes, "what is derived from it is kept under its identity"
