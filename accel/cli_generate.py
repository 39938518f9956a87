"""`accel demo` and `accel generate`."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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

from .errors import ConfigError

# Progress goes to stderr, so that stdout is the answer alone: a table for people, JSON for machines.
console, progress_console = Console(), Console(stderr=True)

DEMO_PROMPTS = (
    "a photo of a red circle left of a blue square",
    "a photo of three stars",
    "a photo of a purple heart and a yellow ring",
    "a photo of a green triangle",
)

Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu. Default: CUDA if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: by device.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's own.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT. Default: the pipeline's own.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; each further image adds one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Preset = Annotated[str | None, typer.Option(help="A preset name; `accel info` lists them.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with a configuration, in place of a preset.")]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("accel-out/demo"),
    preset: Preset = None,
    config: Config = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Generate the same images plain and accelerated on the built-in model; show time and difference.

    Writes `side-by-side.png` and `demo.json`. Needs no download. A minute or two on two CPU cores.
    """
    from . import generation as g
    from .pictures import Column, side_by_side

    chosen = _configuration(preset, config) or _configuration("balanced", None)
    picture, record = out / "side-by-side.png", out / "demo.json"
    _prepare(out, [picture, record], force)
    pipe = _load(g.BUILTIN, device, dtype)
    settings = g.Settings(steps)
    settings.check(pipe)
    jobs = [g.Job(prompt, seed + index) for index, prompt in enumerate(DEMO_PROMPTS)]
    label = preset or (config.stem if config else "balanced")

    plain, fast = [], []
    per_call = steps or g.default_steps(pipe) or 0
    with _progress("images", 2 * len(jobs) * per_call) as advance:
        for which in (None, chosen):  # warm-up: first calls allocate and choose kernels
            g.timed(pipe, jobs[:1], g.Settings(2), which)
        for job in jobs:  # interleaved, so that a busy machine slows both alike
            plain.append(g.timed(pipe, [job], settings, None, advance))
            fast.append(g.timed(pipe, [job], settings, chosen, advance))

    rows = _pair_rows(jobs, plain, fast)
    summary = _summary(rows, label, fast)
    side_by_side(
        DEMO_PROMPTS,
        [
            Column("plain", f"{summary['plain_seconds']:.2f} s per image", _stack(plain)),
            Column(
                f"accel: {label}",
                f"{summary['accelerated_seconds']:.2f} s per image, {summary['speedup']:.2f}x sooner",
                _stack(fast),
            ),
        ],
        picture,
    )
    result = {"summary": summary, "images": rows, "picture": str(picture)}
    record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result, as_json, f"The built-in Scenes model, {_describe(pipe, per_call)}")


