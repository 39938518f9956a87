"""What families declare beside their tokens is true: branches of guidance, keys and values, biases; and what tokens
cannot follow is refused by its name."""

from __future__ import annotations

import importlib
import inspect
from contextlib import ExitStack
from dataclasses import replace

import pytest
import tiny_flux_like
import tiny_latents
import torch
from conftest import Watch
from diffusers import StableDiffusion3PAGPipeline
from test_conformance import CASES, relative

import accel
from accel.core import sidecar
from accel.core.plan import TokenPlan
from accel.core.prediction import prediction_of
from accel.core.site import Port
from accel.core.span import Span
from accel.errors import UnsupportedError
from accel.methods.learned import KIND
from accel.pipelines import registry
from accel.pipelines.registry import find

NEGATIVE = "negative_prompt_embeds"
F32 = torch.float32
OURS = {**tiny_flux_like.CASES, **tiny_latents.CASES}
GUIDED = [name for name, case in OURS.items() if NEGATIVE in case.call(steps=1, wide=False, dtype=F32)]


def case_of(name):
    """A case that an older diffusers may not have the model of."""
    return CASES[name] if name in CASES else pytest.skip(f"{name} is of a newer diffusers")


def predictions(pipe, call) -> torch.Tensor:
    """Of the calls of the first step, in the order of the images: both branches."""
    seen = []
    with Watch(pipe.transformer, lambda args, kwargs, output: seen.append(prediction_of(output).clone())):
        pipe(**call)
    return torch.cat(seen)


@pytest.mark.parametrize("name", GUIDED)
def test_the_conditional_branch_is_where_it_is_declared(name):
    """Another negative prompt changes the unconditional half, and only that."""
    case = OURS[name]
    pipe = case.make()
    branches = find(pipe.transformer).branches
    call = case.call(steps=1, wide=False, dtype=F32)
    halves = predictions(pipe, call).chunk(2)
    call = case.call(steps=1, wide=False, dtype=F32)
    negative = call[NEGATIVE]
    call[NEGATIVE] = [x + 1 for x in negative] if isinstance(negative, list) else negative + 1
    others = predictions(pipe, call).chunk(2)
    changed = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(halves, others, strict=True)]
    first = (branches.calls or branches.batched) == "first"
    assert changed == ([False, True] if first else [True, False])


@pytest.mark.parametrize("name", ["FIBO", "HiDream", "Z-Image"])
def test_half_of_a_batch_goes_through_the_denoiser(name, monkeypatch):
    """Inputs that are lists, of images or of layers, are halved, too; and with the other half taken for the conditional one it is worse."""
    case = CASES[name]
    pipe = case.make()
    adapter = find(pipe.transformer)
    plain = case.latents(pipe, steps=12)
    swapped = "first" if adapter.branches.batched == "second" else "second"
    errors = []
    for batched in (adapter.branches.batched, swapped):
        declared = replace(adapter, branches=replace(adapter.branches, batched=batched))
        monkeypatch.setitem(registry._REGISTERED, type(pipe.transformer).__name__, declared)
        with accel.accelerate(
            pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2))
        ) as handle:
            errors.append(relative(case.latents(pipe, steps=12), plain))
            assert handle.stats.branches_skipped == 5
    assert errors[0] < 0.9 * errors[1]


def test_more_grids_than_one():
    qwen = tiny_flux_like.make_qwen().transformer
    tokens = find(qwen).tokens
    one = tokens.grid_source({"img_shapes": [[(1, 8, 12)]] * 2})
    assert tokens.grid(qwen, one) == (8, 12)
    assert tokens.references(qwen, one) == 0
    two = tokens.grid_source({"img_shapes": [[(1, 8, 12), (1, 4, 6)]] * 2})
    assert tokens.grid(qwen, two) == (8, 12)
    assert tokens.references(qwen, two) == 24

    zimage = tiny_latents.make_zimage().transformer
    tokens = find(zimage).tokens
    image = torch.zeros(4, 1, 16, 20)
    assert tokens.grid(zimage, tokens.grid_source({"x": [image, image]})) == (8, 10)
    with pytest.raises(UnsupportedError, match="Omni"):
        tokens.grid(zimage, tokens.grid_source({"x": [[image, image]]}))


REFUSED = [
    # family, argument, its value, refused in span scope only
    ("Qwen-Image", "controlnet_block_samples", (0,), True),
    ("Chroma", "controlnet_single_block_samples", (0,), True),
    ("Chroma", "joint_attention_kwargs", {"ip_adapter_masks": 0}, False),
    ("Bria", "controlnet_block_samples", (0,), True),
    ("Z-Image", "controlnet_block_samples", {0: 0}, True),
    ("Stable Diffusion 3", "block_controlnet_hidden_states", (0,), True),
    ("Stable Diffusion 3", "skip_layers", [1], False),
    ("FLUX.2 klein", "kv_cache_mode", "extract", False),
]


