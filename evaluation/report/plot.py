"""Plots as SVG: what stands where, with a placer of names; `plot.svg.j2` draws it, in the page and as a file.

By hand because the page's points answer to the pointer and the keyboard, take the window's colours and fetch nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


PAGE = Sheet(640, 360, letter=11, line=24)  # letters are larger in a narrow window
FILE = Sheet(960, 500, letter=6.8, line=15)


@dataclass(frozen=True)
class Point:
    """`x` speedup, `y` quality, in data units; `low`/`high` its interval, `ends` that of `x`; `group`: whose it is."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    detail: str
    group: str = ""
    ends: Ends = (None, None)


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
    xs = [v for p in points for v in (p.x, *p.ends) if v is not None] + ([] if series else [1.0])
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + [y for _, y in lines]
    foot = sheet.height - _BOTTOM
    up = (
        (foot - _INSET, _TOP + _INSET) if higher_is_better else (_TOP + _INSET, foot - _INSET)
    )  # better is always up
    px, x_ticks = _axis(xs, _LEFT + _INSET, sheet.width - _RIGHT - _INSET, series)
    py, y_ticks = _axis(ys, *up, series)

    paths = []
    for group in groups:
        own = sorted((point for point in points if point.group == group), key=lambda p: p.x)
        paths.append(own if series else pareto_front(own, higher_is_better=higher_is_better))
    corners = [[(px(point.x), py(point.y)) for point in path] for path in paths]
    drawn = []
    for p in sorted(points, key=lambda p: p.x):
        named = not series or p is paths[groups.index(p.group)][-1]
        name = p.name if len(p.name) <= _LONGEST else p.name[: _LONGEST - 1] + "…"
        it: dict[str, Any] = {
            "name": p.name,
            "shown": name if named else "",
            "detail": p.detail,
            "x": px(p.x),
            "y": py(p.y),
        }
        it |= {"group": groups.index(p.group), "on_front": any(p in path for path in paths)}
        drawn.append(it | {"bars": _bars(p, px, py)})

    # What a name had better not cover: points, bars, fronts; and what it must not: other names.
    covered = [_box_around(item["x"], item["y"], 7, 7) for item in drawn]
    covered += [
        box for path in (*corners, *(bar for item in drawn for bar in item["bars"])) for box in _along(path)
    ]
    names = [_box_around(sheet.width - _RIGHT - 60, py(y) - 8, 60, 10) for _, y in lines]
    legend = [] if series or groups == [""] else _legend(groups, sheet, covered)
    names += [(x, y, x + sheet.letter * len(name) + 30, y + 18) for name, x, y in legend]
    for item in drawn:
        item["leader"] = False
        if item["shown"]:
            item |= _place(item["x"], item["y"], item["shown"], sheet, covered, names)
    return {
        "label": label
        if series
        else f"{label}, {'higher' if higher_is_better else 'lower'} is better, better is up",
        "across": across,
        "width": sheet.width,
        "height": sheet.height,
        "frame": (_LEFT, _TOP, sheet.width - _RIGHT, foot),
        "x_ticks": [(px(tick), f"{tick:g}{'' if series else '×'}") for tick in x_ticks],
        "y_ticks": [(py(tick), f"{tick:g}") for tick in y_ticks],
        "points": drawn,
        "paths": [" ".join(f"{x},{y}" for x, y in path) for path in corners],
        "lines": [(py(y), name) for name, y in lines],
        "legend": legend,
    }


def file(plots: Sequence[dict[str, Any]]) -> str:
    """One SVG document with the plots below each other."""
    template: Any = environment().get_template("plot.svg.j2")
    return template.module.document(plots, (_HERE / "plot.css").read_text(encoding="utf-8"))


def environment() -> Any:
    """Jinja's, with everything that comes from outside escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)


def _place(
    x: float, y: float, name: str, sheet: Sheet, covered: list[Box], names: list[Box]
) -> dict[str, Any]:
    """Where the name of a point goes: the first place around it that covers nothing, or the one that covers least, any
    of `names` last of all. It is one of them then."""
    width, line = sheet.letter * len(name), sheet.line
    best: tuple[float, int, float, Box] | None = None
    for far in range(0, sheet.height // 2, int(line)):
        places = itertools.product((1, -1), (-line / 2 - far, line + 1 + far))
        for side, dy in (*places, (1, line / 4), (-1, line / 4)):
            left = x + 10 if side > 0 else x - 10 - width
            box = (left, y + dy - 0.75 * line, left + width, y + dy + line / 4)
            inside = (
                box[0] >= 0 and box[2] <= sheet.width and box[1] >= _TOP and box[3] <= sheet.height - _BOTTOM
            )
            cost = sum(_overlap(box, other) for other in covered) + (0 if inside else 1e6) + far
            cost += 1e3 * sum(_overlap(box, other) for other in names)
            if best is None or cost < best[0]:
                best = cost, side, dy, box
        if best and best[0] <= far:
            break
    assert best is not None
    _, to, by, box = best
    names.append(box)
    leader = abs(by) > 1.5 * line  # too far off to be taken for this point's
    return {
        "label_x": x + 10 * to,
        "label_y": y + by,
        "anchor": "start" if to > 0 else "end",
        "leader": leader,
    }


def _legend(names: Sequence[str], sheet: Sheet, covered: Sequence[Box]) -> list[tuple[str, float, float]]:
    """The names of the groups with their left upper corners, where together they cover least."""
    width, height = 30 + sheet.letter * max(map(len, names)), 8 + 18 * len(names)
    tops, lefts = (_TOP, sheet.height - _BOTTOM - height), (_LEFT, sheet.width - _RIGHT - width)
    boxes = [(left, top, left + width, top + height) for top in tops for left in lefts]
    best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in covered))
    return [(name, best[0], best[1] + 4 + 18 * i) for i, name in enumerate(names)]


def _bars(
    p: Point, px: Callable[[float], float], py: Callable[[float], float]
) -> list[list[tuple[float, float]]]:
    """The lines of the intervals that there are, up and across."""
    x, y, bars = px(p.x), py(p.y), []
    if p.low is not None and p.high is not None:
        bars.append([(x, py(p.low)), (x, py(p.high))])
    if p.ends[0] is not None and p.ends[1] is not None:
        bars.append([(px(p.ends[0]), y), (px(p.ends[1]), y)])
    return bars


def _along(corners: Sequence[tuple[float, float]], steps: int = 24) -> list[Box]:
    """A path as small boxes."""
    shares = [i / steps for i in range(steps + 1)]
    pairs = itertools.pairwise(corners)
    return [
        _box_around(x0 + (x1 - x0) * s, y0 + (y1 - y0) * s, 2, 2)
        for (x0, y0), (x1, y1) in pairs
        for s in shares
    ]


def _box_around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _axis(
    values: list[float], first: float, last: float, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """From data to pixels between `first` and `last`, and the ticks."""
    ticks, scale = (_log_ticks, math.log) if log else (_ticks, float)
    shown = ticks(min(values), max(values))
    low, high = scale(shown[0]), scale(shown[-1])
    return lambda value: round(first + (scale(value) - low) / (high - low) * (last - first), 1), shown


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - span / 2, high + span / 2)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(start, end + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Each a 1, 2 or 5 of some power of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    start = max(step for step in steps if step <= low)
    end = min(step for step in steps if step >= high and step > start)
    return [step for step in steps if start <= step <= end]
