"""What was measured, as rows, a summary and what is printed of them: a table for people, strict JSON for machines."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from accel.strict import dump_json

from .terminal import console, say, visible

if TYPE_CHECKING:
    from accel.generation import Generated, Job
    from accel.methods.speculation import SpeculativeDecodingConfig


def stack(runs: list[Generated]) -> Any:
    """The images of several calls: (B, 3, H, W)."""
    import torch

    return torch.cat([run.images for run in runs])


def pair_rows(
    jobs: Sequence[Job], plain: list[Generated], fast: list[Generated], files: list[Path] | None = None
) -> list[dict[str, Any]]:
    """One row per image; times are those of its call divided by the images in it."""
    a, b = stack(plain), stack(fast)
    share = [run for run in plain for _ in run.images], [run for run in fast for _ in run.images]
    rows = []
    for index, job in enumerate(jobs):
        before, after = share[0][index], share[1][index]
        row = {
            "prompt": job.prompt,
            "seed": job.seed,
            "plain_seconds": before.seconds / len(before.images),
            "accelerated_seconds": after.seconds / len(after.images),
            "speedup": before.seconds / after.seconds,
        }
        pick = slice(index, index + 1)
        if before.decoding and after.decoding:
            row |= {"plain_forwards": before.decoding.forwards, **decoding_row(after)}
            row["identical"] = bool((a[pick] == b[pick]).all())
        else:
            row |= _fidelity(before, after, a[pick], b[pick])
        if files:
            row["file"] = str(files[index])
        rows.append(row)
    return rows


def _fidelity(before: Generated, after: Generated, a: Any, b: Any) -> dict[str, Any]:
    """What is compared where both start from the same noise."""
    from accel.evaluation.metrics.pixel import psnr, ssim

    both = before.denoiser_seconds, after.denoiser_seconds
    return {
        "denoiser_speedup": both[0] / both[1] if both[0] and both[1] else None,
        "identical": bool((a == b).all()),
        "psnr": psnr(a, b).item(),
        "ssim": ssim(a, b).item(),
        "tokens_computed": after.stats.share if after.stats else 1.0,
    }


def decoding_row(run: Generated) -> dict[str, Any]:
    """The part of a row that only autoregressive models have."""
    return {} if run.decoding is None else asdict(run.decoding)


_MEDIANS = ("plain_seconds", "accelerated_seconds", "speedup", "denoiser_speedup")
_MEANS = (
    "psnr",
    "ssim",
    "tokens_computed",
    "plain_forwards",
    "forwards",
    "tokens_per_forward",
    "tv_per_token",
)


def summarise(rows: list[dict[str, Any]], label: str, config: Any) -> dict[str, Any]:
    """Medians of times and ratios, means of the rest. An infinite PSNR (identical images) stays infinite."""
    summary: dict[str, Any] = {"configuration": label, "images": len(rows)}
    for key in (key for key in _MEDIANS if key in rows[0]):
        values = [row[key] for row in rows]
        summary[key] = None if None in values else statistics.median(values)
    for key in (key for key in _MEANS if key in rows[0]):
        summary[key] = statistics.fmean(row[key] for row in rows)
    if "identical" in rows[0]:
        summary["identical"] = sum(row["identical"] for row in rows)
    if "window" in rows[0]:
        summary["truth"] = _truth(summary, rows, config)
    return summary


def _truth(summary: dict[str, Any], rows: list[dict[str, Any]], config: SpeculativeDecodingConfig) -> str:
    """What the accelerated images are, in a sentence: the comparison that PSNR makes for denoisers."""
    same, images = summary["identical"], len(rows)
    if all(row["window"] == 1 for row in rows):
        return "Decoded plainly: on this machine windows would be slower for this batch size."
    if not config.lossless:
        return (
            "Not exactly the model's distribution: each token's is, on average, at a total variation of "
            f"{summary['tv_per_token']:.4f} from it (0 is lossless, 1 the most there can be)."
        )
    if same == images:
        return f"Lossless: all {images} images are the plain ones, pixel for pixel."
    if config.verifies_by == "noise":
        return (
            f"Lossless: {same} of {images} images are the plain ones; the others are other samples from the same "
            "distribution, because a window's numbers are rounded otherwise than one token's."
        )
    return "Lossless: other samples from the same distribution, not the same images as plain."


# Key of a row -> its header, how it is written, and what it is: said once, under the table.
_COLUMNS: dict[str, tuple[str, str, str]] = {
    "plain_seconds": ("plain", "{:.2f} s", "time of an image, the model as it is"),
    "accelerated_seconds": ("accel", "{:.2f} s", "time of an image, accelerated"),
    "seconds": ("time", "{:.2f} s", "time of an image"),
    "speedup": ("speedup", "{:.2f}x", "plain divided by accel"),
    "denoiser_speedup": (
        "denoiser",
        "{:.2f}x",
        "the same of the denoiser alone, without text and picture decoding",
    ),
    "psnr": (
        "PSNR",
        "{:.1f} dB",
        'how close the accelerated image is to the plain one, higher is closer; "same": identical',
    ),
    "ssim": ("SSIM", "{:.3f}", "the same for structure, up to 1"),
    "tokens_computed": ("tokens", "{:.0%}", "of the denoiser's work on tokens, the share that was done"),
    "forwards": (
        "forwards",
        "{}",
        "passes through the model for an image; plain decoding needs one per token",
    ),
    "tokens_per_forward": ("per pass", "{:.2f}", "tokens that became final in a pass"),
    "tv_per_token": ("TV", "{:.4f}", "distance of a token's distribution from the model's; 0 is lossless"),
}
_ROOMY = 110  # columns of a terminal from which the less important ones of these are shown, too
_BETWEEN, _SHORTEST_PROMPT = 2, 12
_ONLY_WITH_ROOM = ("denoiser_speedup", "ssim", "tokens_per_forward")
_GRAMMAR = "a photo of "  # how every prompt of Scenes begins: a fifth of the line, and no news
_LAST_ROW = "all images: median of times and of their ratios, mean of the rest"


def show(result: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a result as a table, or as JSON."""
    if as_json:
        sys.stdout.write(dump_json(result) + "\n")
        return
    rows = list(result["images"])
    with_summary = "summary" in result and len(rows) > 1
    if with_summary:
        rows.append({"prompt": "all", **result["summary"]})
    keys = [
        key for key in _COLUMNS if key in rows[0] and (console.width >= _ROOMY or key not in _ONLY_WITH_ROOM)
    ]
    say(title, "bold")
    console.print(_table(rows, keys, with_summary))
    for key in keys:
        name, _, meaning = _COLUMNS[key]
        say(f"{name}: {meaning}", "dim")
    if with_summary:
        say(_LAST_ROW, "dim")
    if truth := result.get("summary", {}).get("truth"):
        say(truth)
    say(f"saved: {result.get('picture') or _where([row['file'] for row in rows if 'file' in row])}")