@pytest.mark.parametrize(("family", "argument", "value", "span_only"), REFUSED)
def test_refused_by_name(family, argument, value, span_only):
    tokens = find(CASES[family].make().transformer).tokens
    tokens.refuse({argument: None}, True)
    for span in (True, False):
        if span or not span_only:
            with pytest.raises(UnsupportedError, match=argument):
                tokens.refuse({argument: value}, span)
        else:
            tokens.refuse({argument: value}, span)


def test_skip_layer_guidance_is_refused_in_a_run():
    case = CASES["Stable Diffusion 3"]
    pipe = case.make()
    call = case.call(steps=10, wide=False, dtype=F32)
    with (
        accel.accelerate(pipe, "merging"),
        pytest.raises(UnsupportedError, match="skip_guidance_layers=None"),
    ):
        pipe(**call, skip_guidance_layers=[1], skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.9)


@pytest.mark.parametrize("family", ["Ideogram 4", "Qwen-Image 2.1"])
def test_pruning_where_a_prediction_holds_more_than_the_image_is_refused(family):
    pipe = case_of(family).make()
    with pytest.raises(UnsupportedError, match="nothing in front of them"):
        accel.accelerate(pipe, accel.TokenPruningConfig(keys_values="none"))


def test_predictions_that_become_shorter_are_followed():
    """Qwen-Image 2.1 predicts text and image at the first step, and the image alone after it."""
    case = case_of("Qwen-Image 2.1")
    pipe = case.make()
    plain = case.latents(pipe, steps=12)
    with accel.accelerate(
        pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2))
    ) as handle:
        assert 0 < relative(case.latents(pipe, steps=12), plain) < 0.3
    assert handle.stats.branches_skipped == 5
    errors = []
    for correct in (False, True):
        with accel.accelerate(
            pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1)), correct=correct)
        ) as handle:
            errors.append(relative(case.latents(pipe, steps=12), plain))
        assert handle.stats.notes == []  # what the sampler gets is a mix of what was predicted for the image
    assert errors[0] != errors[1]


def test_what_forecasts_missed_is_made_up_for_where_predictions_have_frames():
    """Z-Image predicts one frame, and its sampler gets pictures."""
    case = CASES["Z-Image"]
    pipe = case.make()
    with accel.accelerate(
        pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1)), correct=True)
    ) as handle:
        corrected = case.latents(pipe, steps=12)
    assert handle.stats.notes == []
    with accel.accelerate(pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1)), correct=False)):
        assert relative(case.latents(pipe, steps=12), corrected) > 1e-3


def test_half_of_a_step_is_counted_where_tokens_are_not_described():
    case = CASES["Sana"]
    pipe = case.make()
    with accel.accelerate(
        pipe, accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2))
    ) as handle:
        case.latents(pipe, steps=12)
    assert handle.stats.share == 1 - handle.stats.branches_skipped / 2 / 12 < 1


def test_digests_of_different_lengths_in_one_batch_are_refused():
    case = case_of("FIBO 2")
    call = case.call(steps=10, wide=False, dtype=F32)
    even, uneven = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    even[:, 8:], uneven[1, 4:] = False, False
    pipe = case.make()
    with accel.accelerate(pipe, "merging") as handle:
        pipe(**call, prompt_embeds_mask=even)
        assert handle.stats.share < 1
        with pytest.raises(UnsupportedError, match="another order"):
            pipe(**call, prompt_embeds_mask=uneven)
        # Of the negative prompt it shows at the first step on fewer tokens.
        with pytest.raises(UnsupportedError, match="another order"):
            pipe(**call, negative_prompt_embeds_mask=uneven[:, :5])


def test_a_mask_that_is_no_tensor_is_refused():
    """FlexAttention's."""
    case = case_of("Qwen-Image 2.1, uncached")
    pipe = case.make()
    model = importlib.import_module(type(pipe.transformer).__module__)
    pipe.transformer.set_attn_processor(model.QwenImage21FlexAttnProcessor())
    with accel.accelerate(pipe, "merging"), pytest.raises(UnsupportedError, match="QwenImage21AttnProcessor"):
        case.latents(pipe, steps=10)


KEPT = [
    "Qwen-Image",
    "Krea 2",
    "Z-Image",
    "HunyuanImage",
    "HunyuanImage refiner",
    "LongCat-Image",
    "Ovis-Image",
    "Bria",
    "Stable Diffusion 3",
    "AuraFlow",
]


