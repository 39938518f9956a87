"""Batched renderer: analytic signed distances, anti-aliased, softly shaded, on grounds of two colours.

Works on any device and at any size. Objects of one shape are drawn together, so the cost is one signed
distance per object and pixel; nothing is drawn for empty slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .patterns import shade
from .world import SHAPES, Scenes, palette

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _circle(x, y):
    return torch.hypot(x, y) - 1


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x, y):
    side = math.sqrt(0.75) * x.abs() - 0.5 * y
    return torch.maximum(side, y) - 0.60


def _star(x, y):
    """Five points: fold the plane into half a ray, then one straight edge from tip to notch."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    rho = torch.hypot(x, y)
    px, py = rho * folded.cos(), rho * folded.sin()
    tip, notch = 1.15, 0.50
    ex, ey = notch * math.cos(sector / 2) - tip, notch * math.sin(sector / 2)
    return (ex * py - ey * (px - tip)) / -math.hypot(ex, ey)


def _heart(x, y):
    """A square on its corner and a disc on each upper edge."""
    half = 0.60
    y = y - 0.12
    u, v = (x + y) / math.sqrt(2), (y - x) / math.sqrt(2)
    body = torch.maximum(u.abs(), v.abs()) - half
    lobes = torch.minimum(torch.hypot(u + half, v), torch.hypot(u, v + half)) - half
    return torch.minimum(body, lobes)


def _cross(x, y):
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 1, torch.minimum(x, y) - 0.34)


def _ring(x, y):
    return (torch.hypot(x, y) - 0.74).abs() - 0.28


def _moon(x, y):
    return torch.maximum(torch.hypot(x, y) - 1.05, 0.85 - torch.hypot(x - 0.58, y))


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}
assert tuple(DISTANCES) == SHAPES


def pixel_grid(size: int, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres in fractions of the image: x (1, W) and y (H, 1)."""
    centers = (torch.arange(size, device=device) + 0.5) / size
    return centers[None, :], centers[:, None]


def object_coverage(scenes: Scenes, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws every object alone.

    Returns:
        image (O,): the image each object belongs to; slot (O,): its slot there; and coverage (O, H, W)
        in [0, 1], the anti-aliased share of each pixel that the object fills. Objects come grouped by
        shape.
    """
    x, y = pixel_grid(size, scenes.shape_BM.device)
    images, slots, covers = [], [], []
    for index, distance in enumerate(DISTANCES.values()):
        image, slot = (scenes.shape_BM == index).nonzero(as_tuple=True)
        if len(image) == 0:
            continue
        center = scenes.center_BM2[image, slot]
        radius = scenes.radius_BM[image, slot][:, None, None]
        angle = scenes.angle_BM[image, slot][:, None, None]
        dx, dy = x - center[:, 0, None, None], y - center[:, 1, None, None]
        cos, sin = angle.cos() / radius, angle.sin() / radius
        signed = distance(dx * cos - dy * sin, dx * sin + dy * cos)
        half = scenes.stroke_BM[image, slot][:, None, None] / radius
        signed = torch.where(half > 0, signed.abs() - half, signed)
        images.append(image)
        slots.append(slot)
        covers.append((0.5 - signed * (radius * size)).clamp_(0, 1))
    if not images:
        empty = scenes.shape_BM.new_zeros(0)
        return empty, empty, scenes.center_BM2.new_zeros(0, size, size)
    return torch.cat(images), torch.cat(slots), torch.cat(covers)


def edges_and_ground(scenes: Scenes, side: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, cells, cells) bool each: the squares of `side` pixels through which an outline of an object goes, and those that
    no object touches."""
    image_O, _, cover_OHW = object_coverage(scenes, side * cells)
    edge_BHW = torch.zeros(len(scenes), cells, cells, dtype=torch.bool, device=cover_OHW.device)
    touched_BHW = edge_BHW.clone()
    for image, cover_HW in zip(image_O.tolist(), cover_OHW, strict=True):
        squares = cover_HW.unflatten(0, (cells, side)).unflatten(2, (cells, side))
        high, low = squares.amax((1, 3)), squares.amin((1, 3))
        edge_BHW[image] |= (high >= 0.5) & (low < 0.5)
        touched_BHW[image] |= high > 0
    return edge_BHW, ~touched_BHW


def _ground(scenes: Scenes, size: int) -> torch.Tensor:
    x, y = pixel_grid(size, scenes.shape_BM.device)
    direction = scenes.gradient_B[:, None, None]
    blend = (0.5 + ((x - 0.5) * direction.cos() + (y - 0.5) * direction.sin()) / math.sqrt(2)).clamp(0, 1)
    fx, fy, phase, amplitude = (t[:, None, None] for t in scenes.texture_B4.unbind(1))
    wave = amplitude * torch.sin(2 * math.pi * (fx * x + fy * y) + phase)
    patterned = (scenes.pattern_B4[:, 0] > 0).nonzero()[:, 0]
    if len(patterned):
        mix = shade(scenes.pattern_B4[patterned], x, y, size)
        # Fades along the gradient, so that one picture has both strong and weak contrast.
        blend[patterned] = 0.5 + (mix - 0.5) * (0.35 + 0.65 * blend[patterned])
    first, second = scenes.ground_B2_3[:, 0, :, None, None], scenes.ground_B2_3[:, 1, :, None, None]
    return first + (second - first) * blend[:, None] + wave[:, None]


def render(scenes: Scenes, size: int = 256) -> torch.Tensor:
    """Renders a batch: (B, 3, size, size) float32 RGB in [0, 1]."""
    out = _ground(scenes, size)
    image, slot, cover = object_coverage(scenes, size)
    if len(image) == 0:
        return out.clamp_(0, 1)
    # Light from the upper left: brighter there, darker at the lower right, by a tenth.
    x, y = pixel_grid(size, out.device)
    center, radius = scenes.center_BM2[image, slot], scenes.radius_BM[image, slot]
    slope = ((x - center[:, 0, None, None]) + (y - center[:, 1, None, None])) / radius[:, None, None]
    light = 1 - 0.08 * slope.clamp_(-1.5, 1.5)
    color = palette(out.device)[scenes.color_BM[image, slot]]
    filled = (scenes.fill_BM5[image, slot, 0] > 0).nonzero()[:, 0]
    if len(filled):
        fill = scenes.fill_BM5[image[filled], slot[filled]]
        light[filled] *= 1 - fill[:, 4, None, None] * shade(fill[:, :4], x, y, size)
    # Objects do not overlap, so compositing is a sum, and its order does not matter.
    shares = torch.zeros_like(out[:, 0]).index_add_(0, image, cover)
    out *= (1 - shares.clamp_(0, 1))[:, None]
    for channel in range(3):
        out[:, channel].index_add_(0, image, cover * light * color[:, channel, None, None])
    return out.clamp_(0, 1)
