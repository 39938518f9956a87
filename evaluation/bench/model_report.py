"""The report of `accel bench model`: a compact table, Markdown, a plot over sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.evaluation.records import write_atomically
from accel.evaluation.report import plot
from accel.evaluation.report.table import NOTHING, Table

from .model_rows import KINDS

NAME = "model"
_COMPILED = "plain+compiled"
_EXPLAINED = """\
Random weights: these are times, and say nothing about pictures. Milliseconds are medians of a denoising step with all
that the pipeline's loop does in it, by what the step computes: all tokens (dense), some (reduced), none (skipped: a
forecast). "step" is plain's dense step divided by the row's reduced one, or dense where it reduces none; plain was
timed before and after each row, in one process. "picture" is the same of a whole picture: steps of each kind times
their medians. "to compiled" divides `plain+compiled` by the row. "plan" is the time of building one, from an
idle device until it is there (in "reduced", already); "host" that from an idle device until a step is launched.
"steps" are those that compute something. "peak" is all that torch had allocated, weights among it."""


def line(data: Mapping[str, Any], size: int, name: str) -> str:
    """What is said of a row when it is done."""
    rows = _rows(data)
    row = next(row for row in rows if (row["size"], row["row"]) == (size, name))
    if "problem" in row:
        return f"{size} px  {name}: {row['problem']}"
    cells = dict(zip(_HEADER, _cells(row, _named(rows, size, _COMPILED)), strict=True))
    values = "  ".join(
        f"{title} {cell}" for title, cell in cells.items() if cell != NOTHING and title != "row"
    )
    return f"{size} px  {name}: {values}; first picture {row['first_seconds']:.1f} s"


def write(path: Path, data: Mapping[str, Any]) -> Path:
    """Write model.md and, of several sizes, model.svg."""
    rows = _rows(data)
    sizes = sorted({row["size"] for row in rows})
    parts = [f"# Speed of a step: {data['settings']['arch']}", "", _made_with(data), "", _EXPLAINED, ""]
    if problems := [row for row in rows if "problem" in row]:
        listed = [[f"{row['size']} px", row["row"], row["problem"]] for row in problems]
        parts += [Table(["size", "row", "why"], listed, "Rows that did not run").markdown(), ""]
    if notes := _notes(rows):
        parts += ["## Notes", "", *notes, ""]
    for size in sizes:  # last, where a terminal shows them
        parts += [table(rows, size).markdown(), ""]
    page = path / f"{NAME}.md"
    write_atomically(page, "\n".join(parts).rstrip() + "\n")
    if len(sizes) > 1 and importlib.util.find_spec("jinja2"):
        write_atomically(path / f"{NAME}.svg", plot.file([_plot(rows)]))
    return page


_HEADER = (
    *("row", "dense ms", "reduced ms", "skipped ms", "plan ms", "host ms", "step", "to compiled"),
    *("s/picture", "picture", "to compiled picture", "peak GiB", "steps"),
)


def table(rows: Sequence[Mapping[str, Any]], size: int) -> Table:
    """One row per row that ran at this size."""
    own = [row for row in rows if row["size"] == size and "problem" not in row]
    compiled = _named(own, size, _COMPILED)
    tokens = f", {own[0]['tokens']} image tokens" if own else ""
    return Table(_HEADER, [_cells(row, compiled) for row in own], f"{size} x {size} pixels{tokens}")


def _rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """With what is derived from the measured."""
    made = []
    for row in data["rows"]:
        if "problem" in row:
            made.append(dict(row))
            continue
        main = "reduced" if "reduced" in row["ms"] else "dense"
        medians = {which: entry["median"] for which, entry in row["ms"].items()}
        plain = row["plain_ms"]["median"]
        # A dense step that only came first is the plain one, which was timed beside it.
        picture = sum(medians.get(which, plain) for which in row["schedule"]) / 1e3
        made.append(
            {
                **row,
                "main": main,
                "picture_seconds": picture,
                "step_speedup": plain / medians[main],
                "picture_speedup": plain * len(row["schedule"]) / 1e3 / picture,
            }
        )
    return made


def _named(rows: Sequence[Mapping[str, Any]], size: int, name: str) -> Mapping[str, Any] | None:
    return next(
        (row for row in rows if row["size"] == size and row["row"] == name and "problem" not in row), None
    )


def _cells(row: Mapping[str, Any], compiled: Mapping[str, Any] | None) -> list[str]:
    def over(key: str) -> str:
        return f"{row[key] / compiled[key]:.2f}x" if compiled else NOTHING

    steps, computed = len(row["schedule"]), sum(which != "skipped" for which in row["schedule"])
    peak = row["peak_bytes"]
    return [
        row["row"],
        *(_ms(row["ms"].get(which)) for which in KINDS),
        _ms(row["plan_build_ms"]),
        _ms(row["host_ms"].get(row["main"])),
        f"{row['step_speedup']:.2f}x",
        over("step_speedup"),
        f"{row['picture_seconds']:.2f}",
        f"{row['picture_speedup']:.2f}x",
        over("picture_speedup"),
        f"{peak / 2**30:.1f}" if peak else NOTHING,
        f"{computed}/{steps}",
    ]


def _ms(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return NOTHING
    value = entry["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _made_with(data: Mapping[str, Any]) -> str:
    settings = data["settings"]
    used = {row["start"] for row in data["rows"] if "problem" not in row}
    starts = [start for number, start in enumerate(data["environments"]) if number in used]

    def every(values: Sequence[Any]) -> str:
        return " and ".join(dict.fromkeys(str(value) for value in values))

    versions = [
        f"{name} {every([start['versions'].get(name) or 'missing' for start in starts])}"
        for name in ("torch", "triton", "diffusers", "cache-dit")
    ]
    tiny = (
        " A few narrow blocks, nothing compiled: a trial of the bench, not a measurement."
        if settings["tiny"]
        else ""
    )
    return (
        f"Made with: {settings['arch']}, {settings['steps']} steps a picture, {settings['dtype']}, "
        f"{settings['device']}; {', '.join(versions)}; source {every([s['git'] or 'unknown' for s in starts])}.{tiny}"
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        said = [f"runs as {row['compiled']}"] if row.get("compiled") else []
        said += [f"{row['graphs']} graphs"] if row.get("graphs") else []
        said += row.get("notes", [])
        if said:
            lines.append(f"- `{row['row']}`, {row['size']} px: {'; '.join(said)}")
    return lines


def _plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    points = [
        plot.Point(row["row"], row["tokens"], row["ms"][row["main"]]["median"], None, None, "", row["row"])
        for row in rows
        if "problem" not in row
    ]
    return plot.layout(
        points, label="milliseconds of a step", across="image tokens", series=True, sheet=plot.FILE
    )
