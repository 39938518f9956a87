"""Patterns of the textured world: what covers its grounds and shapes, anti-aliased at any size.

Legend: P patterns, H, W pixels, B images.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .world import PATTERNS

# Periods per image. 32 periods are one a token at 256 px.
GROUND_PERIODS, FILL_PERIODS = (5.0, 22.0), (10.0, 24.0)
GROUND_VALUE = (0.38, 0.73)  # well inside what the detector takes for ground
PLAIN_SHARE = 0.15  # of the grounds: a strong gradient and no pattern
FILLED_SHARE = 0.6  # of the shapes
DARKER = (0.12, 0.26)  # what a pattern takes from a shape's brightness; more turns one colour into another


def shade(pattern_P4: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
    """(P, 4) patterns as `Scenes.pattern_B4` has them → (P, H, W) in [0, 1] at the pixels x (1, W), y (H, 1)."""
    kind, periods, angle, phase = (column[:, None, None] for column in pattern_P4.unbind(1))
    u = (x * angle.cos() + y * angle.sin()) * periods + phase
    v = (y * angle.cos() - x * angle.sin()) * periods + phase
    pixel = periods / size  # in periods
    out = torch.zeros(len(pattern_P4), size, size, device=x.device)
    for index, draw in enumerate((_stripes, _checks, _dots, _lines, _waves, _mottled), 1):
        (rows,) = (kind[:, 0, 0] == index).nonzero(as_tuple=True)
        if len(rows):
            out[rows] = draw(u[rows], v[rows], pixel[rows])
    return out


def _edge(inside: torch.Tensor, pixel: torch.Tensor) -> torch.Tensor:
    """Distance into the dark part, in periods → its share of the pixel."""
    return (0.5 + inside / pixel).clamp(0, 1)


def _from_middle(u: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest whole number."""
    return (u - u.round()).abs()


def _stripes(u, v, pixel):
    return _edge(0.25 - _from_middle(u), pixel)


def _checks(u, v, pixel):
    a, b = _stripes(u / 2, v, pixel / 2), _stripes(v / 2, u, pixel / 2)
    return a * (1 - b) + b * (1 - a)


def _dots(u, v, pixel):
    return _edge(0.3 - torch.hypot(_from_middle(u), _from_middle(v)), pixel)


def _lines(u, v, pixel):
    """A net of thin lines: an eighth of a period each, and never thinner than a pixel and a half."""
    half = torch.maximum(torch.full_like(pixel, 0.0625), 0.75 * pixel)
    return _edge(half - torch.minimum(_from_middle(u), _from_middle(v)), pixel)


def _waves(u, v, pixel):
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (u + 0.3 * torch.sin(math.pi * v)))


def _mottled(u, v, pixel):
    """Four sines in directions and at frequencies that have no common period."""
    total = torch.zeros_like(u)
    for turn, (a, b) in enumerate(((0.31, 0.17), (-0.23, 0.41), (0.53, -0.37), (0.61, 0.71))):
        total = total + torch.sin(2 * math.pi * (a * u + b * v) + 2.4 * turn * (1 + u.new_tensor(turn)))
    return (0.5 + total / 5).clamp(0, 1)


def draw_textures(
    rng: np.random.Generator, tint_B2_3: np.ndarray, slots: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ground colours (B, 2, 3), ground patterns (B, 4) and fills (B, M, 5); see `Scenes`."""
    batch, (low, high) = slots[0], GROUND_VALUE
    # The two colours of a ground are at least a fifth of the whole range of brightness apart.
    first = rng.uniform(low, high, batch)
    apart = rng.uniform(0.2, 1, batch) * np.where(first > (low + high) / 2, low - first, high - first)
    ground = np.stack([first, first + apart], 1)[..., None] + tint_B2_3
    pattern = _draw(rng, (batch,), GROUND_PERIODS, 1 - PLAIN_SHARE)
    fill = _draw(rng, slots, FILL_PERIODS, FILLED_SHARE)
    return ground, pattern, np.concatenate([fill, rng.uniform(*DARKER, (*slots, 1))], -1)


def _draw(
    rng: np.random.Generator, shape: tuple[int, ...], periods: tuple[float, float], share: float
) -> np.ndarray:
    kind = rng.integers(1, len(PATTERNS), shape) * (rng.random(shape) < share)
    low, high = (math.log(p) for p in periods)
    frequency = np.exp(rng.uniform(low, high, shape))
    return np.stack([kind, frequency, rng.uniform(0, math.pi, shape), rng.random(shape)], -1)
