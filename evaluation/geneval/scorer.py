"""GenEval's scoring rules (Ghosh et al., 2310.11513, section 3 and the benchmark's published settings).

Pure functions of detections: which detector made them does not matter here. Mask2Former's, the
built-in scenes detector's and a file of the official tool's output are all scored by `score`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accel.evaluation.bootstrap import Interval, mean_interval
from accel.evaluation.errors import MetadataError

from .metadata import TASKS, Metadata, ObjectSpec

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object a detector saw. `box` is (x0, y0, x1, y1) in pixels, y downwards.

    `color` is the detector's colour name for this object, or None where it made no statement.
    """

    label: str
    confidence: float
    box: Box
    color: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"box": list(self.box)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Detection:
        x0, y0, x1, y1 = data["box"]
        return cls(data["label"], float(data["confidence"]), (x0, y0, x1, y1), data.get("color"))


@dataclass(frozen=True)
class Rules:
    """GenEval's published settings.

    A detection counts when its confidence is *above* `threshold` (`counting_threshold` for the
    counting task); the `max_per_class` most confident of a class are kept, without suppression of
    overlaps. `position_margin` is the share of both objects' sizes taken off their distance and
    `position_direction` the share of the distance that must then remain along an axis.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_per_class: int = 16
    position_margin: float = 0.1
    position_direction: float = 0.5


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks for; `reason` says what failed (empty if correct).

    `counted` is what passed the thresholds, most confident first: what the verdict rests on.
    """

    correct: bool
    reason: str
    tag: str
    prompt: str
    counted: tuple[Detection, ...] = ()


def score(detections: Iterable[Detection], metadata: Metadata, rules: Rules | None = None) -> Verdict:
    """Judge one image by GenEval's rules.

    For each `include` entry, in order: the `count` most confident objects of its class must be
    there; if it names a colour, `count` of exactly those must have it; if it names a position, all
    of them must stand in that relation to all objects of the entry referred to, which must itself
    have been satisfied. For each `exclude` entry there must be fewer than `count` of its class.
    """
    rules = rules or Rules()
    threshold = rules.counting_threshold if metadata.tag == "counting" else rules.threshold
    found = _by_class(detections, threshold, rules.max_per_class)
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for spec in metadata.include:
        objects = found.get(spec.label, [])[: spec.count]
        failure = _failure(spec, objects, matched, rules)
        matched.append(None if failure else objects)
        if failure:
            reasons.append(failure)
    for spec in metadata.exclude:
        seen = len(found.get(spec.label, []))
        if seen >= spec.count:
            reasons.append(f"expected fewer than {spec.count} {spec.label}, found {seen}")
    counted = sorted((d for group in found.values() for d in group), key=lambda d: -d.confidence)
    return Verdict(not reasons, "; ".join(reasons), metadata.tag, metadata.prompt, tuple(counted))


def relations(a: Box, b: Box, rules: Rules | None = None) -> frozenset[str]:
    """How box `a` stands to box `b`: a subset of {left of, right of, above, below}.

    The distance of the centres along each axis is shortened by `position_margin` of the sum of both
    extents (not below 0) and divided by the *unshortened* distance of the centres; a relation holds
    when the quotient passes `position_direction`.
    """
    rules = rules or Rules()
    offset_x = (a[0] + a[2] - b[0] - b[2]) / 2
    offset_y = (a[1] + a[3] - b[1] - b[3]) / 2
    distance = math.hypot(offset_x, offset_y)
    x = _shortened(offset_x, rules.position_margin * (abs(a[2] - a[0]) + abs(b[2] - b[0])))
    y = _shortened(offset_y, rules.position_margin * (abs(a[3] - a[1]) + abs(b[3] - b[1])))
    if max(abs(x), abs(y)) < 1e-3:  # also the only case in which the distance can be zero
        return frozenset()
    limit = rules.position_direction * distance
    holds = {"left of": x < -limit, "right of": x > limit, "above": y < -limit, "below": y > limit}
    return frozenset(name for name, true in holds.items() if true)


@dataclass(frozen=True)
class Aggregate:
    """Scores of a set of images: one per task and `overall`, the unweighted mean of the task scores.

    GenEval's overall is a mean over six tasks. With fewer present (`missing` names the others)
    `overall` is the mean over those present and not comparable to a published score.
    """

    tasks: dict[str, Interval]
    overall: Interval
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def aggregate(verdicts: Iterable[Verdict], *, level: float = 0.95, resamples: int = 2000) -> Aggregate:
    """Per-task and overall scores with prompt-clustered bootstrap intervals.

    Takes anything with `tag`, `prompt` and `correct`, e.g. streamed from records; keeps one number
    per image.
    """
    rows = [(verdict.tag, verdict.prompt, float(verdict.correct)) for verdict in verdicts]
    if not rows:
        raise MetadataError("no verdicts to aggregate: the file has no image that was judged")
    options: dict[str, Any] = {"level": level, "resamples": resamples, "bounds": (0, 1)}
    present = [task for task in TASKS if any(row[0] == task for row in rows)]
    tasks = {}
    for task in present:
        own = [row for row in rows if row[0] == task]
        tasks[task] = mean_interval([row[2] for row in own], [row[1] for row in own], **options)
    tags, prompts, values = zip(*rows, strict=True)
    overall = mean_interval(values, prompts, strata=tags, **options)
    return Aggregate(tasks, overall, tuple(task for task in TASKS if task not in present))


def _by_class(detections: Iterable[Detection], threshold: float, limit: int) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.confidence):
        group = found.setdefault(detection.label, [])
        if detection.confidence > threshold and len(group) < limit:
            group.append(detection)
    return found


def _failure(
    spec: ObjectSpec,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> str:
    """Why `objects` do not satisfy `spec`, or an empty string."""
    if len(objects) < spec.count:
        return f"expected at least {spec.count} {spec.label}, found {len(objects)}"
    if spec.color is not None:
        colors = [detection.color for detection in objects]
        if colors.count(spec.color) < spec.count:
            seen = ", ".join(color or "unknown" for color in colors)
            return f"expected {spec.count} {spec.color} {spec.label}, found colour {seen}"
    if spec.position is not None:
        relation, target = spec.position
        others = matched[target]
        if others is None:
            return f"no valid object for {spec.label} to be {relation}"
        for detection in objects:
            for other in others:
                held = relations(detection.box, other.box, rules)
                if relation not in held:
                    seen = " and ".join(sorted(held)) or "neither side of"
                    return f"expected {spec.label} {relation} {other.label}, found {seen} it"
    return ""


def _shortened(offset: float, margin: float) -> float:
    return math.copysign(max(abs(offset) - margin, 0.0), offset)
