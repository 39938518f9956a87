"""The textured world's side-car: what it changes, what it must leave alone, and what it refuses."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from accel import generation
from accel.core import sidecar
from accel.errors import AccelWarning, ConfigError, WeightsError
from accel.evaluation import scenes
from accel.evaluation.geneval.scorer import score
from accel.pipelines import builtin
from accel.pipelines.builtin import textured

PROMPT, SIZED = "a photo of a red star", "a photo of a tiny red star"


def features(pipe, text):
    tokens, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=16)
    return torch.cat([tokens.flatten(), pooled.flatten()])


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """The pipeline as it is, and with a made-up side-car."""
    flat, changed = builtin.load_pipeline("cpu"), builtin.load_pipeline("cpu")
    torch.manual_seed(0)
    tensors = {"proj_out.A": torch.randn(4, 256), "proj_out.B": torch.randn(16, 4) * 0.01}
    for name in ("text_encoder", "text_encoder_2"):
        tokenizer = getattr(flat, name.replace("text_encoder", "tokenizer"))
        pieces = sorted({piece for word in textured.WORDS for piece in tokenizer.tokenize(word)})
        tensors[f"{name}.index"] = torch.tensor(tokenizer.convert_tokens_to_ids(pieces))
        tensors[f"{name}.rows"] = torch.randn(len(pieces), 128)
    file = tmp_path_factory.mktemp("car") / "t.safetensors"
    sidecar.write(file, textured.KIND, [sidecar.fingerprint(flat.transformer)], tensors)
    textured.add_to(changed, file)
    return flat, changed, file


def test_new_words_are_read_and_all_other_captions_as_before(pipes):
    flat, changed, _ = pipes
    assert torch.equal(features(flat, PROMPT), features(changed, PROMPT))
    assert not torch.allclose(features(flat, SIZED), features(changed, SIZED), atol=0.1)


def test_new_words_give_no_warning_where_they_are_known(pipes):
    flat, changed, _ = pipes
    options = {
        "num_inference_steps": 1,
        "height": 64,
        "width": 64,
        "true_cfg_scale": 1.0,
        "output_type": "latent",
    }
    with pytest.warns(AccelWarning, match="mean nothing to it: tiny$"):
        flat(SIZED, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelWarning)
        changed(SIZED, **options)


def test_other_weights_and_worlds_are_refused(pipes):
    _, changed, file = pipes
    with pytest.raises(WeightsError, match=r"trained for another model.*train_scenes_textured\.py"):
        textured.add_to(changed, file)  # a second time
    with pytest.raises(ConfigError, match="'flat' or 'textured', got 'striped'"):
        builtin.load_pipeline("cpu", world="striped")


def test_the_side_car_that_ships_draws_patterns_and_shows_its_prompts():
    lines = scenes.prompts("test", per_task=1, seed=11)
    jobs = [generation.Job(line.prompt, 300 + index) for index, line in enumerate(lines)]

    def drawn(model):
        pipe = generation.load_pipeline(model, "cpu", "bfloat16")
        return generation.run(pipe, jobs, generation.Settings(steps=8))

    flat, patterned = drawn(generation.BUILTIN), drawn(generation.BUILTIN_TEXTURED)
    found = scenes.detect(patterned)
    right = [score(objects, line).correct for objects, line in zip(found, lines, strict=True)]
    others = [
        score(objects, line).correct for objects, line in zip(found, lines[1:] + lines[:1], strict=True)
    ]
    assert sum(right) >= 3
    assert sum(others) <= 1  # the neighbour's prompt
    rough, smooth = (roughness(images) for images in (patterned, flat))
    assert (rough > 2 * smooth).sum() >= 4  # some of its grounds are plain gradients
    assert rough.mean() > 3 * smooth.mean()


def roughness(images):
    """(B,): how much the ground deviates from its own mean over 33 pixels, away from objects."""
    value = images.mean(1, keepdim=True)
    grey = images.amax(1, keepdim=True) - images.amin(1, keepdim=True) < 0.15
    ground = (
        grey & (value > 0.33) & (value < 0.8)
    ).float()  # grounds are nearly grey and of middle brightness

    def mean(x, side):
        return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)

    smooth = mean(value * ground, 33) / mean(ground, 33).clamp(min=1e-3)
    inside = mean(ground, 17) > 0.999
    return (((value - smooth) * inside).square().sum((1, 2, 3)) / inside.sum((1, 2, 3))).sqrt()