def _table(rows: list[dict[str, Any]], keys: list[str], with_summary: bool) -> Table:
    """One line a row, headers and numbers whole: the prompt gets what is left, and ends in an ellipsis there."""
    columns = {key: [_COLUMNS[key][0], *(_cell(row, key) for row in rows)] for key in keys}
    numbers = sum(max(map(len, cells)) + _BETWEEN for cells in columns.values())
    table = Table(box=None, pad_edge=False, padding=(0, _BETWEEN, 0, 0))
    room = max(_SHORTEST_PROMPT, console.width - numbers - _BETWEEN)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=room)
    for header, *cells in columns.values():
        table.add_column(header, no_wrap=True, justify="right", min_width=max(map(len, (header, *cells))))
    for index, row in enumerate(rows):
        last = with_summary and index == len(rows) - 1
        prompt = Text(visible(row["prompt"].removeprefix(_GRAMMAR)))
        numbers_of_it = [Text(cells[index + 1]) for cells in columns.values()]
        table.add_row(prompt, *numbers_of_it, style="bold" if last else None)
    return table


def _cell(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key == "psnr" and not math.isfinite(value):
        return "same" if row["identical"] == row.get("images", True) else "–"  # of all rows, or of this one
    if key == "forwards":
        plain = row.get("plain_forwards")
        return f"{value:.0f}" if plain is None else f"{value:.0f} of {plain:.0f}"
    return _COLUMNS[key][1].format(value)


def _where(files: list[str]) -> str:
    if len(files) <= 1:
        return "".join(files)
    return f"{len(files)} images in {Path(files[0]).parent}, {Path(files[0]).name} and following"
