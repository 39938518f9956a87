"""Tiny pipelines with random weights, built from configurations: nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from accel.core.around import Around

TEXT_TOKENS, FLUX_DIM, PIXART_DIM = 7, 32, 16


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of a size that makes every block matter: diffusers' initial ones leave gates near zero, and a
    wrong rotary table would then hide below the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if parameter.ndim <= 1 else 1.2 / parameter[0].numel() ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            # Gains of norms well above 0, or queries and keys vanish and attention sees no positions.
            parameter.copy_(
                noise + 1.5 if "norm" in name and name.endswith("weight") and noise.ndim == 1 else noise
            )
    return module.eval().requires_grad_(False)


def tiny_vae(channels: int = 4, levels: int = 2) -> AutoencoderKL:
    """Halves the size between its levels."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return randomise(vae, 1)


def make_flux(dual: int = 2, single: int = 3) -> FluxPipeline:
    """2 dual-stream and a few single-stream blocks; the VAE halves the size, packing halves it again."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=dual,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FLUX_DIM,
        pooled_projection_dim=FLUX_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=randomise(transformer, 0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pixart(blocks: int = 3) -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=PIXART_DIM,
        sample_size=32,
        patch_size=2,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        transformer=randomise(transformer, 0),
        scheduler=DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(batch: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, TEXT_TOKENS, dim, generator=torch.Generator().manual_seed(seed))


def flux_call(
    batch: int = 1, height: int = 32, width: int = 48, steps: int = 6, guidance: float = 1.0, **extra
):
    """Arguments of a FluxPipeline call: 8 x 12 tokens, guidance > 1 makes two calls a step."""
    call = {
        "prompt_embeds": embeds(batch, FLUX_DIM, 2),
        "pooled_prompt_embeds": embeds(batch, FLUX_DIM, 3)[:, 0],
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "output_type": "latent",
        "true_cfg_scale": guidance,
        "generator": torch.Generator().manual_seed(5),
    }
    if guidance > 1:
        call["negative_prompt_embeds"] = embeds(batch, FLUX_DIM, 4)
        call["negative_pooled_prompt_embeds"] = embeds(batch, FLUX_DIM, 6)[:, 0]
    return {**call, **extra}


def pixart_call(
    batch: int = 1, height: int = 32, width: int = 48, steps: int = 6, guidance: float = 1.0, **extra
):
    """Arguments of a PixArtSigmaPipeline call: 8 x 12 tokens, guidance > 1 doubles the batch."""
    mask = torch.ones(batch, TEXT_TOKENS)
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": embeds(batch, PIXART_DIM, 2),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds(batch, PIXART_DIM, 4),
        "negative_prompt_attention_mask": mask,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "use_resolution_binning": False,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
        **extra,
    }


class Watch(Around):
    """Tells `seen(args, kwargs, output)` what a module is asked from outside, and what its caller gets."""

    def __init__(self, module, seen):
        super().__init__(module)
        self.seen = seen

    def around(self, args, kwargs):
        output = self.call(*args, **kwargs)
        self.seen(args, kwargs, output)
        return output

    def __enter__(self):
        self.install()
        return self

    def __exit__(self, *exc):
        self.remove()


def freeze(pipe):
    """The denoiser sees the inputs of its first step at every step."""
    first = {}

    def repeat(module, args, kwargs):
        # PixArt passes its latents by position, Hunyuan-DiT its time, too.
        kwargs = {**kwargs, **dict(zip(("hidden_states", "timestep"), args, strict=False))}
        now = {k: kwargs[k] for k in ("hidden_states", "timestep")}
        return (), {**kwargs, **first.setdefault("inputs", now)}

    return pipe.transformer.register_forward_pre_hook(repeat, with_kwargs=True)


def log_snr(scheduler) -> list[float]:
    """What forecasts run along, written out for the schedulers of the families here."""
    if hasattr(scheduler, "sigmas"):
        noise = scheduler.sigmas[:-1].double()
    else:
        kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
        noise = (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())
    noise = noise * (1 - 2e-5) + 1e-5
    return (1 / noise - 1).log().tolist()


class Family:
    """A model family under test: one line in `FAMILIES` adds it to every adapter test."""

    def __init__(self, make, call, odd: dict[str, int], shallow: dict[str, int]) -> None:
        self.make, self.call = make, call
        self.shallow = (
            shallow  # as few blocks as a span with an entry and an exit needs: compiling takes time
        )
        self.odd = odd  # the least regular size that the pipeline accepts

    def latents(self, pipe, **options) -> torch.Tensor:
        return pipe(**self.call(**options)).images


FAMILIES = {
    "flux": Family(make_flux, flux_call, odd={"height": 20, "width": 28}, shallow={"dual": 1, "single": 2}),
    "pixart": Family(make_pixart, pixart_call, odd={"height": 24, "width": 40}, shallow={"blocks": 3}),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]
