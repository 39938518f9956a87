"""The built-in model draws what it is asked for, and merged tokens do not change that. Few images, so the bounds
are wide; the measured scores are in the model card."""

from dataclasses import replace

import pytest

from accel import configs, generation
from accel.evaluation import scenes
from accel.evaluation.geneval.scorer import score
from accel.evaluation.metrics.pixel import psnr


@pytest.fixture(scope="module")
def images():
    """A prompt per task and a few more, plain and merged, from the same seeds."""
    pipe = generation.load_pipeline(dtype="bfloat16")
    lines = scenes.prompts("test", per_task=1, seed=4)
    jobs = [generation.Job(line.prompt, 100 + index) for index, line in enumerate(lines)]
    settings = generation.Settings()
    plain = generation.timed(pipe, jobs, settings)
    merging = configs.load("merging")
    merged = generation.timed(pipe, jobs, settings, merging)
    copied = generation.timed(pipe, jobs, settings, replace(merging, unmerge="copy"))
    balanced = generation.timed(pipe, jobs, settings, configs.load("balanced"))
    return lines, plain, merged, copied, balanced


@pytest.mark.parametrize("which", ["plain", "merged", "balanced"])
def test_images_show_their_prompts(images, which):
    lines, plain, merged, _, balanced = images
    found = scenes.detect({"plain": plain, "merged": merged, "balanced": balanced}[which].images)
    right = [score(objects, line).correct for objects, line in zip(found, lines, strict=True)]
    wrong = [score(objects, line).correct for objects, line in zip(found, lines[1:] + lines[:1], strict=True)]
    if which == "plain":
        assert sum(right) >= 4, right
        assert sum(wrong) <= 1, wrong
    assert sum(right) >= 2 + sum(wrong), (right, wrong)  # the control: the neighbour's prompt


def test_merging_half_the_tokens_keeps_the_images(images):
    _, plain, merged, copied, _ = images
    assert merged.stats.share < 0.7
    # 20 steps, the first 5 and the last dense, a new plan at each of the others
    assert (merged.stats.plans_built, merged.stats.plans_reused) == (14, 0)
    close = psnr(plain.images, merged.images)
    far = psnr(plain.images, plain.images.roll(1, 0))
    assert close.mean() > far.mean() + 6, (close, far)
    # What carrying detail on is for (measured: 3 dB).
    assert close.mean() > psnr(plain.images, copied.images).mean() + 1


def test_the_balanced_preset_stays_close(images):
    _, plain, merged, _, balanced = images
    assert balanced.stats.share == pytest.approx(11 / 20)
    assert psnr(plain.images, balanced.images).mean() > psnr(plain.images, merged.images).mean() + 3
