"""Side-by-side pictures: what people look at before they look at numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .picture_files import load_picture

_MARGIN, _TEXT = 12, 15
_INK, _FAINT, _PAPER = (28, 28, 30), (110, 110, 115), (255, 255, 255)


@dataclass(frozen=True)
class Column:
    """One column of the picture: its title ("plain"), a line under it ("5.2 s per image"), its images."""

    title: str
    note: str
    images: torch.Tensor


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) float in [0, 1] → PIL."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def save_png(image: Image.Image, file: Path, notes: Mapping[str, str] | None = None) -> None:
    """A PNG with text fields; the file is there whole or not at all."""
    fields = PngInfo()
    for key, value in (notes or {}).items():
        fields.add_itxt(key, value)
    part = file.with_name(f".{file.stem[:200]}.part")  # beside it, so that moving it is one step
    image.save(part, format="PNG", pnginfo=fields)
    part.replace(file)


def save_pngs(folder: Path, pictures_PCHW: torch.Tensor) -> None:
    """uint8 pictures as 000.png, 001.png, ...; each file is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures_PCHW):
        save_png(to_pil(picture.float() / 255), folder / f"{number:03d}.png")


def load_pngs(folder: Path, count: int) -> torch.Tensor | None:
    """`count` of those, (count, 3, H, W) uint8; None: not all are there."""
    files = [folder / f"{number:03d}.png" for number in range(count)]
    return torch.stack([load_picture(file) for file in files]) if all(f.exists() for f in files) else None


def _fit(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    # One line (PIL cannot measure several), and no longer than can be seen: a letter takes a pixel at least.
    text = " ".join(text.split())[: width + 1]
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def side_by_side(
    prompts: Sequence[str], columns: Sequence[Column], path: Path, notes: Mapping[str, str] | None = None
) -> None:
    """One row per prompt, one column per way of generating it; the prompt stands above its row.

    Args:
        notes: text fields of the PNG.
    """
    height, width = columns[0].images.shape[-2:]
    font, small = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT - 2)
    line = _TEXT + 7
    top = _MARGIN + 2 * line + 4
    row_height = line + height + _MARGIN
    total = _MARGIN + len(columns) * (width + _MARGIN)
    sheet = Image.new("RGB", (total, top + len(prompts) * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns):
        x = _MARGIN + index * (width + _MARGIN)
        draw.text((x, _MARGIN), _fit(draw, column.title, font, width), _INK, font)
        draw.text((x, _MARGIN + line), _fit(draw, column.note, small, width), _FAINT, small)
        for row in range(len(prompts)):
            sheet.paste(to_pil(column.images[row]), (x, top + row * row_height + line))
    for row, prompt in enumerate(prompts):
        draw.text(
            (_MARGIN, top + row * row_height), _fit(draw, prompt, small, total - 2 * _MARGIN), _INK, small
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, path, notes)
