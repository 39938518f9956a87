"""The summary as rows of text: the same cells for HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

Summary = dict[str, Any]

_UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips[alex]": "LPIPS"}


def interval(entry: dict[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """`0.812 [0.760, 0.860]`; a dash where there is no number."""
    if entry is None:
        return "–"
    sign = "+" if signed else ""
    value = f"{entry['value']:{sign}.{digits}f}"
    if entry["low"] is None:
        return f"{value} [n too small]"
    return f"{value} [{entry['low']:{sign}.{digits}f}, {entry['high']:{sign}.{digits}f}]"


def metric_title(metric: str, summary: Summary) -> str:
    if metric == summary["suite_metric"]:
        return f"{metric} score"
    return _UNITS.get(metric, metric)


def metric_names(summary: Summary) -> list[str]:
    """Metrics of the run: the suite's score first, then in order of appearance."""
    names = dict.fromkeys(m for row in summary["configurations"] for m in row["metrics"])
    return sorted(names, key=lambda m: m != summary["suite_metric"])


def metric_cell(entry: dict[str, Any] | None, *, plain: bool = False) -> str:
    """Mean with interval, how many pairs are identical, and the paired difference to plain."""
    if entry is None:
        return "reference" if plain else "–"
    digits = 2 if "mean" in entry and abs(entry["mean"]["value"]) >= 10 else 3
    parts = [interval(entry["mean"], digits)] if "mean" in entry else []
    if entry["identical"]:
        parts.append(f"{entry['identical']} identical")
    if entry["missing"]:
        parts.append(f"{entry['missing']} without a value")
    if "difference" in entry:
        parts.append(f"difference {interval(entry['difference'], digits, signed=True)}")
    return "; ".join(parts) or "–"


def lines(cell: str) -> list[tuple[str, str]]:
    """A cell's parts as (value, its interval or spread), for a table that sets them below each other."""
    parts = []
    for part in cell.split("; "):
        match = re.match(r"(.*?)(?: ([\[(].*))?$", part, re.DOTALL)
        assert match is not None
        parts.append((match[1], match[2] or ""))
    return parts


def main_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """One row per configuration: speed, memory and quality together."""
    metrics = metric_names(summary)
    header = ["configuration", "speedup", "s/image, median (p10–p90)", "denoiser speedup", "denoiser s"]
    header += ["images/s", "peak memory"] + [metric_title(metric, summary) for metric in metrics]
    rows = []
    for row in summary["configurations"]:
        speed = row["speed"]
        pipeline, denoiser = speed["pipeline"], speed["denoiser"]
        cells = [row["name"], _speedup(pipeline), _spread(pipeline), _speedup(denoiser), _spread(denoiser)]
        cells.append(f"{pipeline['images_per_second']:.3g}" if pipeline else "–")
        cells.append(
            f"{speed['peak_bytes'] / 2**20:.0f} MiB {speed['peak_kind']}" if speed["peak_bytes"] else "–"
        )
        is_plain = row["name"] == summary["plain"]
        cells += [metric_cell(row["metrics"].get(metric), plain=is_plain) for metric in metrics]
        rows.append(cells)
    return header, rows


def task_table(summary: Summary) -> tuple[list[str], list[list[str]]] | None:
    """Suite score per task and configuration, with ceiling and floor where the suite has them."""
    metric = summary["suite_metric"]
    if metric is None:
        return None
    entries = {row["name"]: row["metrics"].get(metric, {}) for row in summary["configurations"]}
    tasks = list(dict.fromkeys(task for entry in entries.values() for task in entry.get("tasks", {})))
    rows = [
        [name, *(interval(entry.get("tasks", {}).get(task)) for task in tasks), interval(entry.get("mean"))]
        for name, entry in entries.items()
    ]
    for bound, title in (
        ("ceiling", "ceiling: ground-truth pictures"),
        ("floor", "floor: mismatched prompts"),
    ):
        values = (summary["bounds"] or {}).get(bound)
        if values:
            own = [interval(values["tasks"].get(task)) for task in tasks]
            rows.append([title, *own, interval(values["overall"])])
        else:
            rows.append([f"{title} (not available for this suite)", *["–"] * len(tasks), "–"])
    return ["configuration", *tasks, "overall"], rows


