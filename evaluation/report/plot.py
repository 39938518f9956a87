"""Geometry of the Pareto plot: speed to the right, quality upwards. The template draws it as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 48
_INSET = 16  # pixels between the frame and the outermost ticks, so that no point sits on the frame


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


def layout(points: list[Point], *, label: str, higher_is_better: bool) -> dict[str, Any]:
    """Pixel coordinates of points, ticks and the front for the template."""
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
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
    drawn = []
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: p.x):
        x, y = px(point.x), py(point.y)
        left = x > WIDTH - 150
        label_y = y - 11
        while any(abs(label_y - other_y) < 14 and abs(x - other_x) < 130 for other_x, other_y in taken):
            label_y += 14
        taken.append((x, label_y))
        drawn.append(
            {
                "name": point.name,
                "detail": point.detail,
                "x": x,
                "y": y,
                "bar": None if point.low is None or point.high is None else (py(point.low), py(point.high)),
                "label_x": x - 9 if left else x + 9,
                "label_y": label_y,
                "anchor": "end" if left else "start",
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
        "front": " ".join(f"{px(point.x)},{py(point.y)}" for point in front),
    }


def _axis(values: list[float]) -> tuple[float, float, list[float]]:
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - span / 2, high + span / 2)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    start, end = math.floor(low / step) * step, math.ceil(high / step) * step
    ticks = [round(start + i * step, 10) for i in range(round((end - start) / step) + 1)]
    return start, end, ticks
