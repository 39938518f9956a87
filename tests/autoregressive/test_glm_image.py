"""GLM-Image's token stage: diffusers' own `generate_prior_tokens` on a tiny checkpoint is the oracle."""

from __future__ import annotations

import pytest
import tiny_glm_image
import torch
import transformers
import windows
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

from accel.errors import ConfigError, UnsupportedError, WeightsError
from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive.glm_image import prior_token_ids

SIZE = {"height": 64, "width": 96}
GREEDY = {**SIZE, "temperature": 0.0, "output_type": "tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_glm_image.save(tmp_path_factory.mktemp("glm"))


@pytest.fixture
def pipe(folder):
    pipe = AutoregressivePipeline.from_pretrained(str(folder), subfolder="vision_language_encoder")
    pipe.set_progress_bar_config(disable=True)
    return pipe


NOTHING = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer", "scheduler"))


def oracle_of(folder) -> GlmImagePipeline:
    """diffusers' pipeline with only what makes tokens."""
    model = GlmImageForConditionalGeneration.from_pretrained(folder / "vision_language_encoder").eval()
    # It always samples, and from all that the head gives: among one token it is greedy, and codes are all it gets.
    model.generation_config.top_k = 1
    model.generation_config.suppress_tokens = list(range(tiny_glm_image.CODES, len(tiny_glm_image.VISION)))
    processor = GlmImageProcessor.from_pretrained(folder / "processor")
    return GlmImagePipeline(**NOTHING, vision_language_encoder=model, processor=processor)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0's own processor takes one prompt only",
)
def test_prior_tokens_are_those_of_diffusers_own_pipeline(folder, pipe):
    prompts = list(tiny_glm_image.PROMPTS)
    expected, *_ = oracle_of(folder).generate_prior_tokens(prompts, **SIZE, device=torch.device("cpu"))
    tokens = pipe(prompts, **GREEDY).images
    assert tokens.shape == (3, 6)
    assert tokens.unique().numel() > 3, "a constant image would say nothing"
    assert torch.equal(prior_token_ids(tokens, **SIZE), expected)


def test_all_slots_are_transformers_generate_token_for_token(folder, pipe):
    """Preview grid included, on a tall image; alone, what the batch above gave its rows is not needed."""
    oracle, prompt, size = oracle_of(folder), tiny_glm_image.PROMPTS[2], {"height": 128, "width": 64}
    message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    inputs = oracle.processor.apply_chat_template(
        [message], tokenize=True, target_h=128, target_w=64, return_dict=True, return_tensors="pt"
    )
    model = windows.prompted(pipe, [prompt], 1.0, **size)
    assert model.start_R.tolist() == [inputs["input_ids"].shape[1]]
    slots = len(model.forced_N)
    expected = oracle.vision_language_encoder.generate(**inputs, max_new_tokens=slots, do_sample=True)
    expected = expected[:, inputs["input_ids"].shape[1] :]
    assert expected.shape == (1, slots) == (1, 22 * 11 + 4 * 2)
    with torch.no_grad():  # one window over the whole image
        logits_BNV = model.forward(expected, torch.zeros(1, dtype=torch.int64))
    found = torch.cat([model.first_BV[:, None], logits_BNV[:, :-1]], 1).argmax(-1)
    assert torch.equal(found, expected)


def test_windows_and_rollbacks(pipe):
    assert windows.worst_difference(pipe, tiny_glm_image.PROMPTS, 1.0, **SIZE) < 1e-5


def test_positions_restart_with_every_grid(pipe):
    """The negative control: positions that count on, as text has them, give other logits."""
    layout = pipe.adapter.layout(64, 96)
    start, preview = torch.tensor([7]), 13 * 19
    place = torch.tensor([[6, 7, 7 + 20, 7 + preview, 7 + preview + 4, 7 + preview + 6]])
    found = pipe.adapter.positions(place, start, layout)[:, 0].T.tolist()
    large = 7 + 19
    assert found[:3] == [[6, 6, 6], [7, 7, 7], [7, 8, 8]]
    assert found[3:5] == [[large] * 3, [large, large + 1, large + 1]]
    model = windows.prompted(pipe, ["two"], 1.0, **SIZE)
    model.adapter.positions = lambda place_RW, *_: place_RW
    counted = windows.prompted(pipe, ["two"], 1.0, **SIZE)
    token, at = torch.tensor([[3, 5, 7]]), torch.tensor([0])
    with torch.no_grad():
        wrong = counted.forward(token, at)
        del model.adapter.positions
        assert (model.forward(token, at) - wrong).abs().max() > 0.01


def test_the_diffusion_stage_takes_them(pipe):
    stage = GlmImagePipeline(
        tokenizer=None,
        text_encoder=None,
        processor=None,
        vision_language_encoder=None,  # as in the module's example
        transformer=GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=8,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=tiny_glm_image.CODES,
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    stage.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, 3, 8)
    call = {
        "prompt_embeds": embeds,
        "guidance_scale": 1.0,
        "num_inference_steps": 1,
        "output_type": "np",
        **SIZE,
    }
    tokens = pipe("two", **GREEDY).images
    prior = prior_token_ids(tokens, **SIZE)
    first = stage(prior_token_ids=prior, generator=torch.Generator().manual_seed(0), **call).images
    assert first.shape == (1, 64, 96, 3)
    other = prior_token_ids((tokens + 1) % tiny_glm_image.CODES, **SIZE)
    assert (
        abs(
            stage(prior_token_ids=other, generator=torch.Generator().manual_seed(0), **call).images - first
        ).max()
        > 0
    )


def test_bad_input(folder, pipe):
    with pytest.raises(WeightsError, match="subfolder='vision_language_encoder'"):
        AutoregressivePipeline.from_pretrained(str(folder))
    with pytest.raises(ConfigError, match="multiples of 32 pixels"):
        pipe("two", height=64, width=100, output_type="tokens")
    with pytest.raises(ConfigError, match="too long and thin"):
        pipe("two", height=32, width=32 * 300, output_type="tokens")
    with pytest.raises(UnsupportedError, match="without guidance"):
        pipe("two", guidance_scale=2.0, **GREEDY)
    with pytest.raises(UnsupportedError, match="output_type='tokens'"):
        pipe("two", **SIZE, callback_on_step_end=lambda *_: pytest.fail("told only after the work"))
    with pytest.raises(UnsupportedError, match="Shorten the prompt"):
        pipe("a" * 300, **GREEDY)
    with pytest.raises(ConfigError, match="2 x 3 tokens, got 8"):
        prior_token_ids(torch.zeros(1, 8, dtype=torch.int64), **SIZE)
