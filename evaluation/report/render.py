"""Stage `report`: one self-contained HTML page, Markdown, JSON and CSV from a run folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from accel.evaluation.errors import PictureError
from accel.evaluation.folder import RunFolder, sample_key
from accel.evaluation.picture_files import load_picture
from accel.evaluation.records import write_atomically

from . import tables
from .plot import Point, environment, layout
from .summary import summarise
from .table import lines

_HERE = Path(__file__).parent
_THUMBNAIL = 320  # pixels; larger pictures are shrunk, so that a page stays a few MB
_AMPLIFY = 4


def report(path: str | Path, *, worst: int = 6) -> Path:
    """Write `report/` into run folder `path`; returns the HTML page's path.

    Args:
        worst: how many image triples (plain, configuration, difference) per configuration, the
            furthest apart first.
    """
    folder = RunFolder(path)
    summary = summarise(folder, worst=worst)
    target = folder.path / "report"
    write_atomically(target / "report.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_atomically(target / "report.md", tables.markdown(summary))
    write_atomically(target / "report.csv", tables.as_csv(summary))
    write_atomically(target / "index.html", html(folder, summary))
    return target / "index.html"


def html(folder: RunFolder, summary: dict[str, Any]) -> str:
    """The page. Everything that came from outside passes Jinja's autoescape, and a content security
    policy lets only this page's own script run and nothing be fetched."""
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates = environment()
    templates.filters["lines"] = lines
    return templates.get_template("report.html.j2").render(
        summary=summary,
        caption=tables.caption(summary),
        tables=tables.all_tables(summary),
        plots=_plots(summary),
        grid=_grid(folder, summary),
        amplify=_AMPLIFY,
        facts=tables.facts(summary),
        style="".join((_HERE / name).read_text(encoding="utf-8") for name in ("plot.css", "report.css")),
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _plots(summary: dict[str, Any]) -> list[dict[str, Any]]:
    speedups = {}
    for row in summary["configurations"]:
        pipeline = row["speed"]["pipeline"]
        if pipeline and pipeline["speedup"]:
            speedups[row["name"]] = pipeline["speedup"]["value"]
    plots = []
    for metric in tables.metric_names(summary):
        points, higher = [], True
        for row in summary["configurations"]:
            entry = row["metrics"].get(metric)
            if not entry or "mean" not in entry or row["name"] not in speedups:
                continue
            mean, speedup = entry["mean"], speedups[row["name"]]
            higher = entry["higher_is_better"]
            detail = f"{speedup:.2f}× · {tables.interval(mean)} · n = {mean['n']}"
            points.append(Point(row["name"], speedup, mean["value"], mean["low"], mean["high"], detail))
        lines = []
        if metric == summary["suite_metric"]:
            bounds = summary["bounds"] or {}
            found = ((name, bounds.get(name)) for name in ("ceiling", "floor"))
            lines = [(name, bound["overall"]["value"]) for name, bound in found if bound]
        if points:
            title = tables.metric_title(metric, summary)
            plots.append(layout(points, label=title, higher_is_better=higher, lines=lines))
    for to, extractor in dict.fromkeys((d["to"], d["extractor"]) for d in summary["distances"]):
        points = []
        for d in summary["distances"]:
            name = d["configuration"]
            if (d["to"], d["extractor"]) == (to, extractor) and d.get("fid") is not None and name in speedups:
                low, high = d["intervals"].get("fid") or (None, None)
                cell = tables.distance_cell(d["fid"], d["intervals"].get("fid"))
                detail = f"{speedups[name]:.2f}× · {cell} · n = {d['n']}"
                points.append(Point(name, speedups[name], d["fid"], low, high, detail))
        if points:
            title = f"FID to {to} by {extractor}"
            plots.append(layout(points, label=title, higher_is_better=False))
    return plots


def _grid(folder: RunFolder, summary: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = {
        (name, item["prompt_id"], item["sample"])
        for row in summary["configurations"]
        for item in row["worst"]
        for name in (row["name"], summary["plain"])
    }
    records = {sample_key(r): r for r in folder.samples() if sample_key(r) in wanted}
    reasons = {
        sample_key(r): r["reason"] or "correct"
        for r in folder.scores()
        if r["metric"] == summary["suite_metric"] and sample_key(r) in wanted
    }
    sections = []
    for row in summary["configurations"]:
        items = []
        for item in row["worst"]:
            keys = [(name, item["prompt_id"], item["sample"]) for name in (summary["plain"], row["name"])]
            try:
                plain, own = (
                    load_picture(folder.path / records[key]["image"], records[key]["image_sha256"])
                    for key in keys
                )
            except PictureError:
                continue  # named by `score` already
            difference = ((plain.int() - own.int()).abs() * _AMPLIFY).clamp(max=255).to(torch.uint8)
            items.append(
                {
                    "prompt": records[keys[0]]["prompt"],
                    "seed": records[keys[0]]["seed"],
                    "metric": tables.metric_title(item["metric"], summary),
                    "value": f"{item['value']:.3g}",
                    "images": [_data_uri(image) for image in (plain, own, difference)],
                    "verdicts": [reasons.get(key) for key in keys],
                }
            )
        if items:
            sections.append({"name": row["name"], "items": items})
    return sections


def _data_uri(image: torch.Tensor) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
