"""What `accel demo` and `accel generate` share: options, checks before the work, progress, pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from accel.errors import ConfigError

from .terminal import progress_console, visible

if TYPE_CHECKING:
    from accel.generation import Generated, Job, Settings

#: Seeds are of 63 bits, so that every library, file format and signed integer holds them.
MAX_SEED = 2**63 - 1
#: Images of one command; each has its file name worked out before the first is made.
MAX_IMAGES = 100_000

#: What --model takes.
MODELS = (
    "builtin, builtin-turbo (four steps), builtin-textured (patterned grounds), builtin-ar (autoregressive), "
    "a folder of either kind, or a hub id."
)

Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu. Default: CUDA if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: by device.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's own.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT. Default: the pipeline's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale. Default: the pipeline's own.")
]
Lpips = Annotated[
    str | None, typer.Option(help="Path of torchvision's alexnet-owt-7be5be79.pth: adds LPIPS.")
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
Seed = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image; each further image adds one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Preset = Annotated[str | None, typer.Option(help="A preset name; accel info lists them.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with a configuration, in place of a preset.")]


def load(model: str, device: str | None, dtype: str | None) -> Any:
    """Loads the pipeline without the loaders' own bars, which would write over ours."""
    from accel import generation

    quiet_loaders()
    return generation.load_pipeline(model, device, dtype)


def quiet_loaders() -> None:
    """A stack that works, whose loaders show no bars."""
    from accel import backends

    backends.require_sound_stack()
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def configuration(preset: str | None, config: Path | None) -> Any:
    """What --preset or --config names; None if neither is given."""
    from accel import configs

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config both name a configuration: give one")
    if config is not None:
        return configs.load(config)
    return configs.load(preset) if preset is not None else None


def check_out(folder: Path, files: Sequence[Path], force: bool) -> None:
    """Fails before the work, not after it: folder writable, nothing overwritten unasked. Makes nothing."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        existing = [file for file in files if file.exists()]
    except OSError as error:  # names too long, folders that may not be looked into
        raise ConfigError(
            f"--out {folder}: cannot be used ({error.strerror}); choose another folder"
        ) from error
    if not there.is_dir():
        raise ConfigError(f"--out {folder}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder}: {there} is not writable; choose another folder")
    if folders := [file for file in existing if file.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder, where an image should go; choose another --out")
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ConfigError(f"{existing[0]}{more} would be overwritten; add --force, or choose another --out")


def make_out(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be created ({error.strerror})") from error


def check_prompts(prompts: Sequence[str]) -> None:
    """Bytes that were no text in the terminal's encoding cannot be tokenised, nor written into a file."""
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"prompt {prompt!r} is not valid text: type it in UTF-8")


def check_seeds(seed: int, images: int) -> None:
    """That all images can be counted, and every one has a seed."""
    if images > MAX_IMAGES:
        raise ConfigError(f"{images} images in one command; at most {MAX_IMAGES}: make several of it")
    if seed + images - 1 > MAX_SEED:
        raise ConfigError(f"--seed {seed} and {images} images: seeds end at {MAX_SEED}; start lower")


def wholes(text: str, option: str, such_as: str) -> list[int]:
    """What an option such as 24,28,50 lists."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,3}", part) for part in parts):
        raise ConfigError(f"{option} {text!r}: expected whole numbers from 1 to 9999, such as {such_as}")
    return [int(part) for part in parts]


def slug(text: str, length: int = 48) -> str:
    """A prompt, or another text, as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "image"


def file_name(index: int, job: Job, model: str, label: str) -> str:
    """Of an image: what it shows, its seed, and what made it, so that two commands seldom want one name."""
    of = slug(Path(model).name, 32)
    return f"{index:04d}-{slug(job.prompt)}-{job.seed}-{of}-{slug(label, 32)}.png"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; gives what advances it by a number of steps."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
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


@contextmanager
def stages() -> Iterator[Callable[[tuple[float, float, str]], None]]:
    """A bar on stderr with the time that is left, for work whose amount changes: gives what is told (done, total, what)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda state: bars.update(
            task, completed=state[0], total=state[1], description=visible(state[2])
        )


def recipe(pipe: Any, settings: Settings, model: str, label: str, config: Any) -> dict[str, Any]:
    """Everything that decides an image but its prompt and seed, defaults written out."""
    from accel import generation, methods

    configuration = None
    if config is not None:
        configuration = {"name": label, "method": methods.name_of(config), **dataclasses.asdict(config)}
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "configuration": configuration,
        **generation.call_in_full(pipe, settings),
        "dtype": precision(pipe),
        "device": str(getattr(pipe, "device", "cpu")),
        "versions": generation.versions(),
    }


def save(images: Any, jobs: Sequence[Job], files: Sequence[Path], made_by: Mapping[str, Any]) -> None:
    """PNGs with their recipe in the text fields; a file is there whole or not at all.

    Args:
        made_by: what `recipe` gives.
    """
    from accel.evaluation.pictures import save_png, to_pil

    label = (made_by["configuration"] or {"name": "plain"})["name"]
    for image, job, file in zip(images, jobs, files, strict=True):
        whole = {
            "prompt": job.prompt,
            "seed": job.seed,
            **made_by,
            "size": [image.shape[-1], image.shape[-2]],
        }
        notes = {
            "prompt": job.prompt,
            "seed": str(job.seed),
            "accel": label,
            "model": made_by["model"],
            "recipe": json.dumps(whole, ensure_ascii=False, default=str),
        }
        save_png(to_pil(image), file, notes)


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


def precision(pipe: Any) -> str:
    """The dtype of what is called at every step, as in "bfloat16"; "" if that is unknown."""
    part = next((p for name in ("transformer", "unet") if (p := getattr(pipe, name, None)) is not None), pipe)
    return str(getattr(part, "dtype", "")).removeprefix("torch.")


def describe(pipe: Any, steps: int) -> str:
    """What ran: steps or tokens, dtype, device."""
    from accel.generation import is_autoregressive

    where = f"{precision(pipe)} on {getattr(pipe, 'device', 'cpu')}"
    if is_autoregressive(pipe):
        return f"{pipe.adapter.name}, {steps} tokens per image, {where}"
    return f"{steps or 'default'} steps, {where}"
