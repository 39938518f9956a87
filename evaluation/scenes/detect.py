"""A deterministic detector for Scenes: colour classes → connected components → shape templates.

It stands where GenEval has Mask2Former and CLIP, and returns the same `Detection` records, so the same
scorer judges both. It knows the world's palette and shapes and nothing about prompts or models.

Legend: C colours, S shapes, R rotations, G the template grid's side, D detections.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from accel.evaluation.geneval.scorer import Detection

from .render import DISTANCES
from .world import COLOR_NAMES, SHAPES, palette

# Images are reduced to this side first, and smaller patches of colour are nobody's object: the smallest object drawn
# without a word of scale (a moon of radius 0.125) has 0.017 of the image, the smallest with one 0.0022.
WORK_SIZE, MIN_AREA = 128, 0.004
FINE_SIZE, FINE_AREA = 256, 0.0012
OUTLINE = 0.75  # the most of its filled shape that a thin shape's line covers
GRID = 48  # templates are compared on GRID x GRID cells
REACH = 1.35  # half the template grid's side, in units of the square root of the object's area
ROTATIONS = tuple(math.radians(a) for a in range(-20, 21, 5))
SHARPNESS = 0.02  # overlap difference that makes one shape e times as likely as another


def _srgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """(..., 3) sRGB in [0, 1] → CIELAB (D65), where distances are roughly what an eye sees."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    matrix = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], device=rgb.device
    )
    xyz = (linear @ matrix.T) / torch.tensor([0.9505, 1.0, 1.089], device=rgb.device)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


def _classify_pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) → (B, H, W) int: index into COLOR_NAMES, or −1 for ground."""
    pixels = images.permute(0, 2, 3, 1)
    colors = torch.cdist(_srgb_to_lab(pixels).flatten(1, 2), _srgb_to_lab(palette(images.device))[None])
    nearest = colors.argmin(-1).view(pixels.shape[:3])
    low, high = pixels.amin(-1), pixels.amax(-1)
    ground = (high - low < 0.16) & (high > 0.30) & (low < 0.80)
    return torch.where(ground, -1, nearest)


def _majority(classes: torch.Tensor) -> torch.Tensor:
    """3x3 vote among colours: anti-aliased rims mix with the ground and look like a third colour."""
    votes = F.one_hot(classes + 1, len(COLOR_NAMES) + 1)[..., 1:].permute(0, 3, 1, 2).float()
    winner = F.avg_pool2d(votes, 3, stride=1, padding=1).argmax(1)
    return torch.where(classes >= 0, winner, -1)


def _components(classes: np.ndarray, min_area: float) -> list[tuple[int, np.ndarray]]:
    """(colour, mask) of every connected patch of one colour in one image."""
    eight = np.ones((3, 3), int)
    found = []
    for color in np.unique(classes[classes >= 0]):
        labels, count = ndimage.label(classes == color, structure=eight)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        for index in range(1, count + 1):
            if areas[index] < min_area * classes.size:
                continue
            mask = labels == index
            if not ndimage.binary_erosion(mask, eight, border_value=1).any():
                continue  # a sliver: somebody else's rim
            found.append((int(color), mask))
    # Rim pixels that the vote gave to no patch belong to the patch they touch.
    taken = np.zeros(classes.shape, bool)
    for _, mask in found:
        taken |= mask
    free = (classes >= 0) & ~taken
    return [(color, mask | (free & ndimage.binary_dilation(mask, eight))) for color, mask in found]


def _outlined(found: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    """Outlines filled, so that they have the templates' shape; what is no closed line is left out."""
    filled = [
        (color, mask, ndimage.binary_fill_holes(ndimage.binary_dilation(mask))) for color, mask in found
    ]
    return [(color, whole) for color, mask, whole in filled if mask.sum() < OUTLINE * whole.sum()]


