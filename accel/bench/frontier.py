"""Who is fastest at a given distance from the plain pictures: the table and the plot of `accel bench peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.evaluation.configurations import Configuration

from .peers import Peer

LEVELS = range(28, 43, 2)  # dB
OURS, PEERS, STEPS = "accel", "peers", "fewer steps"
#: Schemes of others that accel computes for comparison.
_COMPARED = ("tomesd", "cat")
_STYLES = {OURS: ("o", "#0b6e4f"), PEERS: ("s", "#c8553d"), STEPS: ("^", "#8d99ae")}


@dataclass(frozen=True)
class Entry:
    """A configuration: whose it is, its speedup, its PSNR, mean and 10th percentile over prompts, and its score."""

    name: str
    group: str
    speedup: float
    mean: float
    p10: float
    score: float | None
    bound: float | None  # the plain pipeline's multiply-accumulates over its own


def group_of(item: Configuration) -> str:
    if isinstance(item, Peer) or item.name in _COMPARED:
        return PEERS
    return STEPS if item.method is None else OURS


def entries(
    summary: Mapping[str, Any], configurations: Sequence[Configuration], macs: Mapping[str, int] | None = None
) -> list[Entry]:
    """What a report says of all but the plain pipeline; speedups are of the denoiser."""
    groups = {item.name: group_of(item) for item in configurations}
    found = []
    for row in summary["configurations"]:
        speed, psnr = row["speed"]["denoiser"], row["metrics"].get("psnr", {})
        if row["name"] == summary["plain"] or row["name"] not in groups or not (speed and "mean" in psnr):
            continue
        ratio, scored = speed["speedup"]["value"], row["metrics"].get(summary["suite_metric"], {})
        score = scored["mean"]["value"] if "mean" in scored else None
        mean, p10 = psnr["mean"]["value"], psnr["p10"]
        bound = macs[summary["plain"]] / macs[row["name"]] if macs and row["name"] in macs else None
        found.append(Entry(row["name"], groups[row["name"]], ratio, mean, p10, score, bound))
    return found


def fastest(items: Sequence[Entry], group: str, level: float, key: str) -> Entry | None:
    """Of a group, the fastest that is at least this close; None: none is."""
    close = [item for item in items if item.group == group and getattr(item, key) >= level]
    return max(close, key=lambda item: (item.speedup, getattr(item, key)), default=None)


def markdown(items: Sequence[Entry]) -> str:
    """All settings; then for each level, and for both readings of it, the fastest of each group and accel's over
    the others'."""
    lines = [
        "",
        "## All settings, fastest first",
        "",
        "| setting | whose | denoiser | by multiply-accumulates | PSNR (dB) | 10th percentile | score |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in sorted(items, key=lambda e: -e.speedup):
        score = "" if e.score is None else f"{e.score:.3f}"
        bound = "" if e.bound is None else f"{e.bound:.2f}x"
        cells = [f"`{e.name}`", e.group, f"{e.speedup:.2f}x", bound, f"{e.mean:.1f}", f"{e.p10:.1f}", score]
        lines.append(f"| {' | '.join(cells)} |")
    for key, title in (("mean", "Mean PSNR"), ("p10", "10th percentile of PSNR")):
        lines += [
            "",
            f"## Fastest by distance: {title} to the plain pictures",
            "",
            f"| at least | {PEERS} | {STEPS} | {OURS} | accel / the faster of the others |",
            "| --- | --- | --- | --- | --- |",
        ]
        for level in LEVELS:
            best = {group: fastest(items, group, level, key) for group in (PEERS, STEPS, OURS)}
            others = [e.speedup for g, e in best.items() if e and g != OURS]
            own = best[OURS]
            ratio = f"{own.speedup / max([1.0, *others]):.2f}" if own else "slower"
            cells = [f"{e.speedup:.2f}x `{e.name}`" if e else "none: 1x" for e in best.values()]
            lines.append(f"| {level} dB | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def plot(
    items: Sequence[Entry], path: Path, across: str = "speedup of the denoiser over the plain pipeline"
) -> None:
    """Speedup against both readings of PSNR, with the front of each group; better is up and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = list(figure.subplots(1, 2))
    readings = (("mean", "mean"), ("p10", "10th percentile over prompts"))
    for axes, (key, title) in zip(panels, readings, strict=True):
        for group, (marker, color) in _STYLES.items():
            own = [item for item in items if item.group == group]
            x, y = [e.speedup for e in own], [getattr(e, key) for e in own]
            axes.scatter(x, y, s=28, color=color, marker=marker, label=group)
            front = [e for e in own if fastest(own, group, getattr(e, key), key) is e]
            front.sort(key=lambda e: e.speedup)
            axes.plot([e.speedup for e in front], [getattr(e, key) for e in front], color=color, linewidth=1)
        axes.margins(x=0.12, y=0.08)  # room for labels
        axes.set_xlabel(across)
        axes.set_ylabel(f"PSNR to the plain pictures, {title} (dB)")
        axes.grid(color="#eee")
        axes.set_axisbelow(True)
    panels[-1].legend()
    figure.draw_without_rendering()  # labels are placed by where the points came to lie
    for axes, (key, _) in zip(panels, readings, strict=True):
        _label(axes, {e: (e.speedup, getattr(e, key)) for e in items})
    figure.savefig(path, dpi=130)


def _label(axes: Any, points: Mapping[Entry, tuple[float, float]]) -> None:
    """A name beside each point, at the first of some places where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    centers = axes.transData.transform(list(points.values())) if points else []
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centers]
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
        inside = [axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes]
        covered = [box.count_overlaps(taken) for box in boxes]
        best = min(range(len(places)), key=lambda i: (not inside[i], covered[i], i))
        taken.append(boxes[best])
        for i, text in enumerate(texts):
            if i != best:
                text.remove()
