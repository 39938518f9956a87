"""Records -> one dictionary that holds every number of the report, with interval, n and extractor.

Kept in memory per image: its times and its metric values, nothing else.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from accel.evaluation.bootstrap import Interval, mean_interval
from accel.evaluation.environment import changes
from accel.evaluation.errors import EvaluationError, IncomparableError, RecordError
from accel.evaluation.features import FeatureSet, distances
from accel.evaluation.folder import RunFolder
from accel.evaluation.geneval.scorer import Verdict, aggregate
from accel.evaluation.score import REFERENCE

Key = tuple[int, int]  # prompt id, sample
_RANGES = {"ssim": (-1.0, 1.0), "lpips": (0.0, math.inf)}  # what no interval should leave


@dataclass
class _Column:
    """One metric of one configuration: value (None: cannot be given) per image."""

    higher_is_better: bool
    values: dict[Key, float | None] = field(default_factory=dict)
    tags: dict[Key, str] = field(default_factory=dict)
    identical: int = 0


def summarise(folder: RunFolder, *, worst: int = 6) -> dict[str, Any]:
    """All numbers of a run folder, JSON-ready."""
    settings = folder.settings
    prompts = folder.prompts()
    times: dict[str, dict[Key, dict[str, Any]]] = {name: {} for name in folder.configurations}
    hashes: dict[str, set[str]] = defaultdict(set)
    for record in folder.known_samples(prompts):
        own = times[record["configuration"]]
        own[record["prompt_id"], record["sample"]] = {
            name: record.get(name)
            for name in ("seconds", "denoiser_seconds", "peak_bytes", "peak_kind", "session")
        }
        hashes[record["configuration"]].add(record["configuration_hash"])
    for name, found in hashes.items():
        if len(found) > 1:
            raise IncomparableError(
                f"{folder.path}: images of {name!r} were made with {len(found)} configurations"
            )
    notes = []
    for name in [name for name, own in times.items() if not own]:
        notes.append(f"Configuration {name} has no images yet and is left out.")
        del times[name]
    for name, problem in folder.problems.items():
        if name in times:  # or what it still could make would be all that is compared
            made = len(times.pop(name))
            notes.append(f"Configuration {name} failed and is left out with its {made} images: {problem}")
    if not times:
        raise EvaluationError(f"{folder.path}: no images yet; run `accel evaluate run` first")
    keys = set.intersection(*(set(own) for own in times.values()))
    most = max(map(len, times.values()))
    if len(keys) < most:
        notes.append(
            f"Only the {len(keys)} images that every configuration has are compared; up to {most} exist: "
            "the run is not finished."
        )
    if not keys:
        raise EvaluationError(f"{folder.path}: no prompt has an image of every configuration yet")

    columns = _columns(folder, keys)
    plain = folder.plain
    rows = []
    described = {row["name"]: row for row in settings["configurations"]}
    for name, own in times.items():
        rows.append(
            {
                "name": name,
                "settings": {key: described[name][key] for key in ("method", "steps")},
                "hash": described[name]["hash"],
                "images": len(keys),
                "speed": _speed({k: own[k] for k in keys}, {k: times[plain][k] for k in keys}),
                "metrics": _metrics(columns[name], columns[plain], prompts),
                "worst": _worst(columns[name], worst),
            }
        )
    suite_metric = next((m for m, column in columns[plain].items() if column.tags), None)
    missing = rows[0]["metrics"].get(suite_metric, {}).get("missing_tasks", []) if suite_metric else []
    if missing:
        notes.append(
            f"The overall {suite_metric} score is the mean over the tasks that were run, without "
            f"{', '.join(missing)}: not comparable to one over all six."
        )
    notes += [note for row in rows if (note := _unpaired_note(row))]
    sessions = list(folder.sessions())
    used = {times["session"] for own in times.values() for times in own.values()}
    if changed := changes([session for session in sessions if session["session"] in used]):
        notes.append(f"Images of several versions are compared: {'; '.join(changed)}.")
    distances, unread = _distances(folder, list(times), keys, plain)
    return {
        "run": {key: settings[key] for key in settings if key != "configurations"},
        "plain": plain,
        "images": len(keys),
        "prompts": len({prompt for prompt, _ in keys}),
        "suite_metric": suite_metric,
        "bounds": folder.bounds,
        "configurations": rows,
        "distances": distances,
        "sessions": sessions,
        "notes": notes + unread,
    }


def _columns(folder: RunFolder, keys: set[Key]) -> dict[str, dict[str, _Column]]:
    columns: dict[str, dict[str, _Column]] = defaultdict(dict)
    for record in folder.scores():
        key = record["prompt_id"], record["sample"]
        if key not in keys:
            continue
        column = columns[record["configuration"]].setdefault(
            record["metric"], _Column(record["higher_is_better"])
        )
        column.values[key] = record["value"]
        column.identical += record["reason"] == "identical"
        if "tag" in record:
            column.tags[key] = record["tag"]
    return columns


def _metrics(own: dict[str, _Column], plain: dict[str, _Column], prompts: dict) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for metric, column in own.items():
        known = {key: value for key, value in column.values.items() if value is not None}
        entry: dict[str, Any] = {
            "higher_is_better": column.higher_is_better,
            "identical": column.identical,
            "missing": len(column.values) - len(known) - column.identical,
        }
        if known and column.tags:
            verdicts = [Verdict(v == 1, "", column.tags[k], prompts[k[0]].text) for k, v in known.items()]
            whole = aggregate(verdicts)
            entry |= {"mean": whole.overall.to_dict(), "missing_tasks": list(whole.missing)}
            entry["tasks"] = {task: interval.to_dict() for task, interval in whole.tasks.items()}
        elif known:
            bounds = next((range_ for name, range_ in _RANGES.items() if metric.startswith(name)), None)
            entry["mean"] = _mean(known, prompts, bounds=bounds).to_dict()
            entry["p10"], entry["p90"] = np.quantile(list(known.values()), [0.1, 0.9]).tolist()
        other = plain.get(metric)
        if other is not None and other is not column:
            pairs = {
                k: v - other.values[k]  # type: ignore[operator]
                for k, v in known.items()
                if other.values.get(k) is not None
            }
            if pairs:
                tags = [column.tags[k] for k in pairs] if column.tags else None
                # With tags the values are differences of verdicts, which are 0 or 1.
                entry["difference"] = _mean(pairs, prompts, tags, (-1, 1) if tags else None).to_dict()
        result[metric] = entry
    return result


def _mean(
    values: dict[Key, float],
    prompts: dict,
    strata: Sequence[str] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    return mean_interval(
        list(values.values()), [prompts[key[0]].text for key in values], strata, bounds=bounds
    )


def _speed(own: dict[Key, dict[str, Any]], plain: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for part, column in (("pipeline", "seconds"), ("denoiser", "denoiser_seconds")):
        seconds = [times[column] for times in own.values() if times[column] is not None]
        if not seconds:
            result[part] = None
            continue
        p10, median, p90 = np.quantile(seconds, [0.1, 0.5, 0.9]).tolist()
        result[part] = {"median": median, "p10": p10, "p90": p90, "n": len(seconds)}
        result[part]["images_per_second"] = len(seconds) / sum(seconds)
        # Only neighbours in time are divided: the same prompt and sample in the same process start. The
        # images of one call share its time, so a batch is one measurement, however many images it has.
        measured = {
            (times["session"], plain[key][column], times[column])
            for key, times in own.items()
            if times[column] and plain[key][column] and times["session"] == plain[key]["session"]
        }
        result[part]["speedup"] = median_interval([before / after for _, before, after in measured])
        calls = {(times["session"], times[column]) for times in own.values() if times[column]}
        result[part]["unpaired"] = len(calls) - len({(session, after) for session, _, after in measured})
    peaks = [(times["peak_bytes"], times["peak_kind"]) for times in own.values() if times["peak_bytes"]]
    result["peak_bytes"], result["peak_kind"] = max(peaks) if peaks else (None, None)
    return result


def _unpaired_note(row: dict[str, Any]) -> str | None:
    """Times that were measured and are in no ratio: said, because n alone does not show it."""
    pipeline = row["speed"]["pipeline"]
    if not pipeline or not pipeline["unpaired"]:
        return None
    lost, speedup = pipeline["unpaired"], pipeline["speedup"]
    return (
        f"Configuration {row['name']}: {lost} of {lost + (speedup['n'] if speedup else 0)} timed calls have no plain "
        "call of the same start to be divided by and are in no speedup: the run was stopped between the two, or "
        "extended later. A new folder measures them side by side."
    )


def median_interval(values: Sequence[float], level: float = 0.95) -> dict[str, Any] | None:
    """Median with its distribution-free interval from order statistics (binomial).

    `low` and `high` are None where n is too small for the level (below 6 at 95 %).
    """
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    result: dict[str, Any] = {"value": float(np.median(ordered)), "low": None, "high": None, "n": n}
    log_half = -n * math.log(2)
    tail, below = 0.0, -1  # largest count of values that may be cut off each side
    for i in range(n // 2):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half)
        if tail > (1 - level) / 2:
            break
        below = i
    if below >= 0:
        result["low"], result["high"] = ordered[below], ordered[n - 1 - below]
    return result


def _worst(columns: dict[str, _Column], count: int) -> list[dict[str, Any]]:
    """Keys of the images furthest from their plain pair, furthest first."""
    metric = next((m for m in columns if m.startswith("lpips")), "psnr")
    if metric not in columns:
        return []
    column = columns[metric]
    sign = 1 if column.higher_is_better else -1
    known = ((sign * v, key) for key, v in column.values.items() if v is not None)
    chosen: Iterable[tuple[float, Key]] = heapq.nsmallest(count, known)
    return [{"prompt_id": k[0], "sample": k[1], "metric": metric, "value": sign * v} for v, k in chosen]


def _distances(
    folder: RunFolder, names: list[str], keys: set[Key], plain: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every extractor, and notes on what is left out of them."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for store in sorted(p for p in (folder.path / "features").glob("*") if p.is_dir()):
        with TemporaryDirectory(dir=folder.path) as scratch:
            sets = {name: FeatureSet(store, name, keys) for name in names}
            common = set.intersection(*(set(own.keys) for own in sets.values()))
            if common and len(common) < max(own.n for own in sets.values()):
                notes.append(
                    f"Distances by {sets[plain].extractor} are over the {len(common)} of {len(keys)} images that have "
                    "features in every configuration; the others could not be read or are not scored yet."
                )
                sets = {name: FeatureSet(store, name, common) for name in names}
            references = {plain: sets[plain]}
            whole = FeatureSet(store, REFERENCE)
            if whole.n:
                # Cut to the same n, which these distances depend on; evenly, as folders are sorted by something.
                compared = set(sets[plain].keys)
                count = min(len(compared), whole.n)
                evenly = {whole.keys[i * whole.n // count] for i in range(count)} if count else set()
                chosen = compared if whole.by_prompt else evenly
                references[REFERENCE] = FeatureSet(store, REFERENCE, chosen)
            for to, reference in references.items():
                for name in names:
                    if name == to:
                        continue
                    row: dict[str, Any] = {"configuration": name, "to": to, "extractor": reference.extractor}
                    if reference.source:
                        row["source"] = reference.source
                    try:
                        paired = to == plain or reference.by_prompt
                        row |= distances(reference, sets[name], Path(scratch), paired=paired)
                    except RecordError:
                        raise
                    except EvaluationError as error:
                        row["reason"] = str(error)
                    rows.append(row)
    return rows, notes
