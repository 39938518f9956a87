"""Scenes: a procedural world with GenEval's tasks, for models that must be trained and judged offline.

`prompts` → `sample_scenes` → `render` makes labelled images; `detect` + `accel.evaluation.geneval.score`
judges images of any origin by GenEval's rules.
"""

from accel.evaluation.geneval.metadata import TASKS

from .detect import detect
from .layout import sample_scenes, scale_of
from .prompts import detail, prompts
from .render import render
from .world import COLOR_NAMES, SCALES, SHAPES, WORLDS, Scenes

__all__ = [
    "COLOR_NAMES",
    "SCALES",
    "SHAPES",
    "TASKS",
    "WORLDS",
    "Scenes",
    "detail",
    "detect",
    "prompts",
    "render",
    "sample_scenes",
    "scale_of",
]
