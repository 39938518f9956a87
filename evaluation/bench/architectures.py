"""Denoisers of the real shapes with random weights, in their pipelines without text encoders and autoencoders.

Shapes are data: what the published config.json of the named checkpoint says, or diffusers' defaults where they are the
same. Random weights tell how long a step takes, and nothing about pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnknownNameError

BUILTIN = "builtin"
_STD = 0.5  # times 1/sqrt(fan-in): activations neither vanish nor overflow in bfloat16
_TINY_DIM = 32


@dataclass(frozen=True)
class Architecture:
    """A family's denoiser as published.

    Attributes:
        checkpoint: whose shapes these are.
        transformer, pipeline: class names in diffusers.
        config: what differs from the transformer's defaults.
        tiny: what to replace by, for a model that runs anywhere in no time.
        embeds: argument of the call -> shape of one prompt's embedding; a last size of 0 is the text's width.
        text: name of the configuration's entry that holds the text's width.
        call: further arguments, guidance as the checkpoint is used among them.
        listed: embeddings are given as a list of one tensor per prompt.
        masks: arguments that say which tokens of a text are no padding.
        pixels: side of a token in pixels.
        calls: of the denoiser in a step.
    """

    checkpoint: str
    transformer: str
    pipeline: str
    tiny: Mapping[str, Any]
    embeds: Mapping[str, tuple[int, ...]]
    text: str
    config: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    listed: bool = False
    masks: tuple[str, ...] = ()
    pixels: int = 16
    calls: int = 1


_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": _TINY_DIM}
_DUAL_SINGLE = {"num_layers": 2, "num_single_layers": 3, **_HEADS}

ARCHITECTURES = {
    "flux1": Architecture(
        "FLUX.1-dev",
        "FluxTransformer2DModel",
        "FluxPipeline",
        config={"guidance_embeds": True},
        tiny={**_DUAL_SINGLE, "pooled_projection_dim": _TINY_DIM, "axes_dims_rope": (4, 6, 6)},
        embeds={"prompt_embeds": (512, 0), "pooled_prompt_embeds": (768,)},
        text="joint_attention_dim",
        call={"guidance_scale": 3.5},
    ),
    "flux2": Architecture(
        "FLUX.2-dev",
        "Flux2Transformer2DModel",
        "Flux2Pipeline",
        tiny={**_DUAL_SINGLE, "axes_dims_rope": (4, 4, 4, 4)},
        embeds={"prompt_embeds": (512, 0)},
        text="joint_attention_dim",
        call={"guidance_scale": 4.0},
    ),
    "qwen": Architecture(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        "QwenImagePipeline",
        tiny={**_HEADS, "num_layers": 4, "axes_dims_rope": (4, 6, 6)},
        embeds={"prompt_embeds": (128, 0), "negative_prompt_embeds": (128, 0)},
        text="joint_attention_dim",
        call={"true_cfg_scale": 4.0},
        masks=("prompt_embeds_mask", "negative_prompt_embeds_mask"),
        calls=2,
    ),
    "zimage": Architecture(
        "Z-Image-Turbo",
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        config={"axes_lens": [1536, 512, 512]},
        tiny={
            **{"dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
            **{"cap_feat_dim": _TINY_DIM, "axes_dims": [4, 6, 6]},
        },
        embeds={"prompt_embeds": (128, 0)},
        text="cap_feat_dim",
        call={"guidance_scale": 0.0},
        listed=True,
    ),
    "sd3": Architecture(
        "Stable Diffusion 3.5 large",
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        config={
            **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
            **{"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        },
        tiny={**_HEADS, "num_layers": 4, "caption_projection_dim": 32, "pooled_projection_dim": _TINY_DIM},
        embeds={
            **{"prompt_embeds": (333, 0), "negative_prompt_embeds": (333, 0)},
            **{"pooled_prompt_embeds": (2048,), "negative_pooled_prompt_embeds": (2048,)},
        },
        text="joint_attention_dim",
        call={"guidance_scale": 4.5},
    ),
}


@dataclass(frozen=True)
class Model:
    """A pipeline and what to call it with.

    Attributes:
        name: of its architecture.
        title: whose shapes it has.
        pipe: a diffusers pipeline.
        arguments: of its calls, but size and steps.
        pixels: side of a token in pixels.
    """

    name: str
    title: str
    pipe: Any
    arguments: Mapping[str, Any]
    pixels: int

    def tokens(self, size: int) -> int:
        """Of a square image with sides of `size` pixels."""
        return (size // self.pixels) ** 2


def calls(name: str) -> int:
    """Of a denoiser in a step: 2 where guidance is two calls.

    Raises:
        UnknownNameError: no such architecture.
    """
    if name == BUILTIN:
        return 2
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, (*ARCHITECTURES, BUILTIN))
    return ARCHITECTURES[name].calls


def build(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Model:
    """A model by name: a key of `ARCHITECTURES`, or the built-in one with its trained weights.

    Args:
        tiny: a few narrow blocks in place of the real shapes, to try a bench out.
    """
    import diffusers

    if name == BUILTIN:
        return _builtin(device, dtype)

    own = ARCHITECTURES[name]
    config = {**own.config, **(own.tiny if tiny else {})}
    transformer = random_weights(getattr(diffusers, own.transformer), config, device, dtype)
    parts: dict[str, Any] = dict.fromkeys(_parts(getattr(diffusers, own.pipeline)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = getattr(diffusers, own.pipeline)(**parts | {"transformer": transformer, "scheduler": scheduler})
    return Model(name, own.checkpoint, pipe, _arguments(own, transformer, device, dtype, tiny), own.pixels)


def random_weights(
    cls: Any, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A module whose weights are made on the device in their dtype: no float32 copy of 12 B weights on the CPU.

    Buffers and tables are the model's own.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = cls(**config)
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, empty in part._parameters.items():
            if empty is not None:
                made = torch.empty(empty.shape, device=device, dtype=dtype)
                part._parameters[name] = nn.Parameter(_fill(made, name, generator), requires_grad=False)
    # Not their own `to`, which warns of modules to keep in float32: these have none.
    return nn.Module.to(module, device=device, dtype=dtype).eval()


def _fill(weight: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Matrices normal; of vectors, gains are 1 and biases 0."""
    if weight.ndim < 2:
        return weight.fill_(0.0 if name == "bias" else 1.0)
    return weight.normal_(0, _STD / math.prod(weight.shape[1:]) ** 0.5, generator=generator)


