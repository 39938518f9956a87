"""The summary as tables: the same cells for HTML and Markdown, and every number for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .table import Table, escaped

Summary = dict[str, Any]

_UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips[alex]": "LPIPS"}


def interval(entry: dict[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """`0.812 [0.760, 0.860]`; a dash where there is no number."""
    if entry is None:
        return "–"

    def number(value: float) -> str:
        return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")

    if entry["low"] is None:
        return f"{number(entry['value'])} [{entry.get('reason') or 'n too small'}]"
    return f"{number(entry['value'])} [{number(entry['low'])}, {number(entry['high'])}]"


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


def main_table(summary: Summary) -> Table:
    """One row per configuration: speed, memory and quality together."""
    metrics = metric_names(summary)
    header = ["configuration", "speedup", "s/image, median (p10–p90)", "denoiser speedup", "denoiser s"]
    header += ["images/s", "peak memory"] + [metric_title(metric, summary) for metric in metrics]
    rows = []
    for row in summary["configurations"]:
        speed = row["speed"]
        pipeline, denoiser = speed["pipeline"], speed["denoiser"]
        is_plain = row["name"] == summary["plain"]
        cells = [row["name"], _speedup(pipeline, is_plain), _spread(pipeline)]
        cells += [_speedup(denoiser, is_plain), _spread(denoiser)]
        cells.append(_three_digits(pipeline["images_per_second"]) if pipeline else "–")
        cells.append(
            f"{speed['peak_bytes'] / 2**20:.0f} MiB {speed['peak_kind']}" if speed["peak_bytes"] else "–"
        )
        cells += [metric_cell(row["metrics"].get(metric), plain=is_plain) for metric in metrics]
        rows.append(cells)
    return Table(header, rows, "Configurations")


def task_table(summary: Summary) -> Table | None:
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
            rows.append([f"{bound}: not available", *["–"] * len(tasks), "–"])
    return Table(["configuration", *tasks, "overall"], rows, "Score per task")


def distance_table(summary: Summary) -> Table | None:
    """Set distances with interval, n, reference and extractor; a reason where there is no number."""
    if not summary["distances"]:
        return None
    titles = {"fid": "FID", "kid": "KID", "cmmd": "CMMD", "precision": "precision", "recall": "recall"}
    shown = [
        name
        for name in titles
        if any(row.get(name) is not None or f"{name}_reason" in row for row in summary["distances"])
    ]
    rows = []
    for row in summary["distances"]:
        to = f"{row['to']} ({row['source']})" if row.get("source") else row["to"]
        cells = [row["configuration"], to, row["extractor"], str(row.get("n", "–"))]
        for name in shown or ["fid"]:
            reason = row.get(f"{name}_reason") or row.get("reason")
            if row.get(name) is not None:
                cells.append(distance_cell(row[name], row["intervals"].get(name)))
            else:
                cells.append(f"none: {reason}" if reason else "–")
        rows.append(cells)
    header = ["configuration", "compared to", "extractor", "n"]
    header += [titles[name] for name in shown or ["fid"]]
    return Table(header, rows, "Distances between sets of images")


def all_tables(summary: Summary) -> list[Table]:
    """Those that this run has."""
    made = (main_table(summary), task_table(summary), distance_table(summary))
    return [table for table in made if table is not None]


def markdown(summary: Summary) -> str:
    """The report's tables as Markdown."""
    parts = [f"# Quality against speed: {escaped(summary['run']['model'])}", "", caption(summary), ""]
    for table in all_tables(summary):
        parts += [table.markdown(), ""]
    parts += [f"- {escaped(note)}" for note in summary["notes"]]
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
            if distance["configuration"] != row["name"]:
                continue
            for key in ("fid", "kid", "cmmd", "precision", "recall"):
                low, high = distance.get("intervals", {}).get(key) or (None, None)
                entry = {"value": distance.get(key), "low": low, "high": high}
                flat |= _columns(f"{key}_to_{distance['to']}[{distance['extractor']}]", entry)
        rows.append(flat)
    return Table.of(rows).csv()


def caption(summary: Summary) -> str:
    """What the numbers are over, in one paragraph."""
    run = summary["run"]
    session = summary["sessions"][-1] if summary["sessions"] else {}
    where = f" on {session['device']} (torch {session['versions']['torch']})" if session else ""
    return (
        f"{summary['images']} images of {summary['prompts']} prompts (suite {run['suite']['name']}) per "
        f"configuration{where}. Speedups are medians of ratios to {summary['plain']!r} for the same prompts "
        "and seeds in the same process, n counts timed calls. Brackets are 95 % intervals, for quality "
        "over resampled prompts. Pairs share prompt, seed and initial noise."
    )


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What a reader asks first about how the run was made, as (name, value)."""
    run = summary["run"]
    call = ", ".join(f"{name} {value}" for name, value in run.get("call", {}).items())
    found = [
        ("model", run["model"]),
        ("pipeline arguments", call or "the pipeline's own"),
        ("images per call", str(run.get("batch_size", "–"))),
        ("images per prompt", str(run.get("samples_per_prompt", "–"))),
        ("base seed", str(run.get("base_seed", "–"))),
    ]
    if "model_weights" in run:  # existing pictures do not say what made them
        scheduler = (run["scheduler"] or {}).get("class", "none that shows")
        found += [
            (
                "pipeline",
                f"{run['pipeline']}, {run['dtype'] or 'unknown dtype'} on {run['device'] or 'unknown device'}",
            ),
            ("scheduler", scheduler),
            ("model weights", run["model_weights"] or "not known: the pipeline shows no modules"),
        ]
    if summary["sessions"]:
        last = summary["sessions"][-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
        devices = dict.fromkeys(session["device"] for session in summary["sessions"])
        cuda = f", CUDA {last['cuda']}" if last.get("cuda") else ""
        found += [
            ("device", ", ".join(devices) + cuda),
            ("processor cores and threads", f"{last.get('cpus') or '–'} and {last['threads']}"),
            ("processes", str(last["world"])),
            ("Python", f"{last['python']} on {last['platform']}"),
            ("versions", versions),
            ("source revision", last.get("git") or "not a checkout"),
            ("command", " ".join(map(str, last["command"]))),
            ("last started", f"{last['time']}; {len(summary['sessions'])} start(s) in all"),
        ]
    return found


def _speedup(part: dict[str, Any] | None, is_plain: bool) -> str:
    if part is None or part["speedup"] is None:
        return "–"
    if is_plain:
        return "1×"
    entry = part["speedup"]
    bounds = f"[{entry['low']:.2f}, {entry['high']:.2f}]" if entry["low"] is not None else "[n too small]"
    return f"{entry['value']:.2f}× {bounds}; n = {entry['n']} call{'s' if entry['n'] != 1 else ''}"


def _spread(part: dict[str, Any] | None) -> str:
    if part is None:
        return "–"
    median, p10, p90 = (_three_digits(part[name]) for name in ("median", "p10", "p90"))
    return f"{median} ({p10}–{p90})"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def distance_cell(value: float, ends: Sequence[float] | None) -> str:
    """`12.31 [10.90, 13.72]`, with as many digits as fit its size."""
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    if ends is None:
        return f"{value:.{digits}f} [no interval]".replace("-", "−")
    return interval({"value": value, "low": ends[0], "high": ends[1]}, digits)


def _columns(name: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    entry = entry or {}
    return {name: entry.get("value"), f"{name}_low": entry.get("low"), f"{name}_high": entry.get("high")}
