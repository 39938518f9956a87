"""Plots as SVG: what stands where, with a placer of names; `plot.svg.j2` draws it, in the page and as a file.

By hand because the page's points answer to the pointer and the keyboard, take the window's colours and fetch nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 48
_LONGEST = 24  # letters of a name that are shown; pointing at the point shows all
_INSET = 16  # pixels between the frame and the outermost ticks, so that no point sits on the frame
_HERE = Path(__file__).parent

Box = tuple[float, float, float, float]  # left, top, right, bottom
Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class Sheet:
    """Size in pixels, of the drawing and of the letters its names may need."""

    width: int
    height: int
    letter: float
    line: float


PAGE = Sheet(640, 360, letter=10, line=24)  # letters are larger in a narrow window
FILE = Sheet(960, 500, letter=6.8, line=15)


@dataclass(frozen=True)
class Point:
    """`x` speedup, `y` quality, both in data units; `low`/`high` its interval, `x_ends` that of `x`; `group` is
    whose it is."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    detail: str
    group: str = ""
    x_ends: Ends = (None, None)


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Points that no other beats in speed without being worse in quality, slowest first."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    best = -math.inf
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if sign * point.y > best:
            front.append(point)
            best = sign * point.y
    return front[::-1]


@dataclass
class _Placer:
    """Finds places for names: `covered` is what they had better not cover (front, bars, points), `names` what they
    must not."""

    sheet: Sheet
    covered: list[Box]
    names: list[Box] = field(default_factory=list)

    def place(self, x: float, y: float, name: str) -> dict[str, Any]:
        """The first place around a point that covers nothing, or the one that covers least, any other name last of
        all."""
        sheet, best = self.sheet, None
        width, line = sheet.letter * len(name), sheet.line
        up, down = -line / 2, line + 1
        for far in itertools.takewhile(lambda far: far < sheet.height / 2, itertools.count(0, line)):
            places = (
                (1, up - far),
                (1, down + far),
                (-1, up - far),
                (-1, down + far),
                (1, line / 4),
                (-1, line / 4),
            )
            for side, dy in places:
                left = x + 10 if side > 0 else x - 10 - width
                box = (left, y + dy - 0.75 * line, left + width, y + dy + line / 4)
                outside = (
                    box[0] < 0 or box[2] > sheet.width or box[1] < _TOP or box[3] > sheet.height - _BOTTOM
                )
                cost = sum(_overlap(box, other) for other in self.covered) + (1e6 if outside else 0) + far
                cost += 1e3 * sum(_overlap(box, other) for other in self.names)
                if best is None or cost < best[0]:
                    best = cost, x + 10 * side, y + dy, "start" if side > 0 else "end", box
            if best and best[0] <= far:
                break
        assert best is not None
        _, label_x, label_y, anchor, box = best
        self.names.append(box)
        leader = abs(label_y - y) > 1.5 * line  # too far off to be taken for this point's
        return {"label_x": label_x, "label_y": label_y, "anchor": anchor, "leader": leader}


def layout(
    points: Sequence[Point],
    *,
    label: str,
    higher_is_better: bool = True,
    lines: Sequence[tuple[str, float]] = (),
    across: str = "speedup of the whole pipeline",
    series: bool = False,
    sheet: Sheet = PAGE,
) -> dict[str, Any]:
    """Pixel coordinates of points, ticks, each group's front and horizontal `lines` for the template.

    `series`: the points of a group are one curve, named at its end; both axes are logarithmic.
    """
    groups = list(dict.fromkeys(point.group for point in points))
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + [y for _, y in lines]
    xs = [v for p in points for v in (p.x, *p.x_ends) if v is not None] + ([] if series else [1.0])
    scale, axis = (math.log, _log_axis) if series else (float, _axis)
    (px, x_ticks), (py, y_ticks) = _axes(axis, scale, xs, ys, sheet, higher_is_better)

    paths = []
    for group in groups:
        own = [point for point in points if point.group == group]
        path = (
            sorted(own, key=lambda p: p.x) if series else pareto_front(own, higher_is_better=higher_is_better)
        )
        paths.append(path)
    corners = [[(px(point.x), py(point.y)) for point in path] for path in paths]
    covered = [_box_around(px(p.x), py(p.y), 7, 7) for p in points]
    bars = {id(p): _bars(p, px, py) for p in points}
    covered += [box for pair in bars.values() for box in map(_box_of_bar, filter(None, pair))]
    covered += [box for path in corners for box in _along(path)]
    placer = _Placer(sheet, covered)
    placer.names += [_box_around(sheet.width - _RIGHT - 60, py(y) - 8, 60, 10) for _, y in lines]
    legend = None if series or groups == [""] else _legend(groups, sheet, covered)
    placer.names += [legend["box"]] if legend else []

    drawn = []
    for point in sorted(points, key=lambda p: p.x):
        x, y, shown = px(point.x), py(point.y), ""
        if not series or point is paths[groups.index(point.group)][-1]:
            shown = point.name if len(point.name) <= _LONGEST else point.name[: _LONGEST - 1] + "…"
        place = (
            placer.place(x, y, shown)
            if shown
            else {"label_x": x, "label_y": y, "anchor": "start", "leader": False}
        )
        vertical, horizontal = bars[id(point)]
        own = {"name": point.name, "shown": shown, "detail": point.detail, "x": x, "y": y, **place}
        own |= {"bar": vertical, "x_bar": horizontal, "group": groups.index(point.group)}
        drawn.append(own | {"on_front": any(point in path for path in paths)})
    better = f", {'higher' if higher_is_better else 'lower'} is better, better is up"
    return {
        "label": label if series else label + better,
        "across": across,
        "width": sheet.width,
        "height": sheet.height,
        "frame": (_LEFT, _TOP, sheet.width - _RIGHT, sheet.height - _BOTTOM),
        "x_ticks": [(px(tick), f"{tick:g}" if series else f"{tick:g}×") for tick in x_ticks],
        "y_ticks": [(py(tick), f"{tick:g}") for tick in y_ticks],
        "points": drawn,
        "paths": [" ".join(f"{x},{y}" for x, y in path) for path in corners],
        "lines": [(py(y), name) for name, y in lines],
        "legend": legend,
    }


