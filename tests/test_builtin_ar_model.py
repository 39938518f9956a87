"""The built-in autoregressive model loads as transformers' own, reads every word of Scenes, and draws what it is
asked for. Few images, so the bounds are wide; the measured scores are in the model card."""

import shutil

import numpy as np
import pytest
import torch

from accel import errors
from accel.evaluation import scenes
from accel.evaluation.geneval.scorer import score
from accel.evaluation.scenes.world import words
from accel.pipelines import builtin
from accel.pipelines.builtin.scenes_janus import ScenesJanusPipeline

FOLDER = builtin.AUTOREGRESSIVE_FOLDER


@pytest.fixture(scope="module")
def pipe():
    pipe = builtin.load_autoregressive("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def right(images, lines) -> list[bool]:
    return [score(found, line).correct for found, line in zip(scenes.detect(images), lines, strict=True)]


def test_images_show_their_prompts(pipe):
    lines = scenes.prompts("test", per_task=3, seed=4)
    seeds = [torch.Generator().manual_seed(100 + index) for index in range(len(lines))]
    images = pipe([line.prompt for line in lines], generator=seeds, output_type="pt").images
    hits, misses = right(images, lines), right(images, lines[3:] + lines[:3])
    assert sum(hits) >= 6, hits
    assert sum(misses) <= 2, misses  # the control: another task's prompts


def test_the_tokenizer_keeps_what_captions_ask_for(pipe):
    """Encoded and decoded renders still show their captions; with its codes mixed up nothing does."""
    lines = scenes.prompts("train", per_task=2, seed=1)
    images = scenes.render(scenes.sample_scenes(lines, np.random.default_rng(1)), 128)
    vq = pipe.model.model.vqmodel
    with torch.no_grad():
        tokens = vq.encode(images * 2 - 1).image_tokens.view(len(lines), -1)
        drawn = (vq.decode(tokens) / 2 + 0.5).clamp(0, 1)
        mixed = (vq.decode(tokens.roll(7, 1)) / 2 + 0.5).clamp(0, 1)
    assert sum(right(drawn, lines)) >= 10
    assert (drawn - images).square().mean() < 0.01 < (mixed - images).square().mean()


def test_transformers_loads_it_as_its_own():
    from transformers import AutoTokenizer, JanusForConditionalGeneration

    model, info = JanusForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 24e6
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer("a photo of a star" + tokenizer.boi_token, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**text, generation_mode="image", num_return_sequences=1, max_length=1)
    assert tokens.shape == (1, 256)
    assert len(tokens.unique()) > 8  # objects and ground, not one token all over


def test_every_word_of_scenes_is_a_token():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.tokenize(" ".join(words())) == ["▁" + word for word in words()]
    assert len(tokenizer.tokenize("dog")) == 4  # unknown words are read letter by letter


def test_unknown_words_are_named(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "decoder", lambda model, *rest: torch.zeros(1, 256, dtype=torch.long))
    with pytest.warns(errors.AccelWarning, match="mean nothing to it: dog"):
        pipe("A photo of a dog")


@pytest.mark.parametrize(
    "broken", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
def test_a_missing_file_is_named(tmp_path, broken):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns(broken))
    with pytest.raises(errors.WeightsError, match=f"(?s){broken}.*train_scenes_ar"):
        ScenesJanusPipeline.load(folder, torch.float32)


def test_a_folder_with_another_model_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(errors.WeightsError, match="LlamaForCausalLM"):
        ScenesJanusPipeline.load(folder, torch.float32)
