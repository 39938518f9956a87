"""Who is fastest at a given distance from the plain pictures: the table and the plot of `accel bench peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel import methods
from accel.evaluation.report.table import Markdown, Table

LEVELS = range(28, 43, 2)  # dB
OURS, PEERS, STEPS = "accel", "peers", "fewer steps"
READINGS = {"mean": "Mean PSNR", "p10": "10th percentile of PSNR"}
#: Schemes of others that accel computes for comparison.
_COMPARED = ("tomesd", "cat")
_STYLES = {OURS: ("o", "#0b6e4f"), PEERS: ("s", "#c8553d"), STEPS: ("^", "#8d99ae")}


@dataclass(frozen=True)
class Entry:
    """A configuration: whose it is, its speedup with its 95 % interval (None: too few prompts), its PSNR, mean and
    10th percentile over prompts, and its score."""

    name: str
    group: str
    speedup: float
    mean: float
    p10: float
    score: float | None
    bound: float | None  # the plain pipeline's multiply-accumulates over its own
    interval: tuple[float, float] | None = None


def group_of(name: str, method: Mapping[str, Any] | None) -> str:
    """Whose a setting is, from what the run recorded of it: this start may not have asked for it."""
    if method is None:
        return STEPS
    own = {methods.config_class(known).__name__ for known in methods.names()}
    return OURS if method["type"] in own and name not in _COMPARED else PEERS


def entries(summary: Mapping[str, Any], macs: Mapping[str, int] | None = None) -> list[Entry]:
    """What a report says of all but the plain pipeline; speedups are of the denoiser. Without a speedup or a PSNR
    there is no entry."""
    found = []
    for row in summary["configurations"]:
        name, metrics = row["name"], row["metrics"]
        speedup, psnr = (row["speed"]["denoiser"] or {}).get("speedup"), metrics.get("psnr", {})
        if name == summary["plain"] or speedup is None or "mean" not in psnr:
            continue
        ends = None if speedup["low"] is None else (speedup["low"], speedup["high"])
        group = group_of(name, row["settings"]["method"])
        bound = macs[summary["plain"]] / macs[name] if macs and name in macs else None
        mean, p10, score = psnr["mean"]["value"], psnr["p10"], _score(row, summary["suite_metric"])
        found.append(Entry(name, group, speedup["value"], mean, p10, score, bound, ends))
    return found


def left_out(summary: Mapping[str, Any], items: Sequence[Entry]) -> list[str]:
    """Names of the configurations of a report that cannot be among the entries."""
    known = {summary["plain"], *(item.name for item in items)}
    return [row["name"] for row in summary["configurations"] if row["name"] not in known]


def plain_score(summary: Mapping[str, Any]) -> float | None:
    """The plain pipeline's score by the suite; None: the suite has none."""
    plain = next(row for row in summary["configurations"] if row["name"] == summary["plain"])
    return _score(plain, summary["suite_metric"])


def _score(row: Mapping[str, Any], metric: str | None) -> float | None:
    scored = row["metrics"].get(metric, {})
    return scored["mean"]["value"] if "mean" in scored else None


def fastest(items: Sequence[Entry], group: str, level: float, key: str) -> Entry | None:
    """Of a group, the fastest that is at least this close; None: none is."""
    close = [item for item in items if item.group == group and getattr(item, key) >= level]
    return max(close, key=lambda item: (item.speedup, getattr(item, key)), default=None)


def markdown(items: Sequence[Entry], missing: Sequence[str] = ()) -> str:
    """All settings, those `missing` by name; then for each level, and for both readings of it, the fastest of each
    group and accel's over the others'."""
    parts = ["", _every(items).markdown()]
    if missing:
        named = ", ".join(f"`{name}`" for name in missing)
        parts.append(
            f"Not in these tables: {named}. They were not timed in one start with the plain pipeline (a new folder "
            "does that), or all their pictures are the plain ones."
        )
    parts += [_by_level(items, key, title).markdown() for key, title in READINGS.items()]
    return "\n\n".join(parts).removeprefix("\n")


def _every(items: Sequence[Entry]) -> Table:
    header = ["setting", "whose", "denoiser, 95 % interval", "by multiply-accumulates"]
    header += ["PSNR (dB)", "10th percentile", "score"]
    rows = []
    for e in sorted(items, key=lambda e: -e.speedup):
        ends = f" [{e.interval[0]:.2f}, {e.interval[1]:.2f}]" if e.interval else ""
        bound, score = (
            "" if e.bound is None else f"{e.bound:.2f}x",
            "" if e.score is None else f"{e.score:.3f}",
        )
        cells = [f"{e.speedup:.2f}x{ends}", bound, f"{e.mean:.1f}", f"{e.p10:.1f}", score]
        rows.append([Markdown(f"`{e.name}`"), e.group, *cells])
    return Table(header, rows, "All settings, fastest first")


