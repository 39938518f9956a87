"""FLUX with an IP-Adapter: what follows it, and what is refused because it would silently be wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_flux, randomise
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import accel
from accel.errors import UnsupportedError

ALL = accel.TokenPruningConfig(cycle=(0.999,))  # selects every token
NONE = accel.TokenPruningConfig(cycle=(0.999,), keys_values="none")


class Project(torch.nn.Module):
    """In place of the adapter's image projection: the embeddings as they are, one list entry per adapter."""

    def forward(self, embeds):
        return embeds


def with_adapter(scale=0.7):
    """The processors that `load_ip_adapter` sets: in the dual-stream blocks."""
    pipe = make_flux()
    for i, block in enumerate(pipe.transformer.transformer_blocks):
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, scale=scale)
        block.attn.set_processor(randomise(processor, 10 + i))
    pipe.transformer.encoder_hid_proj = Project()
    return pipe


def latents(pipe, **options):
    image = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(7))
    return FAMILIES["flux"].latents(
        pipe, joint_attention_kwargs={"ip_adapter_image_embeds": [image]}, **options
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_adapter_matters():
    assert relative(latents(with_adapter()), latents(with_adapter(scale=0.0))) > 1e-2


def test_kept_keys_and_values_are_refused_at_the_first_step_that_stores():
    pipe = with_adapter()
    plain, calls = latents(pipe), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with (
        accel.accelerate(pipe, ALL),
        pytest.raises(UnsupportedError, match=r"IP-Adapter.*keys_values='none'.*unload_ip_adapter"),
    ):
        latents(pipe)
    # Dense, but it stores: rotated queries would have reached the adapter here already.
    assert len(calls) == 1
    calls.clear()
    assert torch.equal(latents(pipe), plain)


def test_without_kept_keys_and_values_the_adapter_follows():
    pipe = with_adapter()
    plain = latents(pipe)
    with accel.accelerate(pipe, NONE) as handle:
        assert relative(latents(pipe), plain) < 1e-5
        assert handle.stats.plans_built == 3
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5,), keys_values="none")):
        assert relative(latents(pipe), plain) < 1


def test_nothing_is_kept_without_a_partial_step_so_nothing_is_refused():
    pipe = with_adapter()
    plain = latents(pipe)
    with accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0, 1))) as handle:
        assert 1e-6 < relative(latents(pipe), plain) < 1
        assert handle.stats.share < 1
