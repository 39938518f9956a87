"""Endless labelled scenes for the training scripts: captions of all tasks, and what each image token shows."""

from __future__ import annotations

import numpy as np
import torch

from accel.evaluation.geneval.metadata import Metadata
from accel.evaluation.scenes import COLOR_NAMES, SHAPES, Scenes
from accel.evaluation.scenes.prompts import colored_position, draw
from accel.evaluation.scenes.render import object_coverage

# Where the caption leaves the layout open the model has more to decide and learns more slowly: those tasks weigh more.
TASK_WEIGHTS = {
    "single_object": 1,
    "two_object": 3,
    "counting": 3,
    "colors": 1,
    "position": 1,
    "color_attr": 3,
    "colored_position": 1,
}


def captions(rng: np.random.Generator, count: int) -> list[Metadata]:
    """Metadata of `count` random training captions over all tasks."""
    weights = np.array(list(TASK_WEIGHTS.values()), float)
    return [
        colored_position(rng) if task == "colored_position" else draw(task, rng, "train")
        for task in rng.choice(list(TASK_WEIGHTS), count, p=weights / weights.sum())
    ]


def token_labels(scenes: Scenes, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per image token, the shape and the colour that fill most of it; 0 is ground. Each (B, grid²)."""
    shape = torch.zeros(len(scenes), grid, grid, dtype=torch.long, device=scenes.shape_BM.device)
    color = shape.clone()
    image, slot, cover = object_coverage(scenes, grid)
    inside = cover > 0.5
    shape.index_add_(0, image, inside * (scenes.shape_BM[image, slot] + 1)[:, None, None])
    color.index_add_(0, image, inside * (scenes.color_BM[image, slot] + 1)[:, None, None])
    return shape.clamp_(max=len(SHAPES)).flatten(1), color.clamp_(max=len(COLOR_NAMES)).flatten(1)
