"""The distilled built-in model: its defaults, its pictures, and what it refuses."""

import inspect

import pytest
import torch

import accel
from accel import configs, generation
from accel.core import sidecar
from accel.errors import ConfigError, WeightsError
from accel.evaluation import scenes
from accel.evaluation.geneval.scorer import score
from accel.pipelines import builtin
from accel.pipelines.builtin import turbo


@pytest.fixture(scope="module")
def pipe():
    return generation.load_pipeline(generation.BUILTIN_TURBO, "cpu", "bfloat16")


def right(images, lines):
    found = scenes.detect(images)
    return sum(score(objects, line).correct for objects, line in zip(found, lines, strict=True))


def test_four_steps_of_one_call_show_their_prompts(pipe):
    lines = scenes.prompts("test", per_task=1, seed=11)
    jobs = [generation.Job(line.prompt, 300 + index) for index, line in enumerate(lines)]
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    images = generation.run(pipe, jobs, generation.Settings())
    hook.remove()
    assert len(calls) == 4
    assert right(images, lines) >= 3
    assert right(images, lines[1:] + lines[:1]) <= 1  # the neighbour's prompt


def test_without_a_preset_it_gets_the_one_for_few_steps(pipe):
    with accel.accelerate(pipe) as handle:
        assert handle.config == configs.load("few-step")
    with accel.accelerate(builtin.load_pipeline("cpu")) as handle:
        assert handle.config == configs.load("balanced")


def test_the_command_line_sees_its_defaults(pipe):
    assert generation.call_in_full(pipe, generation.Settings())["steps"] == 4
    assert generation.call_in_full(pipe, generation.Settings())["guidance"] == 1.0
    assert inspect.signature(builtin.load_pipeline("cpu").__call__).parameters["true_cfg_scale"].default == 3


def test_saved_and_loaded_it_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = generation.load_pipeline(str(tmp_path), "cpu", "bfloat16")
    assert type(again) is turbo.ScenesTurboPipeline
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value)


def test_other_weights_and_worlds_are_refused(pipe, tmp_path):
    with pytest.raises(WeightsError, match=r"trained for another model.*distill_few_steps\.py"):
        turbo.add_to(pipe)  # a second time
    with pytest.raises(ConfigError, match="goes with world='flat', got 'textured'"):
        builtin.load_pipeline("cpu", world="textured", distilled=True)
    file = tmp_path / "other.safetensors"
    sidecar.write(file, "textured", [], {})
    with pytest.raises(WeightsError, match=r"not a side-car for few steps.*distill_few_steps\.py"):
        turbo.add_to(pipe, file)
