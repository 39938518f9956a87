"""Endless labelled scenes for the training scripts: captions of all tasks, and what each image token shows."""

from __future__ import annotations

import numpy as np
import torch

from accel.evaluation.geneval.metadata import Metadata
from accel.evaluation.scenes import COLOR_NAMES, SHAPES, Scenes
from accel.evaluation.scenes.prompts import colored_position, draw
from accel.evaluation.scenes.render import object_coverage

TASK_WEIGHTS = {
    "single_object": 1,
    "two_object": 2,
    "counting": 2,
    "colors": 1,
    "position": 2,
    "color_attr": 2,
}


def captions(rng: np.random.Generator, count: int) -> list[Metadata]:
    """Metadata of `count` random training captions over all tasks."""
    tasks = [*TASK_WEIGHTS, "colored_position"]
    weights = np.array([*TASK_WEIGHTS.values(), 2], float)
    return [
        colored_position(rng) if task == "colored_position" else draw(task, rng, "train")
        for task in rng.choice(tasks, count, p=weights / weights.sum())
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
