"""Merging on U-Nets: which blocks, between which convolutions, at which resolutions."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLPAGPipeline
from test_conformance import CASES, permuted, relative

import accel
from accel.core.plan import TokenPlan
from accel.core.span import Span
from accel.errors import UnsupportedError
from accel.pipelines.registry import find

SD, XL = CASES["U-Net"], CASES["U-Net, XL"]


def lengths(pipe, case, config, steps=2):
    """Tokens that every transformer block got at the last step, by its path."""
    seen = {}
    with accel.accelerate(pipe, config) as handle, ExitStack() as stack:
        for path, module in pipe.unet.named_modules():
            if type(module).__name__ == "BasicTransformerBlock":

                def note(module, args, kwargs, path=path):
                    seen[path] = (args[0] if args else kwargs["hidden_states"]).shape[1]

                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        case.latents(pipe, steps=steps)
        return seen, handle.stats


def test_tomesd_merges_at_the_highest_resolution_alone():
    seen, _ = lengths(SD.make(), SD, "tomesd")
    assert {path: n for path, n in seen.items() if n == 192} == dict.fromkeys(
        (
            f"{part}.attentions.{i}.transformer_blocks.0"
            for part, i in [("down_blocks.0", 0), ("up_blocks.2", 0), ("up_blocks.2", 1)]
        ),
        192,
    )
    assert {n for n in seen.values() if n != 192} == {96, 24}  # and nowhere else


def test_merging_takes_two_resolutions_from_the_second_block_on():
    config = accel.TokenMergingConfig(
        ratio=0.5, schedule=accel.Schedule(dense_first=0, dense_last=0, refresh_every=1)
    )
    seen, stats = lengths(XL.make(), XL, config, steps=1)
    high, low = 96 // 2, 24 // 2
    assert list(seen.values()) == [96, high] + 12 * [low] + 4 * [high]  # the middle is at the lower one
    computed = sum(seen.values())
    whole = 6 * 96 + 12 * 24
    assert stats.share == pytest.approx(computed / whole)


def test_convolutions_take_whole_grids():
    """The negative control: tokens that stay permuted over a convolution are at wrong places."""
    pipe = SD.make()
    sites = [site for site in find(pipe.unet).tokens.sites(pipe.unet) if site.scale == 1]
    plain = SD.latents(pipe, steps=1)
    assert relative(permuted(pipe, SD, sites, SD.tokens, 1, steps=1), plain) < 1e-5
    order = TokenPlan.permutation(torch.randperm(384, generator=torch.Generator().manual_seed(9)))
    with ExitStack() as stack:
        Span(lambda x: order).attach(pipe.unet, sites, stack, bias=False)
        assert relative(SD.latents(pipe, steps=1), plain) > 1e-2


@pytest.mark.parametrize("case", [SD, XL])
def test_odd_sizes(case):
    """Convolutions of stride 2 round up; tokens at the last row are cut."""
    pipe = case.make()
    latents = torch.randn(2, 4, 17, 27, generator=torch.Generator().manual_seed(3))
    call = {**case.call(steps=3, wide=False, dtype=torch.float32), "latents": latents}
    config = accel.TokenMergingConfig(dense_steps_first=1, dense_steps_last=0)
    with accel.accelerate(pipe, config) as handle:
        assert torch.isfinite(pipe(**call).images).all()
    assert handle.stats.share < 0.9


def test_nothing_is_carried_over_convolutions():
    """A token's deviation from its group is computed by the convolutions; "carry" would average it away."""
    pipe = SD.make()
    pictures = []
    for unmerge in ("carry", "copy"):
        with accel.accelerate(
            pipe, accel.TokenMergingConfig(unmerge=unmerge, matching=accel.Matching(importance="detail"))
        ):
            pictures.append(SD.latents(pipe, steps=4))
    assert torch.equal(*pictures)


def test_pruning_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"convolutional"):
        accel.accelerate(SD.make(), accel.TokenPruningConfig(keys_values="none"))


def test_merging_goes_with_controlnet():
    """Its residuals go where grids are whole."""
    pipe = SD.make()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 16))
    for name, parameter in controlnet.named_parameters():
        if "controlnet" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    controlled = StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    call = SD.call(steps=3, wide=False, dtype=torch.float32)
    image = torch.rand(1, 3, call["height"], call["width"], generator=torch.Generator().manual_seed(2))

    def run():
        call["generator"] = torch.Generator().manual_seed(5)
        return controlled(**call, image=image, guess_mode=False).images

    plain = run()
    with accel.accelerate(controlled, "tomesd") as handle:
        merged = run()
    assert handle.stats.share < 0.9
    assert relative(merged, plain) > 0
    assert torch.equal(run(), plain)


def test_perturbed_attention_takes_merging_without_weights():
    pipe = StableDiffusionXLPAGPipeline.from_pipe(XL.make(), pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    plain = XL.latents(pipe, steps=8)
    calls = []
    with (
        pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1)),
        accel.accelerate(pipe, "merging"),
        pytest.raises(UnsupportedError, match=r"PAG.*proportional=False"),
    ):
        XL.latents(pipe, steps=8)
    assert not calls  # said before anything is computed
    with accel.accelerate(pipe, accel.TokenMergingConfig(proportional=False)) as handle:
        assert torch.isfinite(XL.latents(pipe, steps=8)).all()
    assert handle.stats.share < 0.95
    assert torch.equal(XL.latents(pipe, steps=8), plain)


def test_blocks_that_attend_to_text_alone_are_left_whole():
    """What attends to no image token has no use for their weights, as wide as the image and not as the text."""
    pipe = SD.make()
    for block in pipe.unet.down_blocks[0].attentions[0].transformer_blocks:
        block.only_cross_attention = True
    paths = {site.path for site in find(pipe.unet).tokens.sites(pipe.unet)}
    assert not any(path.startswith("down_blocks.0.attentions.0.") for path in paths)
    assert any(path.startswith("down_blocks.0.attentions") or path.startswith("up_blocks") for path in paths)
