"""Geometry of the Pareto plot: speed to the right, quality upwards. The template draws it as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 48
_LETTER = 10  # width of one letter at the larger font of a narrow window
_LONGEST = 24  # letters of a name that are shown; pointing at the point shows all
_INSET = 16  # pixels between the frame and the outermost ticks, so that no point sits on the frame


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """`x` speedup, `y` quality, both in data units; `low`/`high` its interval."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    detail: str


def pareto_front(points: list[Point], *, higher_is_better: bool) -> list[Point]:
    """Points that no other beats in speed without being worse in quality, slowest first."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    best = -math.inf
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if sign * point.y > best:
            front.append(point)
            best = sign * point.y
    return front[::-1]


def layout(
    points: list[Point], *, label: str, higher_is_better: bool, lines: Sequence[tuple[str, float]] = ()
) -> dict[str, Any]:
    """Pixel coordinates of points, ticks, the front and horizontal `lines` for the template."""
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + [y for _, y in lines]
    x_low, x_high, x_ticks = _axis([1.0, *(p.x for p in points)])
    y_low, y_high, y_ticks = _axis(ys)

    def px(x: float) -> float:
        return round(
            _LEFT + _INSET + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT - 2 * _INSET), 1
        )

    def py(y: float) -> float:
        share = (y - y_low) / (y_high - y_low)
        share = share if higher_is_better else 1 - share  # better is always up
        return round(HEIGHT - _BOTTOM - _INSET - share * (HEIGHT - _TOP - _BOTTOM - 2 * _INSET), 1)

    front = pareto_front(points, higher_is_better=higher_is_better)
    corners = [(px(point.x), py(point.y)) for point in front]
    # What a label had better not cover: the front, the bars, the points; and what it must not: other labels.
    taken: list[Box] = [_box_around(px(p.x), py(p.y), 7, 7) for p in points]
    for p in points:
        if p.low is not None and p.high is not None:
            top, bottom = sorted((py(p.low), py(p.high)))
            taken.append((px(p.x) - 2, top, px(p.x) + 2, bottom))
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = 24
        along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        taken += [_box_around(x, y, 2, 2) for x, y in along]
    labels = [_box_around(WIDTH - _RIGHT - 60, py(y) - 8, 60, 10) for _, y in lines]
    drawn = []
    for point in sorted(points, key=lambda p: p.x):
        x, y = px(point.x), py(point.y)
        name = point.name if len(point.name) <= _LONGEST else point.name[: _LONGEST - 1] + "…"
        label_x, label_y, anchor, box = _place(x, y, name, taken, labels)
        labels.append(box)
        drawn.append(
            {
                "name": point.name,
                "shown": name,
                "detail": point.detail,
                "x": x,
                "y": y,
                "bar": None if point.low is None or point.high is None else (py(point.low), py(point.high)),
                "label_x": label_x,
                "label_y": label_y,
                "anchor": anchor,
                "leader": abs(label_y - y) > 36,  # too far off to be taken for this point's
                "on_front": point in front,
            }
        )
    return {
        "label": f"{label}, {'higher' if higher_is_better else 'lower'} is better, better is up",
        "width": WIDTH,
        "height": HEIGHT,
        "frame": (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        "x_ticks": [(px(tick), f"{tick:g}×") for tick in x_ticks],
        "y_ticks": [(py(tick), f"{tick:g}") for tick in y_ticks],
        "points": drawn,
        "front": " ".join(f"{x},{y}" for x, y in corners),
        "lines": [(py(y), name) for name, y in lines],
    }


def _place(
    x: float, y: float, name: str, taken: list[Box], labels: list[Box]
) -> tuple[float, float, str, Box]:
    """Where the label of a point goes: the first place around it that covers nothing, or the one that
    covers least, any other label last of all. Returns x, baseline y, anchor and the label's box."""
    width = _LETTER * len(name)
    best: tuple[float, tuple[float, float, str, Box]] | None = None
    for far in range(0, HEIGHT // 2, 24):
        for side, dy in ((1, -12 - far), (1, 25 + far), (-1, -12 - far), (-1, 25 + far), (1, 6), (-1, 6)):
            left = x + 10 if side > 0 else x - 10 - width
            box = (left, y + dy - 18, left + width, y + dy + 6)
            outside = box[0] < 0 or box[2] > WIDTH or box[1] < _TOP or box[3] > HEIGHT - _BOTTOM
            covered = sum(_overlap(box, other) for other in taken) + (1e6 if outside else 0) + far
            covered += 1e3 * sum(_overlap(box, other) for other in labels)
            if best is None or covered < best[0]:
                best = covered, (x + 10 * side, y + dy, "start" if side > 0 else "end", box)
        if best and best[0] <= far:
            break
    assert best is not None
    return best[1]


def _box_around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _axis(values: list[float]) -> tuple[float, float, list[float]]:
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - span / 2, high + span / 2)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    start, end = math.floor(low / step) * step, math.ceil(high / step) * step
    ticks = [round(start + i * step, 10) for i in range(round((end - start) / step) + 1)]
    return start, end, ticks
