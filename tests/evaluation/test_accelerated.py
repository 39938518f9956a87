"""The stages with a real FluxPipeline and real acceleration: attached while measured, gone afterwards."""

import zlib

import diffusers
import pytest
import torch
from fake_pipeline import SUITE

from accel.evaluation.configurations import Configuration, parse
from accel.evaluation.errors import EvaluationError
from accel.evaluation.folder import sample_key
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers


class PromptedFlux(diffusers.FluxPipeline):
    """Random weights; the prompt becomes embeddings without a text encoder."""

    def __call__(self, prompt, **kwargs):
        generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in prompt]
        embeds = torch.stack([torch.randn(4, 16, generator=g) for g in generators])
        return super().__call__(
            prompt_embeds=embeds, pooled_prompt_embeds=embeds[:, 0], height=32, width=48, **kwargs
        )


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        shift_factor=0.0,
    )  # fmt: skip
    pipe = PromptedFlux(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_presets_and_their_variants():
    merged, less = parse("merging"), parse("less:merging,ratio=0.3")
    assert less.method.ratio == 0.3
    assert less.name == "less"
    assert len({merged.hash, less.hash, parse("merging,steps=4").hash}) == 3
    with pytest.raises(EvaluationError, match=r"unknown setting of .* 'ration'. Did you mean 'ratio'"):
        parse("merging,ration=0.3")


def test_acceleration_is_measured_while_attached_and_leaves_the_plain_images_alone(tmp_path, flux):
    from accel import TokenMergingConfig

    merged = Configuration("merged", TokenMergingConfig(ratio=0.5))
    call = {"num_inference_steps": 6}
    both = run(tmp_path / "both", SUITE, flux, [merged, "steps=3"], limit=3, call=call)
    alone = run(tmp_path / "alone", SUITE, flux, [], limit=3, call=call)
    records = {sample_key(r): r for r in both.samples()}
    for record in alone.samples():  # bit for bit, although the other run attached in between
        assert records[sample_key(record)]["image_sha256"] == record["image_sha256"]
    assert all(r["denoiser_seconds"] for r in records.values())
    score(both.path, pixel_scorers())
    psnr = {sample_key(r): r["value"] for r in both.scores() if r["metric"] == "psnr"}
    assert all(psnr["merged", i, 0] is not None for i in range(3))  # it did change the images
    assert not flux.transformer._forward_hooks
    assert not flux.transformer._forward_pre_hooks
