"""Pipelines put together from blocks (`diffusers.ModularPipeline`), from the embeddings of the text to latents."""

from __future__ import annotations

from case import Case, common, numbers, texts
from conftest import randomise
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel, FluxTransformer2DModel
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep
from tiny_flux_like import BLOCKS, DIM, ROTARY


def assemble(blocks, transformer):
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=randomise(transformer, 0), scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(steps, wide, dtype):
    """Latents are what the blocks for decoding would take."""
    options = {name: value for name, value in common(steps, wide, token=16).items() if name != "output_type"}
    return {**options, "output": "latents"}


def make_flux3():
    transformer = Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, joint_attention_dim=DIM, axes_dims_rope=(4, 4, 4, 4), **BLOCKS
    )
    return assemble(Flux3CoreDenoiseStep(), transformer)


def flux3_call(steps, wide, dtype):
    return {**call(steps, wide, dtype), **texts(2, DIM, dtype)}


def make_flux():
    transformer = FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=DIM, pooled_projection_dim=DIM, axes_dims_rope=ROTARY, **BLOCKS
    )
    return assemble(FluxCoreDenoiseStep(), transformer)


def flux_call(steps, wide, dtype):
    embeds = texts(2, DIM, dtype)["prompt_embeds"]
    pooled = numbers(2, DIM, seed=3, dtype=dtype)
    return {**call(steps, wide, dtype), "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


CASES = {
    "FLUX.3, modular": Case(make_flux3, flux3_call, tokens=96),
    "FLUX.1, modular": Case(make_flux, flux_call, tokens=96),
}
