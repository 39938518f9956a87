"""What the detector itself is worth: a score means something only between these two numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..geneval.metadata import TASKS, Metadata
from ..geneval.scorer import score
from .detect import detect
from .layout import sample_scenes
from .render import render


def ceiling_and_floor(
    lines: Sequence[Metadata], *, size: int = 256, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of ground-truth renders of `lines`, and of renders of a *different* prompt of the same task.

    Returns:
        Two dicts with a score per task and `overall`, the mean of the tasks present.

    Raises:
        ValueError: if a task has only one distinct prompt, so that nothing mismatched can be shown.
    """
    rng = np.random.default_rng(seed)
    images = []
    for start in range(0, len(lines), 32):
        batch = list(lines[start : start + 32])
        images += detect(render(sample_scenes(batch, rng), size))
    right: dict[str, list[bool]] = {}
    wrong: dict[str, list[bool]] = {}
    for index, line in enumerate(lines):
        others = [j for j, o in enumerate(lines) if o.tag == line.tag and o.prompt != line.prompt]
        if not others:
            raise ValueError(
                f"task {line.tag!r} has one distinct prompt, {line.prompt!r}: nothing to mismatch it with"
            )
        right.setdefault(line.tag, []).append(score(images[index], line).correct)
        wrong.setdefault(line.tag, []).append(score(images[int(rng.choice(others))], line).correct)
    return _means(right), _means(wrong)


def _means(by_task: dict[str, list[bool]]) -> dict[str, float]:
    means = {task: float(np.mean(by_task[task])) for task in TASKS if task in by_task}
    return means | {"overall": float(np.mean(list(means.values())))}
