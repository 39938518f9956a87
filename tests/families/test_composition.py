"""Token methods beside what else people switch on, on one family of each kind: a U-Net with both branches of guidance in
one batch, latents with the image first in joint attention, packed tokens with a call for each branch.

The same on FLUX and PixArt, for every method: `tests/docs/test_works_with.py`.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from test_conformance import CASES, denoiser_of, relative

import accel

MERGING = accel.TokenMergingConfig(ratio=0.5, dense_steps_first=1, dense_steps_last=0)
KINDS = ["U-Net", "Stable Diffusion 3", "Qwen-Image"]


def lora(pipe):
    """Random low-rank weights in the attentions, as an adapter that peft carries."""
    peft = pytest.importorskip("peft")
    denoiser = denoiser_of(pipe)
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def offloaded(pipe):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(denoiser_of(pipe), execution_device="cpu")


def offloaded_by_group(pipe):
    device = torch.device("cpu")
    denoiser_of(pipe).enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1
    )


@pytest.fixture(autouse=True)
def _attention_as_it_was():
    """Setting the attention of one model sets it for all of the process."""
    with attention_backend("native"):
        yield


def compiled_blocks(pipe):
    torch.compiler.reset()
    denoiser = denoiser_of(pipe)
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
        return
    for block in denoiser.transformer_blocks:  # Stable Diffusion 3 does not name its blocks
        block.compile(fullgraph=True, backend="eager")


def other_attention(pipe):
    denoiser_of(pipe).set_attention_backend("_native_math")


def taken_apart(case, feature, config, *, first):
    """Latents with a feature and a method, in one order or the other."""
    pipe = case.make()
    if first == "feature":
        feature(pipe)
    handle = accel.accelerate(pipe, config)
    if first == "method":
        feature(pipe)
    both = case.latents(pipe, steps=4)
    assert handle.stats.share < 0.95
    handle.remove()
    return both, case.latents(pipe, steps=4)


@pytest.mark.parametrize("feature", [lora, offloaded, offloaded_by_group, compiled_blocks, other_attention])
@pytest.mark.parametrize("name", KINDS)
def test_beside(name, feature):
    case = CASES[name]
    if name == "U-Net" and feature is other_attention:
        pytest.skip("its attention does not go through diffusers' dispatcher")
    pipe = case.make()
    with accel.accelerate(pipe, MERGING):
        alone = case.latents(pipe, steps=4)
    plain = case.latents(pipe, steps=4)
    both, restored = taken_apart(case, feature, MERGING, first="feature")
    assert relative(both, restored) > 1e-4  # the method was at work
    if feature is lora:
        assert relative(both, alone) > 1e-3  # and so was the feature
    else:
        assert relative(both, alone) < 1e-4
        assert relative(restored, plain) < 1e-5
    if feature is not compiled_blocks:  # the other order is in tests/core/test_adapters.py
        other, _ = taken_apart(case, feature, MERGING, first="method")
        assert relative(other, both) < 1e-5


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("U-Net", StableDiffusionImg2ImgPipeline),
        ("U-Net", StableDiffusionInpaintPipeline),
        ("U-Net, XL", StableDiffusionXLImg2ImgPipeline),
    ],
)
@pytest.mark.parametrize("preset", ["merging", "balanced"])
def test_another_pipeline_of_the_same_parts(name, cls, preset):
    """A run that starts in the middle, of pictures and masks; the handle of the one holds for the other's denoiser
    only once it is told."""
    case = CASES[name]
    pipe = cls.from_pipe(case.make(), **({"requires_safety_checker": False} if "XL" not in name else {}))
    pipe.set_progress_bar_config(disable=True)
    call = case.call(steps=20, wide=False, dtype=torch.float32)
    size = call.pop("width"), call.pop("height")
    call |= {"image": Image.new("RGB", size, (200, 30, 60)), "strength": 0.8}
    if "Inpaint" in cls.__name__:
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        call |= {"mask_image": mask, "width": size[0], "height": size[1]}

    def run():
        return pipe(**{**call, "generator": torch.Generator().manual_seed(5)}).images

    plain = run()
    with accel.accelerate(pipe, preset) as handle:
        fast = run()
        assert torch.equal(run(), fast)
    assert handle.stats.share < 0.98
    assert len(handle.stats.steps) == 16  # of 20, from 0.8 of the noise on
    assert relative(fast, plain) > 0
    assert torch.equal(run(), plain)