def _parts(pipeline: Any) -> list[str]:
    import inspect

    return [name for name in inspect.signature(pipeline.__init__).parameters if name != "self"]


def _arguments(
    own: Architecture, transformer: Any, device: torch.device, dtype: torch.dtype, tiny: bool
) -> dict[str, Any]:
    width = transformer.config[own.text]
    generator = torch.Generator(device).manual_seed(1)

    def embedding(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            shape = (transformer.config["pooled_projection_dim"],)
        else:
            shape = (16 if tiny else shape[0], width)
        batch = torch.empty((1, *shape), device=device, dtype=dtype).normal_(generator=generator)
        return list(batch) if own.listed else batch

    embeds = {name: embedding(shape) for name, shape in own.embeds.items()}
    masks = {
        name: torch.ones(embeds["prompt_embeds"].shape[:2], dtype=torch.bool, device=device)
        for name in own.masks
    }
    return {**own.call, **embeds, **masks}


@torch.no_grad()
def _builtin(device: torch.device, dtype: torch.dtype) -> Model:
    from accel.pipelines import builtin

    pipe = builtin.load_pipeline(device, dtype)
    embeds: dict[str, Any] = {}
    for prefix, text in (("", "a photo of a red circle left of a blue square"), ("negative_", "")):
        tokens, pooled, _ = pipe.encode_prompt(text, text, max_sequence_length=pipe.text_tokens)
        embeds |= {f"{prefix}prompt_embeds": tokens, f"{prefix}pooled_prompt_embeds": pooled}
    return Model(BUILTIN, "the built-in model", pipe, embeds, pixels=8)