def generate(
    prompts: Annotated[
        list[str], typer.Argument(help="One or more prompts, each in quotes.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="builtin, a diffusers folder, or a hub id.")] = "builtin",
    preset: Preset = None,
    config: Config = None,
    steps: Steps = None,
    size: Size = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale. Default: the pipeline's own.")
    ] = None,
    seed: Seed = 0,
    num: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("accel-out"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate without acceleration, and show both.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Generate images, accelerated if a preset or config is given.

    Every image is saved as soon as its batch is done, with prompt, seed and configuration in the PNG's
    text fields; Ctrl-C keeps what is finished.
    """
    from . import generation as g

    chosen = _configuration(preset, config)
    if compare and chosen is None:
        raise ConfigError("--compare needs something to compare with: add --preset or --config")
    settings = g.Settings(steps, g.parse_size(size) if size else None, guidance)
    jobs = [
        g.Job(prompt, seed + index * num + copy)
        for index, prompt in enumerate(prompts)
        for copy in range(num)
    ]
    paths = [out / f"{index:04d}-{_slug(job.prompt)}-{job.seed}.png" for index, job in enumerate(jobs)]
    extra = [path.with_name(f"{path.stem}-compare.png") for path in paths] if compare else []
    _prepare(out, paths + extra, force)
    pipe = _load(model, device, dtype)
    settings.check(pipe)
    if chosen is not None:
        g.check_can_accelerate(pipe, chosen)
    label = preset or (config.stem if config else "plain")

    plain: list[Any] = []
    made: list[Any] = []
    rows: list[dict[str, Any]] = []
    per_call = steps or g.default_steps(pipe) or 0
    calls = -(-len(jobs) // batch) * (2 if compare else 1)
    try:
        with _progress("steps", calls * per_call) as advance:
            for group in g.batches(range(len(jobs)), batch):
                members = [jobs[i] for i in group]
                if compare:
                    plain.append(g.timed(pipe, members, settings, None, advance))
                made.append(g.timed(pipe, members, settings, chosen, advance))
                files = [paths[i] for i in group]
                _save(made[-1].images, members, files, label, model)
                if compare:
                    _save_comparisons(members, plain[-1], made[-1], files, label)
                    rows += _pair_rows(members, plain[-1:], made[-1:], files)
                else:
                    share = made[-1].seconds / len(members)
                    rows += [
                        {"prompt": job.prompt, "seed": job.seed, "seconds": share, "file": str(file)}
                        for job, file in zip(members, files, strict=True)
                    ]
    except KeyboardInterrupt:
        progress_console.print(
            f"interrupted: {len(rows)} of {len(jobs)} images are finished and kept in {out}"
        )
        raise typer.Exit(130) from None
    result: dict[str, Any] = {"images": rows}
    if compare:
        result["summary"] = _summary(rows, label, made)
    _print(result, as_json, f"{model}, {_describe(pipe, per_call)}")


# ------------------------------------------------------------------------------------------ helpers


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    """Loads the pipeline without the loaders' own bars, which would write over ours."""
    from . import generation

    generation.require_sound_stack()
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return generation.load_pipeline(model, device, dtype)


def _configuration(preset: str | None, config: Path | None) -> Any:
    from . import configs

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config both name a configuration: give one")
    if config is not None:
        return configs.load(config)
    return configs.load(preset) if preset is not None else None


def _prepare(folder: Path, files: list[Path], force: bool) -> None:
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


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "image"


@contextmanager
def _progress(unit: str, total: int) -> Iterator[Any]:
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
        task = bar.add_task(f"denoising ({unit})" if unit != "steps" else "denoising", total=total or None)
        yield lambda: bar.advance(task)


def _save(images: Any, jobs: Any, files: list[Path], label: str, model: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    from .pictures import to_pil

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


def _save_comparisons(jobs: Any, plain: Any, fast: Any, files: list[Path], label: str) -> None:
    from .pictures import Column, side_by_side

    for index, (job, file) in enumerate(zip(jobs, files, strict=True)):
        pick = slice(index, index + 1)
        columns = [
            Column("plain", f"{plain.seconds / len(jobs):.2f} s", plain.images[pick]),
            Column(label, f"{fast.seconds / len(jobs):.2f} s", fast.images[pick]),
        ]
        side_by_side([job.prompt], columns, file.with_name(f"{file.stem}-compare.png"))


def _stack(runs: list[Any]) -> Any:
    import torch

    return torch.cat([run.images for run in runs])


def _pair_rows(
    jobs: Any, plain: list[Any], fast: list[Any], files: list[Path] | None = None
) -> list[dict[str, Any]]:
    """One row per image; times are those of its call divided by the images in it."""
    from .evaluation.metrics.pixel import psnr, ssim

    a, b = _stack(plain), _stack(fast)
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
            "denoiser_speedup": before.denoiser_seconds / after.denoiser_seconds
            if before.denoiser_seconds and after.denoiser_seconds
            else None,
            "psnr": psnr(a[index : index + 1], b[index : index + 1]).item(),
            "ssim": ssim(a[index : index + 1], b[index : index + 1]).item(),
            "tokens_computed": after.stats.share if after.stats else 1.0,
        }
        if files:
            row["file"] = str(files[index])
        rows.append(row)
    return rows


def _summary(rows: list[dict[str, Any]], label: str, fast: list[Any]) -> dict[str, Any]:
    """Medians of times and ratios, means of the rest. An infinite PSNR (identical images) stays infinite."""
    summary: dict[str, Any] = {"configuration": label, "images": len(rows)}
    for key in ("plain_seconds", "accelerated_seconds", "speedup", "denoiser_speedup"):
        values = [row[key] for row in rows]
        summary[key] = None if None in values else statistics.median(values)
    for key in ("psnr", "ssim", "tokens_computed"):
        summary[key] = statistics.fmean(row[key] for row in rows)
    return summary


def _describe(pipe: Any, steps: int) -> str:
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
}


def _print(result: dict[str, Any], as_json: bool, title: str) -> None:
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
    where = result.get("picture") or ", ".join(row["file"] for row in rows if "file" in row)
    console.print(f"saved: {where}", highlight=False, soft_wrap=True)
