"""The vocabulary of Scenes and the batch of scenes that everything else passes around.

Coordinates are fractions of the image: x to the right, y down, (0, 0) the top left corner.

Legend for shape suffixes: B images, M = `MAX_OBJECTS` object slots, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from accel.evaluation.geneval.metadata import RELATIONS as RELATIONS

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PLURALS = ("circles", "squares", "triangles", "stars", "hearts", "crosses", "rings", "moons")

# GenEval's ten colours, in its order. The grounds are mid-tone and nearly grey (`layout.py`), so that
# all ten, black and white included, stand out from them.
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.53, 0.02),
    "yellow": (0.98, 0.88, 0.12),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "purple": (0.50, 0.14, 0.72),
    "pink": (1.00, 0.56, 0.76),
    "brown": (0.44, 0.25, 0.09),
    "black": (0.05, 0.05, 0.06),
    "white": (0.97, 0.97, 0.96),
}
COLOR_NAMES = tuple(COLORS)
# Worlds: "flat" has soft grounds and plain shapes; "textured" has patterned and graded grounds, patterned shapes,
# and three more words, for detail: shapes at two smaller scales, and shapes drawn as an outline.
WORLDS = ("flat", "textured")
PATTERNS = ("none", "stripes", "checks", "dots", "lines", "waves", "mottled")
SCALES = ("small", "tiny", "thin")
NUMBERS = ("zero", "one", "two", "three", "four")
MAX_OBJECTS = 4


def words() -> list[str]:
    """Every word of the flat world's captions, sorted: what a tokenizer of it must know."""
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return sorted(
        {"a", "an", "photo", "of", "and", *relation_words, *COLOR_NAMES, *SHAPES, *PLURALS, *NUMBERS}
    )


def palette(device: torch.device | str | None = None) -> torch.Tensor:
    """(10, 3) RGB in [0, 1], in the order of `COLOR_NAMES`."""
    return torch.tensor([COLORS[name] for name in COLOR_NAMES], device=device)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as tensors; empty object slots have `shape_BM == -1`.

    Attributes:
        shape_BM: int64, index into `SHAPES`, or -1.
        color_BM: int64, index into `COLOR_NAMES`.
        center_BM2: float, (x, y) in fractions of the image.
        radius_BM: float, in fractions of the image side.
        angle_BM: float, radians, counter-clockwise.
        ground_B2_3: float, the two RGB colours that the ground blends between, (B, 2, 3).
        gradient_B: float, direction of that blend, radians.
        texture_B4: float, (x frequency, y frequency, phase, amplitude) of the ground's soft wave.
        pattern_B4: float, (index into `PATTERNS`, periods per image, angle, phase) of the ground's pattern, which
            then says where the ground has which of its two colours.
        fill_BM5: float, the same of each shape, and how much darker its pattern makes it, in [0, 1].
        stroke_BM: float, half the width of an outline in fractions of the image; 0: the shape is filled.
    """

    shape_BM: torch.Tensor
    color_BM: torch.Tensor
    center_BM2: torch.Tensor
    radius_BM: torch.Tensor
    angle_BM: torch.Tensor
    ground_B2_3: torch.Tensor
    gradient_B: torch.Tensor
    texture_B4: torch.Tensor
    pattern_B4: torch.Tensor
    fill_BM5: torch.Tensor
    stroke_BM: torch.Tensor

    def __len__(self) -> int:
        return self.shape_BM.shape[0]

    def __getitem__(self, index: slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    @staticmethod
    def cat(batches: list[Scenes]) -> Scenes:
        return Scenes(*(torch.cat([getattr(b, f.name) for b in batches]) for f in fields(Scenes)))