def _normalise(masks: torch.Tensor) -> torch.Tensor:
    """(D, H, W) masks → (D, G, G): centred on their centroid, scaled to equal area."""
    height, width = masks.shape[1:]
    area = masks.sum((1, 2)).clamp(min=1)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    cx, cy = (masks.sum(1) * x).sum(1) / area, (masks.sum(2) * y).sum(1) / area
    steps = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH
    side = area.sqrt()[:, None]
    gx = (cx[:, None] + steps * side) * 2 / width - 1
    gy = (cy[:, None] + steps * side) * 2 / height - 1
    grid = torch.stack([gx[:, None, :].expand(-1, GRID, -1), gy[:, :, None].expand(-1, -1, GRID)], -1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@functools.cache
def _templates() -> torch.Tensor:
    """(S, R, G, G) in the same normalised frame."""
    at = (torch.arange(256) + 0.5) / 128 - 1
    x, y = at[None, :] * 1.5, at[:, None] * 1.5
    masks = []
    for distance in DISTANCES.values():
        for angle in ROTATIONS:
            cos, sin = math.cos(angle), math.sin(angle)
            masks.append((distance(x * cos - y * sin, x * sin + y * cos) < 0).float())
    return _normalise(torch.stack(masks)).view(len(SHAPES), len(ROTATIONS), GRID, GRID)


def shape_overlap(masks: torch.Tensor) -> torch.Tensor:
    """(D, H, W) masks → (D, S): best intersection over union with each shape over rotations."""
    normal = _normalise(masks.float()).flatten(1)[:, None]
    flat = _templates().flatten(0, 1).flatten(1)[None]
    overlap = torch.minimum(normal, flat).sum(-1) / torch.maximum(normal, flat).sum(-1)
    return overlap.view(len(masks), len(SHAPES), -1).amax(-1)


@torch.no_grad()
def detect(images: torch.Tensor, scales: Sequence[str | None] | None = None) -> list[list[Detection]]:
    """Finds the objects in a batch of images.

    Args:
        images: (B, 3, H, W), float in [0, 1] or uint8.
        scales: per image the word of `SCALES` in its prompt, or None (the default): images of small shapes are
            looked at more finely, and in "thin" ones only outlines are shapes.

    Returns:
        Per image its detections, most confident first, boxes in the pixels of the input. Confidence is how
        much better the named shape fits than the other seven (softmax over overlaps), lowered where even
        the best overlap is under 0.8. Colour is the palette colour of most of the object's pixels.

    Raises:
        ValueError: if the shape is not (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    images = images.cpu()
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    if scales is None or not any(scales):
        return _detect(images, WORK_SIZE, MIN_AREA)
    coarse = [index for index, scale in enumerate(scales) if scale is None]
    thin = [index for index, scale in enumerate(scales) if scale == "thin"]
    fine = [index for index, scale in enumerate(scales) if scale not in (None, "thin")]
    found: dict[int, list[Detection]] = {}
    found |= zip(coarse, _detect(images[coarse], WORK_SIZE, MIN_AREA), strict=True)
    found |= zip(fine, _detect(images[fine], FINE_SIZE, FINE_AREA), strict=True)
    found |= zip(thin, _detect(images[thin], FINE_SIZE, FINE_AREA, outlines=True), strict=True)
    return [found[index] for index in range(len(images))]


def _detect(
    images: torch.Tensor, size: int, min_area: float, *, outlines: bool = False
) -> list[list[Detection]]:
    """`detect` for float images (B, 3, H, W), worked on at `size` pixels a side."""
    if len(images) == 0:
        return []
    scale_y, scale_x = images.shape[2] / size, images.shape[3] / size
    if images.shape[2:] != (size, size):
        shrinking = min(scale_x, scale_y) > 1
        images = F.interpolate(images, (size, size), mode="area" if shrinking else "bilinear")
    classes = _majority(_classify_pixels(images)).numpy()
    found: list[list[Detection]] = []
    for image in classes:
        components = _components(image, min_area)
        if outlines:
            components = _outlined(components)
        if not components:
            found.append([])
            continue
        overlap = shape_overlap(torch.from_numpy(np.stack([mask for _, mask in components])))
        best, index = overlap.max(1)
        likely = (overlap / SHARPNESS).softmax(1).amax(1)
        confidence = likely * (best / 0.8).clamp(max=1)
        detections = []
        for row, (color, mask) in enumerate(components):
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (xs[0] * scale_x, ys[0] * scale_y, (xs[-1] + 1) * scale_x, (ys[-1] + 1) * scale_y)
            detections.append(
                Detection(
                    SHAPES[int(index[row])],
                    float(confidence[row]),
                    tuple(float(edge) for edge in box),  # type: ignore[arg-type]
                    COLOR_NAMES[color],
                )
            )
        found.append(sorted(detections, key=lambda d: -d.confidence))
    return found
