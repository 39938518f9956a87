"""Captions in GenEval's grammar for its six tasks, as GenEval metadata, split into training and test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from accel.evaluation.geneval.metadata import TASKS, Metadata, ObjectSpec

from .split import (
    is_held_out_binding,
    is_held_out_company,
    is_held_out_count,
    is_held_out_pair,
    is_held_out_relation,
)
from .world import COLOR_NAMES, NUMBERS, PLURALS, RELATIONS, SCALES, SHAPES


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _single_object(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    shape = int(rng.integers(len(SHAPES)))
    name = SHAPES[shape]
    return Metadata("single_object", (ObjectSpec(name),), f"a photo of {_article(name)}"), None


def _two_shapes(rng: np.random.Generator) -> tuple[int, int]:
    first, second = rng.choice(len(SHAPES), 2, replace=False)
    return int(first), int(second)


def _two_object(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    first, second = _two_shapes(rng)
    a, b = SHAPES[first], SHAPES[second]
    prompt = f"a photo of {_article(a)} and {_article(b)}"
    return Metadata("two_object", (ObjectSpec(a), ObjectSpec(b)), prompt), is_held_out_company(first, second)


def _counting(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    shape, count = int(rng.integers(len(SHAPES))), int(rng.integers(2, 5))
    name = SHAPES[shape]
    line = Metadata(
        "counting",
        (ObjectSpec(name, count),),
        f"a photo of {NUMBERS[count]} {PLURALS[shape]}",
        exclude=(ObjectSpec(name, count + 1),),
    )
    return line, is_held_out_count(shape, count)


def _colors(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOR_NAMES)))
    name = f"{COLOR_NAMES[color]} {SHAPES[shape]}"
    line = Metadata(
        "colors", (ObjectSpec(SHAPES[shape], color=COLOR_NAMES[color]),), f"a photo of {_article(name)}"
    )
    return line, is_held_out_pair(color, shape)


def _position(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    first, second = _two_shapes(rng)
    relation = int(rng.integers(len(RELATIONS)))
    a, b = SHAPES[first], SHAPES[second]
    # GenEval lists the reference object first; the prompt names it last.
    items = (ObjectSpec(b), ObjectSpec(a, position=(RELATIONS[relation], 0)))
    prompt = f"a photo of {_article(a)} {RELATIONS[relation]} {_article(b)}"
    return Metadata("position", items, prompt), is_held_out_relation(first, second, relation)


def _color_attr(rng: np.random.Generator) -> tuple[Metadata, bool | None]:
    first, second = _two_shapes(rng)
    c1, c2 = (int(c) for c in rng.choice(len(COLOR_NAMES), 2, replace=False))
    a, b = SHAPES[first], SHAPES[second]
    prompt = f"a photo of {_article(f'{COLOR_NAMES[c1]} {a}')} and {_article(f'{COLOR_NAMES[c2]} {b}')}"
    items = (ObjectSpec(a, color=COLOR_NAMES[c1]), ObjectSpec(b, color=COLOR_NAMES[c2]))
    return Metadata("color_attr", items, prompt), is_held_out_binding(c1, first, c2, second)


_DRAW = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def draw(task: str, rng: np.random.Generator, split: str) -> Metadata:
    """One random line of a task, from the training or the held-out combinations."""
    while True:
        line, held_out = _DRAW[task](rng)
        if held_out is None or held_out == (split == "test"):
            return line


def prompts(split: str = "test", per_task: int = 36, seed: int = 0) -> list[Metadata]:
    """Prompts of the six tasks, task by task.

    Args:
        split: "test" (combinations never rendered in training) or "train".
        per_task: how many of each task; a prompt may come twice where a task has few combinations.
        seed: same seed, same prompts.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = np.random.default_rng([seed, split == "test"])
    return [draw(task, rng, split) for task in TASKS for _ in range(per_task)]


# Tasks whose captions take a word of scale and stay within the text encoders' 16 tokens.
DETAIL_TASKS = ("single_object", "counting", "colors")


def scaled(line: Metadata, scale: str) -> Metadata:
    """The same line at a scale of `SCALES`: "a photo of an orange star" → "a photo of a tiny orange star"."""
    a, photo, of, count, *rest = line.prompt.split(" ")
    return replace(line, prompt=" ".join([a, photo, of, count.replace("an", "a"), scale, *rest]))


def draw_detail(task: str, scale: str, rng: np.random.Generator, split: str) -> Metadata:
    """One random line of a task of `DETAIL_TASKS` at a scale. Outlined rings, each two circles, are not asked for."""
    while True:
        line = draw(task, rng, split)
        if scale != "thin" or line.include[0].label != "ring":
            return scaled(line, scale)


def detail(split: str = "test", per_task: int = 12, seed: int = 0) -> dict[str, list[Metadata]]:
    """Small-detail prompts of the textured world: for every scale of `SCALES`, `per_task` lines of each task of
    `DETAIL_TASKS`. Same seed, same prompts. `ValueError` for an unknown split."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = np.random.default_rng([seed, split == "test", 1])
    return {
        scale: [draw_detail(task, scale, rng, split) for task in DETAIL_TASKS for _ in range(per_task)]
        for scale in SCALES
    }


def colored_position(rng: np.random.Generator) -> Metadata:
    """Training only: relation and both colours in one caption ("a red circle left of a blue square").

    GenEval has no such task; users write such prompts all the same.
    """
    while True:
        line = draw("position", rng, "train")
        (b, a), word = line.include, line.prompt.split(" ")
        ca, cb = rng.choice(len(COLOR_NAMES), 2, replace=False)
        sa, sb = SHAPES.index(a.label), SHAPES.index(b.label)
        if is_held_out_binding(int(ca), sa, int(cb), sb):
            continue
        assert a.position is not None
        relation = a.position[0]
        name_a, name_b = f"{COLOR_NAMES[ca]} {a.label}", f"{COLOR_NAMES[cb]} {b.label}"
        items = (
            ObjectSpec(b.label, color=COLOR_NAMES[cb]),
            ObjectSpec(a.label, color=COLOR_NAMES[ca], position=a.position),
        )
        prompt = f"{word[0]} {word[1]} {word[2]} {_article(name_a)} {relation} {_article(name_b)}"
        return Metadata("position", items, prompt)