def distance_table(summary: Summary) -> tuple[list[str], list[list[str]]] | None:
    """Set distances with their n, reference and extractor; a reason where there is no number."""
    if not summary["distances"]:
        return None
    names = ["fid", "kid", "cmmd", "precision", "recall"]
    rows = []
    for row in summary["distances"]:
        cells = [row["configuration"], row["to"], row["extractor"], str(row.get("n", "–"))]
        for name in names:
            value = row.get(name)
            reason = row.get(f"{name}_reason") or row.get("reason")
            cells.append(f"{value:.4g}" if value is not None else f"none: {reason}" if reason else "–")
        rows.append(cells)
    return [
        "configuration",
        "compared to",
        "extractor",
        "n",
        "FID",
        "KID",
        "CMMD",
        "precision",
        "recall",
    ], rows


def markdown(summary: Summary) -> str:
    """The report's tables as Markdown."""
    parts = [f"# Quality against speed: {_escape(summary['run']['model'])}", "", caption(summary), ""]
    for table in (main_table(summary), task_table(summary), distance_table(summary)):
        if table is None:
            continue
        header, rows = table
        lines = [header, ["---"] * len(header), *rows]
        parts += ["| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines] + [""]
    parts += [f"- {_escape(note)}" for note in summary["notes"]]
    return "\n".join(parts).rstrip() + "\n"


def as_csv(summary: Summary) -> str:
    """One row per configuration, numbers only, for a spreadsheet."""
    rows = []
    for row in summary["configurations"]:
        flat: dict[str, Any] = {"configuration": row["name"], "n": row["images"]}
        for part in ("pipeline", "denoiser"):
            values = row["speed"][part] or {}
            for key in ("median", "p10", "p90", "images_per_second"):
                flat[f"{part}_{key}"] = values.get(key)
            flat |= _columns(f"{part}_speedup", values.get("speedup"))
        flat["peak_bytes"] = row["speed"]["peak_bytes"]
        for metric in metric_names(summary):
            entry = row["metrics"].get(metric, {})
            flat |= _columns(metric, entry.get("mean")) | _columns(
                f"{metric}_difference", entry.get("difference")
            )
        for distance in summary["distances"]:
            if distance["configuration"] == row["name"]:
                for key in ("fid", "kid", "cmmd", "precision", "recall"):
                    flat[f"{key}_to_{distance['to']}[{distance['extractor']}]"] = distance.get(key)
        rows.append(flat)
    fields = list(dict.fromkeys(key for flat in rows for key in flat))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def caption(summary: Summary) -> str:
    """What the numbers are over, in one paragraph."""
    run = summary["run"]
    session = summary["sessions"][-1] if summary["sessions"] else {}
    where = f" on {session['device']} (torch {session['versions']['torch']})" if session else ""
    return (
        f"{summary['images']} images of {summary['prompts']} prompts (suite {run['suite']['name']}) per "
        f"configuration{where}. Speedups are medians of ratios to {summary['plain']!r} for the same prompt "
        "and seed in the same process. Brackets are 95 % intervals, over resampled prompts for quality. "
        "Pairs share prompt, seed and initial noise."
    )


def _speedup(part: dict[str, Any] | None) -> str:
    if part is None or part["speedup"] is None:
        return "–"
    entry = part["speedup"]
    bounds = f"[{entry['low']:.2f}, {entry['high']:.2f}]" if entry["low"] is not None else "[n too small]"
    return f"{entry['value']:.2f}× {bounds}"


def _spread(part: dict[str, Any] | None) -> str:
    return f"{part['median']:.3g} ({part['p10']:.3g}–{part['p90']:.3g})" if part else "–"


def _columns(name: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    entry = entry or {}
    return {name: entry.get("value"), f"{name}_low": entry.get("low"), f"{name}_high": entry.get("high")}


def _escape(cell: str) -> str:
    for character in ("\\", "|", "`", "*", "_", "[", "<"):
        cell = cell.replace(character, "\\" + character)
    return " ".join(cell.split())