def _by_level(items: Sequence[Entry], key: str, title: str) -> Table:
    header = ["at least", PEERS, STEPS, OURS, "accel / the faster of the others"]
    rows = []
    for level in LEVELS:
        best = {group: fastest(items, group, level, key) for group in (PEERS, STEPS, OURS)}
        others, own = [e.speedup for g, e in best.items() if e and g != OURS], best[OURS]
        cells = [Markdown(f"{e.speedup:.2f}x `{e.name}`") if e else "none: 1x" for e in best.values()]
        ratio = f"{own.speedup / max([1.0, *others]):.2f}" if own else "slower"
        rows.append([f"{level} dB", *cells, ratio])
    return Table(header, rows, f"Fastest by distance: {title} to the plain pictures")


def plot(
    items: Sequence[Entry],
    path: Path,
    across: str = "speedup of the denoiser over the plain pipeline",
    plain_score: float | None = None,
) -> None:
    """Speedup against both readings of PSNR, and against the score where there is one, with the front of each group;
    better is up and to the right."""
    from matplotlib.figure import Figure

    readings = {
        "mean": "PSNR to the plain pictures, mean (dB)",
        "p10": "PSNR to the plain pictures, 10th percentile over prompts (dB)",
    }
    rows: list[Any] = [list(readings)]
    if any(e.score is not None for e in items):
        readings["score"] = "score of the suite"
        rows.append(["score", "score"])  # many share a score: names beside each other need the width
    # Laid out at the resolution it is saved at: letters are not equally wide at another.
    figure = Figure(figsize=(12, 5.2 * len(rows)), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic(rows)
    for key, axes in panels.items():
        for group, (marker, color) in _STYLES.items():
            own = [e for e in items if e.group == group and getattr(e, key) is not None]
            x, y = [e.speedup for e in own], [getattr(e, key) for e in own]
            axes.scatter(x, y, s=28, color=color, marker=marker, label=group)
            front = [e for e in own if fastest(own, group, getattr(e, key), key) is e]
            front.sort(key=lambda e: e.speedup)
            axes.plot([e.speedup for e in front], [getattr(e, key) for e in front], color=color, linewidth=1)
        axes.margins(
            x=0.06 if key == "score" else 0.12, y=0.15 if key == "score" else 0.08
        )  # room for labels
        axes.set_xlabel(across)
        axes.set_ylabel(readings[key])
        axes.grid(color="#eee")
        axes.set_axisbelow(True)
        if key == "score" and plain_score is not None:
            axes.axhline(plain_score, color="#444", linewidth=1, linestyle=":", label="plain")
    panels[rows[-1][-1]].legend()
    figure.draw_without_rendering()  # labels are placed by where the points came to lie
    for key, axes in panels.items():
        _label(axes, {e: (e.speedup, getattr(e, key)) for e in items if getattr(e, key) is not None})
    figure.savefig(path)


def _label(axes: Any, points: Mapping[Entry, tuple[float, float]]) -> None:
    """A name beside each point, at the first of some places where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    centers = axes.transData.transform(list(points.values())) if points else []
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in centers]
    # A horizontal line would strike names through.
    taken += [line.get_window_extent() for line in axes.lines if line.get_transform() != axes.transData]
    legend = axes.get_legend()
    taken += [legend.get_window_extent()] if legend else []
    places = [
        (side * 5, dy) for far in range(4) for dy in (-2, 4 + 8 * far, -8 - 8 * far) for side in (1, -1)
    ]
    for entry, point in points.items():
        texts = [
            axes.annotate(
                entry.name,
                point,
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=6,
                color=_STYLES[entry.group][1],
            )
            for dx, dy in places
        ]
        boxes = [text.get_window_extent() for text in texts]
        inside = [axes.bbox.count_contains(box.corners()) == 4 for box in boxes]
        covered = [box.count_overlaps(taken) for box in boxes]
        best = min(range(len(places)), key=lambda i: (not inside[i], covered[i], i))
        taken.append(boxes[best])
        for i, text in enumerate(texts):
            if i != best:
                text.remove()
        dx, dy = places[best]
        if abs(dy) > 8:  # too far off to be taken for this point's
            color = _STYLES[entry.group][1]
            end = {
                "textcoords": "offset points",
                "arrowprops": {"arrowstyle": "-", "color": color, "linewidth": 0.4},
            }
            axes.annotate("", point, (dx, dy + (0 if dy > 0 else 5)), **end)
