"""The report of `accel bench ar`: numbers from the records of its run folders, as Markdown, JSON, CSV and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel.evaluation.bootstrap import mean_interval
from accel.evaluation.configurations import PLAIN
from accel.evaluation.folder import RunFolder
from accel.evaluation.records import Record, write_atomically
from accel.evaluation.report import plot, summarise
from accel.evaluation.report.table import Table
from accel.evaluation.report.tables import distance_cell, facts, interval

Key = tuple[int, int]  # prompt id, sample
Records = dict[str, dict[Key, Record]]  # by configuration

NAME = "autoregressive"
#: A colour for all whose name begins so.
FAMILIES = (
    *("lossless", "sjd", "gsd", "grouped", "mixture-as-grouped", "budget-group", "budget-mixture"),
    *("transformers", "plain"),
)
_EXPLAINED = """\
NFE: forwards of the model for an image, the prompt's included; plain decoding takes one per token. ms/forward is
the time in the transformer alone. Speedups are geometric means of ratios of times for the same prompt in the same
start of the process; brackets are 95 % bootstrap intervals over prompts. "of NFE" is the speedup over plain
decoding divided by the ratio of forwards: what is left of the saving on the clock. TV/token is the total variation
between the distribution that a token was drawn from and the model's: 0 is lossless. "same" counts images that are
plain decoding's pixel for pixel. `plain-again` is plain decoding from other seeds: what scores and FID are when
only chance differs. `mixture-as-X` spends what X spends. FID is measured to plain decoding's images; it is not
comparable to a published one."""


def write(folder: RunFolder, by_size: Mapping[int, RunFolder], problems: Mapping[str, str]) -> Path:
    """Write `report/autoregressive.md`, `.json`, `.csv` and two plots; returns the Markdown.

    Args:
        folder: calls of one image, scored.
        by_size: folders of larger batches, by images per call.
        problems: configurations that were not run, with the reason.
    """
    summary = summarise(folder)
    records = _records(folder)
    result: dict[str, Any] = {
        **{key: summary[key] for key in ("run", "images", "prompts", "bounds", "sessions", "notes")},
        "rows": _rows(records, summary),
        "batch_sizes": _batch_rows(1, records)
        + [row for size, own in by_size.items() for row in _batch_rows(size, _records(own))],
        "problems": dict(problems),
    }
    target = folder.path / "report"
    plots = _plots(result, target)
    write_atomically(target / f"{NAME}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_atomically(target / f"{NAME}.csv", Table.of([_flat(row) for row in result["rows"]]).csv())
    page = target / f"{NAME}.md"
    write_atomically(page, _markdown(result, summary, plots))
    return page


def _records(folder: RunFolder) -> Records:
    """Samples that every configuration has."""
    found: Records = {name: {} for name in folder.configurations}
    for record in folder.samples():
        found[record["configuration"]][record["prompt_id"], record["sample"]] = record
    keys = set.intersection(*(set(own) for own in found.values()))
    return {name: {key: own[key] for key in sorted(keys)} for name, own in found.items()}


def _rows(records: Records, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per configuration, as plain data."""
    plain, theirs = records[PLAIN], records.get("transformers")
    metrics = {
        row["name"]: row["metrics"].get(summary["suite_metric"], {}) for row in summary["configurations"]
    }
    distances = {d["configuration"]: d for d in summary["distances"] if d["to"] == PLAIN}
    settings = {row["name"]: row["settings"]["method"] for row in summary["configurations"]}
    rows = []
    for name, own in records.items():
        forwards = _mean(own, "forwards")
        p10, median, p90 = np.quantile([r["seconds"] for r in own.values()], [0.1, 0.5, 0.9]).tolist()
        row: dict[str, Any] = {
            "name": name,
            "settings": settings[name],
            "images": len(own),
            "nfe": forwards,
            "tokens_per_forward": _mean(own, "tokens_per_forward"),
            "ms_per_forward": _ms_per_forward(own),
            "seconds": {"median": median, "p10": p10, "p90": p90},
            "speedup": speedup(plain, own),
            "speedup_over_transformers": None if theirs is None else speedup(theirs, own),
            "score": metrics[name].get("mean"),
            "score_difference": metrics[name].get("difference"),
            "fid": _fid(distances.get(name)),
            "tv_per_token": _mean(own, "tv_per_token"),
            "identical": sum(r["image_sha256"] == plain[key]["image_sha256"] for key, r in own.items()),
        }
        base = _mean(plain, "forwards")
        row["nfe_gain"] = base["value"] / forwards["value"] if base and forwards else None
        row["of_nfe_gain"] = row["speedup"]["value"] / row["nfe_gain"] if row["nfe_gain"] else None
        rows.append(row)
    return rows