def frozen(module):
    """The denoiser sees the latents and the time of its first step at every step."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    first = {}

    def repeat(module, args, kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        now = {name: given[name] for name in ("hidden_states", "timestep", "x", "t") if name in given}
        return (), {**given, **first.setdefault("inputs", now)}

    module.register_forward_pre_hook(repeat, with_kwargs=True)


def without_padding(call):
    return {name: None if "_embeds_mask" in name else value for name, value in call.items()}


@pytest.mark.parametrize("keys_values", ["all", 0.5, "none"])
@pytest.mark.parametrize("name", KEPT)
def test_kept_keys_and_values_are_the_right_ones(name, keys_values):
    """The same input at every step is answered as by the plain pipeline; but not if nothing is kept."""
    case = CASES[name]
    if name == "Qwen-Image":
        case = replace(case, call=lambda **options: without_padding(CASES[name].call(**options)))
    pipe = case.make()
    frozen(pipe.transformer)
    plain = case.latents(pipe, steps=8)
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.3,), keys_values=keys_values)) as handle:
        error = relative(case.latents(pipe, steps=8), plain)
        assert handle.stats.share < 0.8
    assert error < 1e-5 if keys_values == "all" else error > 1e-3


def test_qwen_keeps_no_keys_of_padded_prompts():
    case = CASES["Qwen-Image"]
    pipe = case.make()
    with (
        accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5,))),
        pytest.raises(UnsupportedError, match="prompts of different lengths"),
    ):
        case.latents(pipe, steps=6)


BIASED = ["FLUX.2 klein", "Krea 2", "LongCat-Image", "Bria", "FIBO", "Z-Image", "HunyuanImage"]


def caught(pipe, path, call):
    """What a block is given in the first call of a run."""
    seen = []
    module = pipe.transformer.get_submodule(path)
    hook = module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    pipe(**call)
    hook.remove()
    return module, *seen[0]


@pytest.mark.parametrize("name", BIASED)
def test_a_key_counts_for_as_many_as_it_stands_for(name):
    """Merging tokens that are equal in content and position loses nothing with the bias, and does without."""
    case = CASES[name]
    pipe, N = case.make(), case.tokens
    sizes = torch.tensor([1, 2, 5, 8]).repeat(N // 16)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    first = sizes.cumsum(0) - sizes
    plan = TokenPlan.build(first[None], owner[None])
    equal = TokenPlan.build(
        first[owner][None], torch.arange(N)[None]
    )  # as many tokens, with those of their slots
    sites = find(pipe.transformer).tokens.sites(pipe.transformer)
    for site in (sites[0], sites[-1]):
        block, args, kwargs = caught(pipe, site.path, case.call(steps=1, wide=False, dtype=F32))
        port = Port(site, block)
        args, kwargs = port.follow(equal, args, kwargs)
        others, image = port.split(port.get(site.tokens, args, kwargs), N)
        args, kwargs = port.put(site.tokens, port.join(others, equal.take(image)), args, kwargs)
        exact, errors = port.read(block(*args, **kwargs)), {}
        for bias in (True, False):
            with ExitStack() as stack:
                Span(lambda x: plan, tokens=lambda: N).attach(pipe.transformer, [site], stack, bias=bias)
                errors[bias] = relative(port.read(block(*args, **kwargs)), exact)
        assert errors[True] < 1e-5
        assert errors[False] > 1e-3


def test_perturbed_attention_keeps_no_keys_and_says_so():
    case = CASES["Stable Diffusion 3"]
    parts = case.make().components
    unused = ("image_encoder", "feature_extractor")
    pipe = StableDiffusion3PAGPipeline(
        **{name: part for name, part in parts.items() if name not in unused},
        pag_applied_layers=["transformer_blocks.2"],
    )
    pipe.set_progress_bar_config(disable=True)
    plain = case.latents(pipe, steps=6)
    with (
        accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5,))),
        pytest.raises(UnsupportedError, match=r"transformer_blocks\.2\.attn has a PAG.*keys_values='none'"),
    ):
        case.latents(pipe, steps=6)
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5,), keys_values="none")) as handle:
        assert torch.isfinite(case.latents(pipe, steps=6)).all()
        assert handle.stats.share < 0.9
    assert torch.equal(case.latents(pipe, steps=6), plain)


def test_changes_for_windows_are_refused_where_guidance_has_a_module_of_its_own(tmp_path):
    """A side-car was trained for one module, and nobody can say which branch that is."""
    pipe, file = case_of("Ideogram 4").make(), tmp_path / "car.safetensors"
    sidecar.write(file, KIND, [sidecar.fingerprint(pipe.transformer)], {})
    config = accel.TokenMergingConfig(groups="windows", adapter=str(file))
    with pytest.raises(UnsupportedError, match=r"adapter is for one denoiser.*leave adapter out"):
        accel.accelerate(pipe, config)
    accel.accelerate(pipe, replace(config, adapter=None)).remove()
