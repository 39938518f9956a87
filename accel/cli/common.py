"""What `accel demo` and `accel generate` share: options, checks before the work, progress, tables."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from accel.errors import ConfigError

if TYPE_CHECKING:
    from accel.generation import Generated, Job
    from accel.methods.speculation import SpeculativeDecodingConfig

# Progress goes to stderr, so that stdout is the answer alone: a table for people, JSON for machines.
console, progress_console = Console(), Console(stderr=True)

#: What --model takes.
MODELS = "builtin, builtin-ar (autoregressive), a folder of either kind, or a hub id."

Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu. Default: CUDA if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: by device.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's own.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT. Default: the pipeline's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale. Default: the pipeline's own.")
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Autoregressive models: logits are divided by it; 0 is greedy. Default: the model's."),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Autoregressive models: draw from the k likeliest tokens. Default: the model's."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Autoregressive models: draw from the likeliest tokens that sum to p. Default: the model's."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the first image; each further image adds one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Preset = Annotated[str | None, typer.Option(help="A preset name; `accel info` lists them.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with a configuration, in place of a preset.")]


def load(model: str, device: str | None, dtype: str | None) -> Any:
    """Loads the pipeline without the loaders' own bars, which would write over ours."""
    from accel import backends, generation

    backends.require_sound_stack()
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return generation.load_pipeline(model, device, dtype)


def configuration(preset: str | None, config: Path | None) -> Any:
    """What --preset or --config names; None if neither is given."""
    from accel import configs

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config both name a configuration: give one")
    if config is not None:
        return configs.load(config)
    return configs.load(preset) if preset is not None else None


def prepare(folder: Path, files: list[Path], force: bool) -> None:
    """Fails before the work, not after it: folder writable, nothing overwritten unasked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be created ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {folder}: not writable; choose another folder")
    existing = [file for file in files if file.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ConfigError(f"{existing[0]}{more} would be overwritten; add --force, or choose another --out")


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "image"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; gives what advances it by a number of steps."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=progress_console,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total or None)
        yield lambda steps: bar.advance(task, steps)


def save(images: Any, jobs: Sequence[Job], files: list[Path], label: str, model: str) -> None:
    """PNGs with their recipe in the text fields; a file is there whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    from accel.evaluation.pictures import to_pil

    for image, job, file in zip(images, jobs, files, strict=True):
        notes = PngInfo()
        for key, value in (
            ("prompt", job.prompt),
            ("seed", str(job.seed)),
            ("accel", label),
            ("model", model),
        ):
            notes.add_itxt(key, value)
        part = file.with_suffix(".part")
        to_pil(image).save(part, format="PNG", pnginfo=notes)
        part.replace(file)


def save_comparisons(
    jobs: Sequence[Job], plain: Generated, fast: Generated, files: list[Path], label: str
) -> None:
    """Plain and accelerated beside each other, one file per image."""
    from accel.evaluation.pictures import Column, side_by_side

    for index, (job, file) in enumerate(zip(jobs, files, strict=True)):
        pick = slice(index, index + 1)
        columns = [
            Column("plain", f"{plain.seconds / len(jobs):.2f} s", plain.images[pick]),
            Column(label, f"{fast.seconds / len(jobs):.2f} s", fast.images[pick]),
        ]
        side_by_side([job.prompt], columns, file.with_name(f"{file.stem}-compare.png"))


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


def describe(pipe: Any, steps: int) -> str:
    """What ran: steps or tokens, dtype, device."""
    from accel.generation import is_autoregressive

    if is_autoregressive(pipe):
        dtype = str(pipe.dtype).removeprefix("torch.")
        return f"{pipe.adapter.name}, {steps} tokens per image, {dtype} on {pipe.device}"
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    dtype = str(getattr(denoiser, "dtype", "")).removeprefix("torch.")
    return f"{steps or 'default'} steps, {dtype} on {getattr(pipe, 'device', 'cpu')}"


_COLUMNS = {
    "plain_seconds": ("plain", "{:.2f} s"),
    "accelerated_seconds": ("accel", "{:.2f} s"),
    "seconds": ("time", "{:.2f} s"),
    "speedup": ("speedup", "{:.2f}x"),
    "denoiser_speedup": ("denoiser", "{:.2f}x"),
    "psnr": ("PSNR", "{:.1f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "tokens_computed": ("tokens", "{:.0%}"),
    "plain_forwards": ("plain forwards", "{:.0f}"),
    "forwards": ("forwards", "{:.0f}"),
    "tokens_per_forward": ("tokens/forward", "{:.2f}"),
    "tv_per_token": ("TV/token", "{:.4f}"),
}


def show(result: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a result as a table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    rows = list(result["images"])
    if "summary" in result:
        rows.append({"prompt": "all: median times, means", **result["summary"]})
    keys = [key for key in _COLUMNS if key in rows[0]]
    table = Table("prompt", *(_COLUMNS[key][0] for key in keys), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for index, row in enumerate(rows):
        last = "summary" in result and index == len(rows) - 1
        cells = [_COLUMNS[key][1].format(row[key]) if row[key] is not None else "–" for key in keys]
        table.add_row(row["prompt"], *cells, style="bold" if last else None)
    console.print(table)
    if truth := result.get("summary", {}).get("truth"):
        console.print(truth, highlight=False, soft_wrap=True)
    where = result.get("picture") or ", ".join(row["file"] for row in rows if "file" in row)
    console.print(f"saved: {where}", highlight=False, soft_wrap=True)