def _mean(own: dict[Key, Record], name: str) -> dict[str, Any] | None:
    values = [record.get(name) for record in own.values()]
    if None in values:  # compiled: its forwards cannot be counted
        return None
    return mean_interval(np.array(values, float), [prompt for prompt, _ in own]).to_dict()


def _ms_per_forward(own: dict[Key, Record]) -> float | None:
    if any(not r["denoiser_seconds"] or not r.get("forwards") for r in own.values()):
        return None
    spent = sum(r["denoiser_seconds"] * r["batch"] for r in own.values())
    return 1000 * spent / sum(r["forwards"] for r in own.values())


def _fid(distance: dict[str, Any] | None) -> dict[str, Any] | None:
    if distance is None:
        return None
    names = ("extractor", "n", "reason", "fid_reason")
    ends = distance.get("intervals", {}).get("fid") or (None, None)
    found = {name: distance[name] for name in names if name in distance}
    return {"value": distance.get("fid"), "low": ends[0], "high": ends[1], **found}


def speedup(base: dict[Key, Record], own: dict[Key, Record]) -> dict[str, Any]:
    """Geometric mean of base seconds / own seconds with its interval, over calls of the same start of the process.

    The images of one call share its time: a call is one measurement, however many images it has.
    """
    calls: dict[tuple, tuple[float, int]] = {}
    for key, record in own.items():
        other = base[key]
        if other["session"] == record["session"]:
            call = (record["session"], other["seconds"], record["seconds"])
            calls.setdefault(call, (math.log(other["seconds"] / record["seconds"]), key[0]))
    if not calls:
        return {"value": None, "low": None, "high": None, "n": 0}
    logs, prompts = zip(*calls.values(), strict=True)
    found = mean_interval(logs, prompts)
    ends = (found.low, found.high)
    low, high = (None if end is None else math.exp(end) for end in ends)
    return {"value": math.exp(found.value), "low": low, "high": high, "n": len(calls), "reason": found.reason}