def _legend(names: Sequence[str], sheet: Sheet, covered: Sequence[Box]) -> dict[str, Any]:
    """The names of the groups, in the corner where they cover least."""
    width, height = 30 + sheet.letter * max(map(len, names)), 8 + 18 * len(names)
    corners = [
        (left, top, left + width, top + height)
        for top in (_TOP, sheet.height - _BOTTOM - height)
        for left in (_LEFT, sheet.width - _RIGHT - width)
    ]
    return {"names": list(names), "box": min(corners, key=lambda box: sum(_overlap(box, c) for c in covered))}


def file(plots: Sequence[dict[str, Any]]) -> str:
    """One SVG document with the plots below each other."""
    return (
        environment()
        .get_template("plot.svg.j2")
        .module.document(  # type: ignore[attr-defined]
            plots, (_HERE / "plot.css").read_text(encoding="utf-8")
        )
    )


def environment() -> Any:
    """Jinja's, with everything that comes from outside escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)


def _axes(
    axis: Callable[[list[float]], tuple[float, float, list[float]]],
    scale: Callable[[float], float],
    xs: list[float],
    ys: list[float],
    sheet: Sheet,
    higher_is_better: bool,
) -> tuple[tuple[Callable[[float], float], list[float]], tuple[Callable[[float], float], list[float]]]:
    """From data to pixels, and the ticks, across and up."""

    def share(value: float, low: float, high: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low))

    x_low, x_high, x_ticks = axis(xs)
    y_low, y_high, y_ticks = axis(ys)

    def px(x: float) -> float:
        return round(
            _LEFT + _INSET + share(x, x_low, x_high) * (sheet.width - _LEFT - _RIGHT - 2 * _INSET), 1
        )

    def py(y: float) -> float:
        up = (
            share(y, y_low, y_high) if higher_is_better else 1 - share(y, y_low, y_high)
        )  # better is always up
        return round(sheet.height - _BOTTOM - _INSET - up * (sheet.height - _TOP - _BOTTOM - 2 * _INSET), 1)

    return (px, x_ticks), (py, y_ticks)


def _bars(
    p: Point, px: Callable[[float], float], py: Callable[[float], float]
) -> tuple[Box | None, Box | None]:
    """The lines of the intervals, up and across; None where there is none."""
    x, y, (left, right) = px(p.x), py(p.y), p.x_ends
    up = None if p.low is None or p.high is None else (x, py(p.low), x, py(p.high))
    return up, None if left is None or right is None else (px(left), y, px(right), y)


def _box_of_bar(bar: Box) -> Box:
    (x0, x1), (y0, y1) = sorted((bar[0], bar[2])), sorted((bar[1], bar[3]))
    return x0 - 2, y0 - 2, x1 + 2, y1 + 2


def _along(corners: list[tuple[float, float]], steps: int = 24) -> list[Box]:
    """A path as small boxes."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        boxes += [_box_around(x, y, 2, 2) for x, y in along]
    return boxes


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


def _log_axis(values: list[float]) -> tuple[float, float, list[float]]:
    """From and to a 1, 2 or 5 of some power of ten."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    steps = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    start = max(step for step in steps if step <= min(values))
    end = min(step for step in steps if step >= max(values) and step > start)
    return start, end, [step for step in steps if start <= step <= end]
