"""Reference images of editing models: not merged or pruned with the image, computed rarely if asked to."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_conformance import CASES, relative

import accel
from accel.core.schedule import Phase
from accel.errors import AccelWarning, ConfigError, UnsupportedError
from accel.methods.pruning import references

KONTEXT = CASES["FLUX.1 Kontext"]
ONCE = accel.TokenPruningConfig(cycle=(1.0,), references=0)
KEEPING = ["FLUX.1 Kontext", "Qwen-Image-Edit", "LongCat-Image-Edit"]


def test_refreshes():
    phases = [Phase(b) for b in (1, 1, 0, 0.5, 0, 1, 0.5, 1)]
    assert references.refreshes(phases, 1) == {0, 1, 3, 5, 6, 7}  # of the steps that compute anything
    assert references.refreshes(phases, 2) == {0, 3, 6}
    assert references.refreshes(phases, 0) == {0}


def standing(pipe, seen):
    """Every step of the pipeline predicts the same: the sample and the time stay where they are."""
    step = pipe.scheduler.step

    def stay(model_output, timestep, sample, **kwargs):
        step(model_output, timestep, sample, **kwargs)
        seen.append(model_output)
        return (sample,)

    def stop(module, args, kwargs):
        return args, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], 0.5)}

    pipe.scheduler.step = stay
    pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)


@pytest.mark.parametrize("name", KEEPING)
def test_kept_references_are_what_they_were(name):
    """Where nothing changes from step to step, references that are not computed change nothing either."""
    case, seen = CASES[name], []
    pipe = case.make()
    standing(pipe, seen)
    plain = case.latents(pipe, steps=1)
    with accel.accelerate(pipe, ONCE) as handle:
        case.latents(pipe, steps=4)
    first, kept = seen[1], seen[2:]
    assert torch.equal(first, seen[0])
    assert plain.isfinite().all()
    assert all(relative(one, first) < 1e-5 for one in kept)
    shares = [step.computed / step.total for step in handle.stats.steps]
    image = case.tokens / (case.tokens + case.references)
    assert shares == pytest.approx([1, image, image, image])
    # The control: the references are seen.
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "hidden_states": _without(kwargs, case.tokens)}),
        with_kwargs=True,
    )
    case.latents(pipe, steps=1)
    assert relative(seen[-1], first) > 1e-3


def _without(kwargs, tokens):
    hidden = kwargs["hidden_states"].clone()
    hidden[:, tokens:] = 0
    return hidden


def test_they_are_computed_at_the_steps_asked_for():
    """And then from what they have become: exact where that is every step, with or without tokens left out."""
    pipe = KONTEXT.make()
    plain = KONTEXT.latents(pipe, steps=4)
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(1.0,), references=2)) as handle:
        every_second = KONTEXT.latents(pipe, steps=4)
    shares = [step.computed / step.total for step in handle.stats.steps]
    assert shares == pytest.approx([1, 0.8, 1, 0.8])
    with accel.accelerate(pipe, ONCE):
        once = KONTEXT.latents(pipe, steps=4)
    assert 0 < relative(every_second, plain) < relative(once, plain)
    with pytest.warns(AccelWarning, match="every budget is 1"):
        handle = accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(1.0,), references=1))
    with handle:
        assert torch.equal(KONTEXT.latents(pipe, steps=4), plain)
    assert torch.equal(KONTEXT.latents(pipe, steps=4), plain)


def test_beside_tokens_left_out():
    pipe = KONTEXT.make()
    config = accel.TokenPruningConfig(cycle=(0.5,), references=3, dense_steps_first=2, dense_steps_last=1)
    with accel.accelerate(pipe, config) as handle:
        first = KONTEXT.latents(pipe, steps=8)
        assert torch.equal(KONTEXT.latents(pipe, steps=8), first)
    computed = [step.computed / step.total * 120 for step in handle.stats.steps]
    assert computed == pytest.approx([120, 96, 48, 48 + 24, 48, 48, 48 + 24, 96])
    assert torch.isfinite(first).all()


def test_where_keys_and_values_cannot_be_kept_it_is_refused():
    with pytest.raises(UnsupportedError, match="keys and values"):
        accel.accelerate(CASES["FLUX.2 klein, editing"].make(), ONCE)
    with pytest.raises(ConfigError, match="keys_values='all'"):
        accel.TokenPruningConfig(cycle=(1.0,), references=0, keys_values="none")


def test_pictures_without_references_are_told():
    pipe = KONTEXT.make()
    call = KONTEXT.call(steps=3, wide=False, dtype=torch.float32)
    del call["image"]
    plain = pipe(**call).images
    call["generator"].manual_seed(5)
    with accel.accelerate(pipe, ONCE), pytest.warns(AccelWarning, match="no reference images"):
        assert torch.equal(pipe(**call).images, plain)


class Layers:
    """A loop that makes all of its grids, as Qwen-Image-Layered and VisualCloze do."""

    def __init__(self, transformer):
        self.transformer, self.scheduler = transformer, FlowMatchEulerDiscreteScheduler()

    def __call__(self, steps):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, 96 + 24, 16, generator=generator)
        text = torch.randn(1, 7, 32, generator=generator)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            shapes = [[(1, 8, 12), (1, 4, 6)]]
            v = self.transformer(x, text, timestep=t[None] / 1000, img_shapes=shapes, return_dict=False)[0]
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x


def test_several_grids_that_are_all_made_are_no_references():
    pipe = Layers(CASES["Qwen-Image"].make().transformer)
    for config in (accel.TokenMergingConfig(), ONCE):
        with (
            accel.accelerate(pipe, config),
            pytest.raises(UnsupportedError, match="several grids, all of which"),
        ):
            pipe(6)
    with accel.accelerate(pipe, "balanced") as handle:
        pipe(12)
    assert handle.stats.share < 0.95


def test_chunking_says_at_once_that_it_takes_one_image_alone():
    pipe, steps = KONTEXT.make(), []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    with (
        accel.accelerate(pipe, accel.DynamicChunkingConfig()),
        pytest.raises(UnsupportedError, match=r"reference images.*TokenMergingConfig or TokenPruningConfig"),
    ):
        KONTEXT.latents(pipe, steps=4)
    assert not steps
