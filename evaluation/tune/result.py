"""What tuning leaves: a preset, its side-car, a page and a picture of the frontier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accel import methods
from accel.core import made_for
from accel.evaluation.bootstrap import mean_interval
from accel.evaluation.records import write_atomically
from accel.evaluation.report.table import Markdown, Table

from .masks import Mask
from .measure import config_of
from .state import rounded
from .tune import HELD, SEARCH, Tuned, name_of


def write(tuned: Tuned, preset: Path, made_by: str) -> list[Path]:
    """The preset (YAML) and, first, the side-car beside it (JSON); one more preset for each other number of steps. Each
    file is there whole or not at all.

    Args:
        made_by: the command, for the preset's first line.
    """
    side_car = preset.with_suffix(".json")
    write_atomically(side_car, json.dumps(_side_car(tuned)) + "\n")
    held = tuned.row(name_of(tuned.mask), HELD)
    assert held is not None
    values, total = held.values[tuned.goal.measured], tuned.plain.total
    said = [
        f"{_said(tuned.mask)} of {total} steps computed; {tuned.goal.said(values)} to the plain pictures at the 10th",
        f"percentile of {len(values)} prompts that were held back.",
    ]
    write_atomically(preset, _preset(tuned.mask, total, side_car.name, [made_by, *said]))
    written = [preset, side_car]
    for other, mask in tuned.others.items():
        file = other_file(preset, other)
        said = [f"{_said(mask)} of {other} steps computed; not run: by what runs of {total} steps say."]
        write_atomically(file, _preset(mask, other, side_car.name, [made_by, *said]))
        written.append(file)
    return written


def _said(mask: Mask) -> str:
    count = str(len(mask.steps))
    return f"{count} (with the tokens of {mask.thin})" if mask.thin else count


def other_file(preset: Path, total: int) -> Path:
    """Of another number of steps."""
    return preset.with_stem(f"{preset.stem}-{total}")


def _preset(mask: Mask, total: int, side_car: str, said: Sequence[str]) -> str:
    config = config_of(mask, total)
    settings = {"method": methods.name_of(config), **_changed(config), "made_for": side_car}
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=10_000)
    return "\n".join([*(f"# {' '.join(line.split())}" for line in said), text])


def _changed(config: Any) -> dict[str, Any]:
    """The settings of a configuration that are not its defaults."""
    found = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            found[field.name] = _changed(value) if is_dataclass(value) else value
            if isinstance(value, tuple):
                found[field.name] = list(value)
    return found


def _side_car(tuned: Tuned) -> dict[str, Any]:
    plain = tuned.plain
    return {
        "version": made_for.VERSION,
        "made_by": "accel tune",
        **tuned.described,
        "call": tuned.call,
        "prediction": tuned.shape,
        "goal": {"metric": tuned.goal.metric, "value": tuned.goal.value},
        "held_back": [
            {"name": r.name, "computed": r.computed, "values": r.values}
            for r in tuned.rows
            if r.split == HELD
        ],
        "masks": {
            str(count): {"steps": masks[0].steps, "trend": masks[0].trend}
            for count, masks in tuned.masks.items()
        },
        "times": rounded(plain.times_N),
        "lengths": rounded(plain.lengths_N),
        "corrects": plain.corrects,
        "grams": [[rounded(row) for row in gram] for gram in plain.grams_PNN],
    }


def table(tuned: Tuned) -> Table:
    """What was run, the held-back prompts first; the mask that was chosen in bold."""
    metric, total = tuned.goal.measured, tuned.plain.total
    header = [
        "steps computed",
        "of",
        "prompts",
        f"{metric} mean, 95 % interval",
        "10th percentile",
        "denoiser",
    ]
    rows = []
    for row in sorted(tuned.rows, key=lambda r: (r.split == SEARCH, r.computed, r.name)):
        values = row.values[metric]
        bold = row.name == name_of(tuned.mask) and row.split == HELD
        name = Markdown(f"**`{row.name}`**" if bold else f"`{row.name}`")
        clock = ""
        if row.split == HELD and row.denoiser_seconds and tuned.seconds["denoiser"]:
            clock = f"{tuned.seconds['denoiser'] / row.denoiser_seconds:.2f}x"
        cells = [f"{row.computed:g} / {total}", f"{len(values)} {row.split}", _mean(values, metric)]
        rows.append([name, *cells, tuned.goal.said(values), clock])
    return Table(header, rows, "Masks that were run")


def _mean(values: Sequence[float], metric: str) -> str:
    digits = 4 if metric == "lpips" else 1
    mean = mean_interval(values, range(len(values)))
    if mean.low is None:
        return f"{mean.value:.{digits}f}"
    return f"{mean.value:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"


def verdict(tuned: Tuned) -> str:
    """How the mask compares with what ships, at as many computed steps, on the prompts that were held back."""
    own = tuned.row(name_of(tuned.mask), HELD)
    other = next((r for r in tuned.rows if r.split == HELD and not r.name.split()[0][0].isdecimal()), None)
    if own is None or other is None:
        return ""
    metric = tuned.goal.measured
    sign = -1 if metric == "lpips" else 1
    gain = sign * (np.asarray(own.values[metric]) - np.asarray(other.values[metric]))
    unit = "LPIPS" if metric == "lpips" else "dB"
    said = f"{gain.mean():+.{4 if metric == 'lpips' else 1}f} {unit}"
    interval = mean_interval(list(gain), range(len(gain)))
    against = f"`{other.name}` ({other.computed:g} steps; this has {own.computed:g})"
    if interval.low is None:
        return f"Against {against}: {said} closer, on too few prompts for an interval."
    said += f" [{interval.low:+.2f}, {interval.high:+.2f}]"
    if interval.low > 0:
        return f"Closer than {against}: {said}."
    if interval.high is not None and interval.high < 0:
        return f"Farther off than {against}: {said}. Take that one instead."
    return f"No evidence of a difference to {against}: {said}."


def page(tuned: Tuned, folder: Path) -> list[Path]:
    """report.md, and frontier.svg where jinja2 is installed."""
    text = f"# Tuned to {tuned.goal}\n\n{verdict(tuned)}\n\n{table(tuned).markdown()}\n"
    write_atomically(folder / "report.md", text)
    made = [folder / "report.md"]
    try:
        from accel.evaluation.report import plot

        drawn = plot.file([_picture(tuned, metric_row) for metric_row in (0.1, 0.5)])
    except ImportError:
        return made
    write_atomically(folder / "frontier.svg", drawn)
    return [*made, folder / "frontier.svg"]


def _picture(tuned: Tuned, quantile: float) -> dict[str, Any]:
    from accel.evaluation.report import plot

    metric, total = tuned.goal.measured, tuned.plain.total
    points = []
    for row in tuned.rows:
        y = abs(tuned.goal.closeness(row.values[metric], quantile))
        x = total / row.computed
        chosen = row.name == name_of(tuned.mask)
        name = "chosen" if chosen and row.split == HELD else f"{row.computed:g} steps"
        name = name if row.name.split()[0][0].isdecimal() else row.name
        points.append(
            plot.Point(name, x, y, None, None, f"{x:.2f}x, {y:.4g}: {row.name}", f"{row.split} prompts")
        )
    goal = [("goal", tuned.goal.value)] if tuned.goal.metric != "speedup" and quantile < 0.5 else []
    what = "10th percentile" if quantile < 0.5 else "median"
    return plot.layout(
        points,
        label=f"{'LPIPS' if metric == 'lpips' else 'PSNR (dB)'} to the plain pictures, {what}",
        higher_is_better=metric != "lpips",
        lines=goal,
        across="all steps over computed steps",
        sheet=plot.FILE,
    )
