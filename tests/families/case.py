"""What a family gives to the conformance suite."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

#: All that is tried here is in it.
NEWEST = (0, 42)


def of_all(pattern: str, name: str) -> dict[str, Any]:
    """What the modules beside this one whose files match `pattern` have of that `name`, put together; without those of
    models that an older diffusers does not have."""
    found: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob(pattern)):
        try:
            found |= getattr(importlib.import_module(path.stem), name)
        except ImportError as error:
            have = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
            if have >= NEWEST or not (error.name or "").startswith("diffusers"):
                raise
    return found


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of a family.

    Attributes:
        make: a pipeline with random weights of a size that makes every block matter (`conftest.randomise`), its
            progress bar off.
        call: (steps, wide, dtype) -> arguments of a call with guidance on and `batch` images, latents as output; `wide`
            is another size, which is no square.
        tokens: image tokens of one image at the usual size.
        batch: images of a call.
        references: tokens of reference images, at the usual size.
        steps: how many show every form of its calls (a pipeline that keeps keys and values: two).
        positions: where positions come from: "sides" travel along (rotary tables), or they are "added" at the entry.
    """

    make: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    tokens: int
    batch: int = 2
    references: int = 0
    steps: int = 1
    positions: Literal["sides", "added"] = "sides"

    def latents(
        self, pipe: Any, steps: int, wide: bool = False, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        output = pipe(**self.call(steps=steps, wide=wide, dtype=dtype))
        if isinstance(output, torch.Tensor):  # of a modular pipeline
            return output
        out = output.images if hasattr(output, "images") else output.image  # Kandinsky 5's name
        return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal random numbers, the same for the same seed: text embeddings of tiny pipelines."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def texts(batch: int, dim: int, dtype: torch.dtype, length: int = 7) -> dict[str, torch.Tensor]:
    """Embeddings of prompts and negative prompts, as most pipelines call them."""
    return {
        "prompt_embeds": numbers(batch, length, dim, seed=2, dtype=dtype),
        "negative_prompt_embeds": numbers(batch, length, dim, seed=4, dtype=dtype),
    }


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def common(steps: int, wide: bool, token: int, grid: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    """What all calls have: a size of 8 x 12 tokens, or 8 x 24, with tokens of `token` pixels; latents as output."""
    rows, columns = grid
    return {
        "height": rows * token,
        "width": (2 if wide else 1) * columns * token,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
    }
