"""From a GenEval-format metadata line, or from nothing, to scenes: what is there and where it stands.

Object counts, sizes and places are drawn so that the rendered image satisfies its metadata under
GenEval's rules with room to spare; whatever the metadata leaves open (colours, places) is random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from accel.evaluation.geneval.metadata import Metadata

from .patterns import draw_textures
from .split import is_held_out_pair
from .world import COLOR_NAMES, MAX_OBJECTS, RELATIONS, SCALES, SHAPES, WORLDS, Scenes

# Radius range by the number of objects. Four objects of 0.145 still measure 9 latent tokens at 256 px.
RADIUS = {1: (0.20, 0.27), 2: (0.155, 0.195), 3: (0.135, 0.165), 4: (0.125, 0.15)}
# The textured world's words, at any number. A token is 0.031 of the image wide.
SCALED = {"small": (0.075, 0.095), "tiny": (0.045, 0.06), "thin": (0.13, 0.15)}
STROKE = (0.008, 0.011)  # half a thin shape's line: 4 to 5.6 pixels of 256 across
EXTENT = 1.2  # the farthest tip of any shape (triangle), in radii
GAP = 0.03  # free ground between two objects
CANDIDATES = 64  # layouts drawn per image; the first valid one is taken


def _centers(rng: np.random.Generator, radius_BM: np.ndarray, count_B: np.ndarray, relation_B: np.ndarray):
    """Places objects apart from one another, the first in the asked relation to the second. (B, M, 2)."""
    batch, slots = radius_BM.shape
    reach = radius_BM * EXTENT
    span = 1 - 2 * reach - 0.02
    raw = rng.random((batch, CANDIDATES, slots, 2))
    centers = reach[:, None, :, None] + 0.01 + raw * span[:, None, :, None]
    delta = centers[:, :, :, None] - centers[:, :, None, :]
    distance = np.linalg.norm(delta, axis=-1)
    needed = reach[:, None, :, None] + reach[:, None, None, :] + GAP
    here = np.arange(slots)[None] < count_B[:, None]
    pair = here[:, :, None] & here[:, None, :] & np.triu(np.ones((slots, slots), bool), 1)
    # How much room the tightest pair has; maximised where no candidate is clear of all overlaps.
    room = np.where(pair[:, None], distance - needed, np.inf).min(axis=(2, 3))
    offset = delta[:, :, 0, 1]  # first object minus second
    # left, right, above, below: the offset's component along the asked direction, as a share of its length.
    along = np.stack([-offset[..., 0], offset[..., 0], -offset[..., 1], offset[..., 1]], -1)
    share = along / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9)
    asked = np.take_along_axis(share, np.maximum(relation_B, 0)[:, None, None], -1)[..., 0]
    good = (relation_B[:, None] < 0) | (asked > 0.85)
    room = np.where(good, np.minimum(room, 0), room - 10)
    best = room.argmax(1)  # the first of the valid ones: they all have room 0
    rows = np.arange(batch)
    return centers[rows, best], room[rows, best] >= 0


def place(
    rng: np.random.Generator,
    shape_BM: np.ndarray,
    color_BM: np.ndarray,
    relation_B: np.ndarray,
    scale_B: Sequence[str | None],
    world: str,
) -> Scenes:
    """Draws sizes, places, angles and grounds for given shapes, colours and scales (None: as large as fits)."""
    batch = len(shape_BM)
    count_B = (shape_BM >= 0).sum(1)
    radii = [SCALED[s] if s else RADIUS[max(c, 1)] for s, c in zip(scale_B, count_B, strict=True)]
    low, high = np.array(radii).T[..., None]
    radius_BM = low + (high - low) * rng.random(shape_BM.shape)
    center_BM2, ok = _centers(rng, radius_BM, count_B, relation_B)
    for _ in range(100):
        if ok.all():
            break
        again = np.flatnonzero(~ok)
        radius_BM[again] = low[again]
        center_BM2[again], ok[again] = _centers(rng, radius_BM[again], count_B[again], relation_B[again])
    assert ok.all(), "no layout without overlaps: RADIUS is too large for the object count"

    # A nearly grey mid-tone ground, blended towards a second one.
    value = rng.uniform(0.44, 0.64, (batch, 2, 1))
    tint = rng.uniform(-0.035, 0.035, (batch, 2, 3))
    texture = np.stack(
        [
            rng.uniform(-4, 4, batch),
            rng.uniform(-4, 4, batch),
            rng.uniform(0, 2 * math.pi, batch),
            rng.uniform(0, 0.02, batch),
        ],
        1,
    )
    angle_BM = rng.uniform(-0.2, 0.2, shape_BM.shape)
    gradient_B = rng.uniform(0, 2 * math.pi, batch)
    ground_B2_3 = value + tint
    pattern_B4, fill_BM5 = np.zeros((batch, 4)), np.zeros((*shape_BM.shape, 5))
    stroke_BM = np.zeros(shape_BM.shape)
    if world == "textured":  # drawn last: the flat world's numbers are those it has always had
        ground_B2_3, pattern_B4, fill_BM5 = draw_textures(rng, tint, shape_BM.shape)
        detailed = np.array([scale is not None for scale in scale_B])
        fill_BM5[detailed] = 0  # there the shape is the detail
        fill_BM5[color_BM == COLOR_NAMES.index("white"), 4] *= 0.15  # darker, white is a ground
        thin = np.array([scale == "thin" for scale in scale_B])[:, None]
        stroke_BM = thin * rng.uniform(*STROKE, shape_BM.shape)
    as_float = lambda a: torch.from_numpy(np.ascontiguousarray(a)).float()  # noqa: E731
    return Scenes(
        shape_BM=torch.from_numpy(shape_BM).long(),
        color_BM=torch.from_numpy(color_BM).long(),
        center_BM2=as_float(center_BM2),
        radius_BM=as_float(radius_BM),
        angle_BM=as_float(angle_BM),
        ground_B2_3=as_float(ground_B2_3),
        gradient_B=as_float(gradient_B),
        texture_B4=as_float(texture),
        pattern_B4=as_float(pattern_B4),
        fill_BM5=as_float(fill_BM5),
        stroke_BM=as_float(stroke_BM),
    )


def random_color(rng: np.random.Generator, shape: int, *, not_in: tuple[int, ...] = ()) -> int:
    """A colour the metadata left open. Pairs that are held out stay unseen here too."""
    while True:
        color = int(rng.integers(len(COLOR_NAMES)))
        if color not in not_in and not is_held_out_pair(color, shape):
            return color


def scale_of(prompt: str) -> str | None:
    """The word of `SCALES` in a caption, if there is one."""
    return next((word for word in prompt.split() if word in SCALES), None)


def sample_scenes(metadata: list[Metadata], rng: np.random.Generator, world: str = "flat") -> Scenes:
    """Scenes that satisfy the metadata, one each, of a world of `WORLDS`.

    Raises:
        ValueError: an unknown world; a relation that Scenes does not draw; a word of scale in the flat world.
    """
    if world not in WORLDS:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {world!r}")
    batch = len(metadata)
    scale_B = [scale_of(line.prompt) for line in metadata]
    if world == "flat" and any(scale_B):
        raise ValueError(f"only the textured world has the words {', '.join(SCALES)}: pass world='textured'")
    shape_BM = np.full((batch, MAX_OBJECTS), -1)
    color_BM = np.zeros((batch, MAX_OBJECTS), int)
    relation_B = np.full(batch, -1)
    for row, line in enumerate(metadata):
        slot = 0
        for item in line.include:
            shape = SHAPES.index(item.label)
            group = COLOR_NAMES.index(item.color) if item.color else None
            if group is None and item.count > 1:
                group = random_color(
                    rng, shape
                )  # "three stars" are of one colour, as a person would draw them
            for _ in range(item.count):
                shape_BM[row, slot] = shape
                color_BM[row, slot] = group if group is not None else random_color(rng, shape)
                slot += 1
            if item.position is not None:
                relation, target = item.position
                if target != 0 or len(line.include) != 2:
                    raise ValueError(f"Scenes draws relations between two objects only, got: {line.prompt!r}")
                # GenEval writes the relation on the second item: "A left of B" means B's entry is first.
                relation_B[row] = RELATIONS.index(relation)
        if relation_B[row] >= 0:
            # `place` wants the related object first.
            shape_BM[row, :2] = shape_BM[row, 1::-1]
            color_BM[row, :2] = color_BM[row, 1::-1]
    return place(rng, shape_BM, color_BM, relation_B, scale_B, world)
