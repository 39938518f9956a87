"""How a pipeline of diffusers is put together that none of the cases has the parts of, and called.

`every_pipeline.py` takes the recipes of all `recipes_*.py` beside it: `RECIPES`, by the name of the pipeline's class.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from case import Case
from conftest import tiny_vae


@dataclass(frozen=True)
class Recipe:
    """A tiny pipeline and its call.

    Attributes:
        make: the pipeline with random weights, its progress bar off.
        call: arguments of a call: a generator of its own each time, or what else makes it repeat itself.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]


Parts = Callable[[], dict[str, Any]]


def family(
    case: Case, given: dict[str, Any], parts: Parts = dict, wrap: Callable = lambda cls: cls, **pipelines: Any
) -> dict[str, Recipe]:
    """Recipes of `pipelines`, by name, each with what it alone is called with.

    Args:
        given: what all are called with.
        wrap: class -> class.
        case, parts: as in `like`.
    """
    return {
        name: like(case, wrap(getattr(diffusers, name)), parts, **{**given, **own})
        for name, own in pipelines.items()
    }


def like(case: Case, pipeline: type, parts: Parts = dict, **given: Any) -> Recipe:
    """A pipeline of the parts of a case of the same denoiser and of its own `parts`, called as that and with what is
    `given` (functions are called for each call; None: the argument is left out). Parts whose names begin with "_" are
    attributes."""

    def make() -> Any:
        own = parts()
        pipe = assemble(pipeline, {**case.make().components, **own})
        for name, value in own.items():
            if name.startswith("_"):
                setattr(pipe, name[1:], value)
        return pipe

    def call() -> dict[str, Any]:
        names = {name for name in inspect.signature(pipeline.__call__).parameters if name not in given}
        shared = case.call(steps=10, wide=False, dtype=torch.float32).items()
        own = {name: value for name, value in given.items() if value is not None}
        return {
            **{name: value for name, value in shared if name in names},
            **{name: value() if callable(value) else value for name, value in own.items()},
        }

    return Recipe(make, call)


def first_prompt(case: Case) -> dict[str, Any]:
    """Of a case's call what is there for each prompt, for one of them."""
    call = case.call(steps=10, wide=False, dtype=torch.float32).items()
    return {name: value[:1] for name, value in call if "prompt" in name and isinstance(value, torch.Tensor)}


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
