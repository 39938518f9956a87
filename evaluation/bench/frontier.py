"""Who is fastest at a given distance from the plain pictures: the table and the plot of `accel bench peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel import methods
from accel.evaluation.report.plot import FILE, Point, layout
from accel.evaluation.report.table import Markdown, Table

LEVELS = range(28, 43, 2)  # dB
OURS, PEERS, STEPS = "accel", "peers", "fewer steps"
READINGS = {"mean": "Mean PSNR", "p10": "10th percentile of PSNR"}
#: Schemes of others that accel computes for comparison.
_COMPARED = ("tomesd", "cat")
GROUPS = (OURS, PEERS, STEPS)


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


def plots(items: Sequence[Entry], plain_score: float | None = None) -> list[dict[str, Any]]:
    """Speedup against both readings of PSNR, and against the score where there is one, with the front of each group;
    better is up and to the right."""
    readings = {
        "mean": "PSNR to the plain pictures, mean (dB)",
        "p10": "PSNR to the plain pictures, 10th percentile over prompts (dB)",
        "score": "score of the suite",
    }
    drawn = []
    for key, label in readings.items():
        known = [(e, getattr(e, key)) for e in items if getattr(e, key) is not None]
        known.sort(
            key=lambda pair: GROUPS.index(pair[0].group)
        )  # whose colour is whose does not depend on the run
        points = [
            Point(
                e.name,
                e.speedup,
                y,
                None,
                None,
                f"{e.speedup:.2f}× · {y:.3g}",
                e.group,
                e.interval or (None, None),
            )
            for e, y in known
        ]
        lines = [("plain", plain_score)] if key == "score" and plain_score is not None else []
        if points:
            across = "speedup of the denoiser over the plain pipeline"
            drawn.append(layout(points, label=label, across=across, lines=lines, sheet=FILE))
    return drawn