def _batch_rows(size: int, records: Records) -> list[dict[str, Any]]:
    """Images per second at one batch size."""
    rows = []
    for name, own in records.items():
        median = float(np.median([record["seconds"] for record in own.values()]))
        windows = sorted(record.get("window", 1) for record in own.values())
        rows.append(
            {
                "batch_size": size,
                "name": name,
                "images_per_second": 1 / median,
                "speedup": speedup(records[PLAIN], own),
                "window": windows[len(windows) // 2],
            }
        )
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A column for every number: `speedup_value`, `speedup_low`, ..."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            settings = json.dumps(value) if key == "settings" else None
            cells |= {key: settings} if settings else {f"{key}_{part}": v for part, v in value.items()}
        else:
            cells[key] = value
    return cells


def _markdown(result: dict[str, Any], summary: dict[str, Any], plots: Sequence[str]) -> str:
    header = ["", "NFE", "fewer", "ms/forward", "s/image (p10–p90)", "speedup over plain", "of NFE"]
    header += ["over transformers", "scenes score", "difference", "FID to plain", "TV/token", "same"]
    cells = []
    for row in result["rows"]:
        seconds = row["seconds"]
        cells.append(
            [
                row["name"],
                _cell(row["nfe"], 1),
                _number(row["nfe_gain"], "{:.2f}×"),
                _number(row["ms_per_forward"], "{:.2f}"),
                f"{seconds['median']:.3g} ({seconds['p10']:.3g}–{seconds['p90']:.3g})",
                _cell(row["speedup"], 2),
                _number(row["of_nfe_gain"], "{:.2f}"),
                _cell(row["speedup_over_transformers"], 2),
                _cell(row["score"], 3),
                _cell(row["score_difference"], 3, signed=True),
                _fid_cell(row["fid"]),
                _cell(row["tv_per_token"], 4),
                f"{row['identical']}/{row['images']}",
            ]
        )
    sizes = sorted({row["batch_size"] for row in result["batch_sizes"]})
    parts = ["# Decoding an autoregressive model", ""]
    parts += [f"- {name}: {value}" for name, value in facts(summary)]
    parts += ["", f"{result['images']} images of {result['prompts']} prompts per row. {_EXPLAINED}"]
    parts += ["", Table(header, cells).markdown(), "", " ".join(_bounds(result["bounds"]))]
    extractor = next((row["fid"]["extractor"] for row in result["rows"] if row["fid"]), None)
    if extractor:
        parts.append(f"FID's features: {extractor}, n = {result['images']}.")
    parts += [
        "",
        Table(["", *map(str, sizes)], _batch_cells(result["batch_sizes"], sizes), "Batch sizes").markdown(),
    ]
    parts += ["", "Images per second; speedup over plain decoding at the same batch size.", ""]
    parts += _limits(result["batch_sizes"])
    parts += [f"![{Path(name).stem}]({name})" for name in plots]
    if result["problems"]:
        parts += ["", "## Not run", "", *(f"- `{name}`: {why}" for name, why in result["problems"].items())]
    return "\n".join([*parts, *(["", *result["notes"]] if result["notes"] else []), ""])


def _bounds(bounds: dict[str, Any] | None) -> list[str]:
    if bounds is None:
        return []
    named = {"ceiling": "drawn from the prompts", "floor": "drawn from other prompts of the same task"}
    return [
        f"Score's {name} (pictures {what}): "
        + (interval(bounds[name]["overall"]) if bounds.get(name) else "not available, too few prompts")
        + "."
        for name, what in named.items()
    ]


def _batch_cells(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[list[str]]:
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["batch_size"]] = row
    cells = []
    for name, own in by_name.items():
        if len(own) < len(sizes):  # what is only run alone
            continue
        line = [name]
        for size in sizes:
            window = f" (W = {own[size]['window']})" if name.endswith("auto") else ""
            line.append(f"{own[size]['images_per_second']:.3g}; {_cell(own[size]['speedup'], 2)}{window}")
        cells.append(line)
    return cells


def _limits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Up to which batch size each way pays: its interval lies above 1."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["batch_size"])
        if len(own) < 2 or not name.startswith(("lossless", "grouped")):
            continue
        paying = [row["batch_size"] for row in own if (row["speedup"]["low"] or 0) > 1]
        said = f"sooner than plain at batch sizes {', '.join(map(str, paying))}" if paying else "at none"
        lines.append(f"- `{name}`: {said} of those measured.")
    return [*lines, ""] if lines else []


def _cell(entry: dict[str, Any] | None, digits: int, *, signed: bool = False) -> str:
    return "–" if entry is None or entry["value"] is None else interval(entry, digits, signed=signed)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _fid_cell(fid: dict[str, Any] | None) -> str:
    if fid is None:
        return "–"
    if fid["value"] is None:
        return f"none: {fid.get('fid_reason') or fid.get('reason')}"
    return distance_cell(fid["value"], None if fid["low"] is None else (fid["low"], fid["high"]))


def _plots(result: dict[str, Any], target: Path) -> list[str]:
    """Write the plots; their file names."""
    drawn = {
        "trade-off.svg": trade_off(result["rows"], result["bounds"]),
        "batch-sizes.svg": batch_sizes(result["batch_sizes"]),
    }
    for name, plots in drawn.items():
        write_atomically(target / name, plot.file(plots))
    return list(drawn)


def trade_off(rows: Sequence[dict[str, Any]], bounds: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Speedup over plain decoding against what it costs: total variation, and the suite's score if there is one."""
    ceiling = (bounds or {}).get("ceiling")
    lines = [("ceiling", ceiling["overall"]["value"])] if ceiling else []
    shared: dict[str, Any] = {"across": "speedup over plain decoding", "sheet": plot.FILE}
    lost, score = _points(rows, "tv_per_token"), _points(rows, "score")
    title = "total variation per token (0 is lossless)"
    drawn = [plot.layout(lost, label=title, higher_is_better=False, **shared)] if lost else []
    return drawn + ([plot.layout(score, label="scenes score", lines=lines, **shared)] if score else [])


def batch_sizes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images per second against images per call, of what ran at every size."""
    most = len({row["batch_size"] for row in rows})
    names = [row["name"] for row in rows]
    points = [
        plot.Point(row["name"], row["batch_size"], row["images_per_second"], None, None, "", row["name"])
        for row in rows
        if names.count(row["name"]) == most
    ]
    label, across = "images per second", "images per call"
    return [plot.layout(points, label=label, across=across, series=True, sheet=plot.FILE)]


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[plot.Point]:
    """Grouped by family, in the families' order: a colour is the same in every plot that has them all."""
    points = []
    for row in rows:
        across, up = row["speedup"], row[key]
        if up and across["value"]:
            family = next(family for family in FAMILIES if row["name"].startswith(family))
            detail, ends = f"{across['value']:.2f}× · {up['value']:.4g}", (across["low"], across["high"])
            at = across["value"], up["value"], up["low"], up["high"]
            points.append(plot.Point(row["name"], *at, detail, family, ends))
    return sorted(points, key=lambda point: FAMILIES.index(point.group))
