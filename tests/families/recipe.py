"""How a pipeline of diffusers is put together that none of the cases has the parts of, and called.

`every_pipeline.py` takes the recipes of all `recipes_*.py` beside it: `RECIPES`, by the name of the pipeline's class.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from case import Case
from conftest import randomise, tiny_vae
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)


@dataclass(frozen=True)
class Recipe:
    """A tiny pipeline and its call.

    Attributes:
        make: the pipeline with random weights, its progress bar off.
        call: arguments of a call: a generator of its own each time, or what else makes it repeat itself.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]


def like(case: Case, pipeline: type, parts: Callable[[], dict[str, Any]] = dict, **given: Any) -> Recipe:
    """A pipeline of the parts of a case of the same denoiser, and its own `parts`; called as that, with what else is
    `given` (functions are called for each call). Parts whose names begin with "_" are attributes."""

    def make() -> Any:
        own = parts()
        pipe = assemble(pipeline, {**case.make().components, **own})
        for name, value in own.items():
            if name.startswith("_"):
                setattr(pipe, name[1:], value)
        return pipe

    def call() -> dict[str, Any]:
        own = {name: value() if callable(value) else value for name, value in given.items()}
        names = inspect.signature(pipeline.__call__).parameters
        shared = case.call(steps=10, wide=False, dtype=torch.float32).items()
        return {**{name: value for name, value in shared if name in names}, **own}

    return Recipe(make, call)


def first_prompt(case: Case) -> dict[str, Any]:
    """Of a case's call what is there for each prompt, for one of them."""
    call = case.call(steps=10, wide=False, dtype=torch.float32).items()
    return {name: value[:1] for name, value in call if "prompt" in name and isinstance(value, torch.Tensor)}


class Letters:
    """In place of a tokenizer: a number for each letter."""

    model_max_length = 16
    added_tokens_encoder = MappingProxyType({})

    def __call__(self, text: str | list[str], max_length: int | None = None, **options: Any) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        length = min(max_length or 16, 16)
        rows = [([1 + ord(letter) % 30 for letter in one[: length - 1]] + [31]) for one in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
        return ["".join(chr(96 + int(i)) for i in row) for row in ids]


def tiny_clip(width: int = 32, projected: bool = False) -> Any:
    """A CLIP text encoder for `Letters`."""
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=31,
        pad_token_id=0,
    )
    return randomise((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), 5)


def tiny_t5(width: int = 32) -> Any:
    """A T5 encoder for `Letters`."""
    config = T5Config(
        vocab_size=32, d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return randomise(T5EncoderModel(config), 6)


def of(case: Case) -> Recipe:
    """A case, which is a pipeline of the class itself."""
    return Recipe(case.make, lambda: case.call(steps=10, wide=False, dtype=torch.float32))


def assemble(cls: type, parts: dict[str, Any]) -> Any:
    given = {}
    denoiser = parts.get("transformer", parts.get("unet"))
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in ("self", "args", "kwargs"):
            continue
        if name == "controlnet" and name not in parts:
            given[name] = controlnet(cls, denoiser)
        elif name == "vae":
            given[name] = parts.get(name) or tiny_vae()
            if getattr(given[name].config, "shift_factor", 0) is None:
                given[name].register_to_config(shift_factor=0.0)
        elif name in parts:
            given[name] = parts[name]
        elif name in ("requires_safety_checker", "add_watermarker"):
            given[name] = False
        elif parameter.default is parameter.empty:
            given[name] = None
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(cls: type, denoiser: Any) -> Any:
    for kind in classes_of(cls, "controlnet"):
        if hasattr(kind, "from_unet"):
            return kind.from_unet(denoiser, conditioning_embedding_out_channels=(16, 16))
        if hasattr(kind, "from_transformer"):
            names = set(inspect.signature(kind.from_transformer).parameters) & {
                *("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads"),
            }
            return kind.from_transformer(denoiser, **{name: denoiser.config[name] for name in names})
    raise ValueError("no control network of a kind that can be made from the denoiser")


def classes_of(cls: type, parameter: str) -> list[type]:
    try:
        hint = typing.get_type_hints(cls.__init__).get(parameter)
    except NameError:
        hint = inspect.signature(cls.__init__).parameters[parameter].annotation
    return [
        one for one in (typing.get_args(hint) or (hint,)) if inspect.isclass(one) and one is not type(None)
    ]
