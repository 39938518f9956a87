"""Pipelines whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

import diffusers
from PIL import Image
from recipe import Recipe, like
from tiny_flux_like import CASES as FLUX_LIKE

SIZE = {"height": 32, "width": 48}


def picture() -> Image.Image:
    """Of a colour that changes from left to right."""
    return Image.linear_gradient("L").convert("RGB").rotate(90).resize((48, 32))


def mask() -> Image.Image:
    """The left half is to be painted."""
    image = Image.new("L", (48, 32), 0)
    image.paste(255, (0, 0, 24, 32))
    return image


def chroma_inpaint() -> dict[str, Any]:
    """Its denoiser with what the pipeline reads of its configuration and the model's class has no setting for."""
    transformer = FLUX_LIKE["Chroma"].make().transformer
    transformer.register_to_config(guidance_embeds=False)
    return {"transformer": transformer}


RECIPES: dict[str, Recipe] = {
    "ChromaInpaintPipeline": like(
        FLUX_LIKE["Chroma"],
        diffusers.ChromaInpaintPipeline,
        chroma_inpaint,
        image=picture,
        mask_image=mask,
        strength=0.9,
        **SIZE,
    ),
}
