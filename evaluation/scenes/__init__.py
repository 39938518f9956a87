"""Scenes: a procedural world with GenEval's tasks, for models that must be trained and judged offline.

`prompts` → `sample_scenes` → `render` makes labelled images; `detect` + `accel.evaluation.geneval.score`
judges images of any origin by GenEval's rules.
"""

from accel.evaluation.geneval.metadata import TASKS

from .detect import detect
from .layout import sample_scenes
from .prompts import prompts
from .render import render
from .world import COLOR_NAMES, SHAPES, Scenes

__all__ = ["COLOR_NAMES", "SHAPES", "TASKS", "Scenes", "detect", "prompts", "render", "sample_scenes"]
