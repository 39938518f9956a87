"""`accel generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accel.errors import ConfigError

from . import common as c
from . import results
from .terminal import INTERRUPTED, progress_console, say


def generate(
    prompts: Annotated[
        list[str], typer.Argument(help="One or more prompts, each in quotes.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help=c.MODELS)] = "builtin",
    preset: c.Preset = None,
    config: c.Config = None,
    steps: c.Steps = None,
    size: c.Size = None,
    guidance: c.Guidance = None,
    temperature: c.Temperature = None,
    top_k: c.TopK = None,
    top_p: c.TopP = None,
    seed: c.Seed = 0,
    num: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("accel-out"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate without acceleration, and show both.")
    ] = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Autoregressive models: keep each image, as far as it is, in a file of its name with -preview.",
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the model in the first images; worth it from a few on."),
    ] = False,
    device: c.Device = None,
    dtype: c.Dtype = None,
    force: c.Force = False,
    as_json: c.Json = False,
) -> None:
    """Generate images, accelerated if a preset or config is given.

    Every image is saved as soon as its batch is done, with all that made it in the PNG's text fields; Ctrl-C
    keeps what is finished.
    """
    from accel import generation as g

    chosen = c.configuration(preset, config)
    if compare and chosen is None:
        raise ConfigError("--compare needs something to compare with: add --preset or --config")
    if compile and (chosen is None or compare):
        raise ConfigError("--compile goes with --preset or --config, and not with --compare")
    settings = g.Settings(
        steps, g.parse_size(size) if size is not None else None, guidance, temperature, top_k, top_p
    )
    c.check_prompts(prompts)
    c.check_seeds(seed, len(prompts) * num)
    jobs = [
        g.Job(prompt, seed + index * num + copy)
        for index, prompt in enumerate(prompts)
        for copy in range(num)
    ]
    label = preset or (config.stem if config else "plain")
    paths = [out / c.file_name(index, job, model, label) for index, job in enumerate(jobs)]
    previews = [path.with_name(f"{path.stem}-preview.png") for path in paths] if preview else []
    extra = [path.with_name(f"{path.stem}-compare.png") for path in paths] if compare else []
    c.check_out(out, paths + extra + previews, force)
    pipe = c.load(model, device, dtype)
    settings.check(pipe)
    if preview and not (g.is_autoregressive(pipe) and pipe.adapter.makes_pixels):
        raise ConfigError(f"--preview needs an autoregressive model that makes pixels, not {model}")
    if compile and g.is_autoregressive(pipe):
        raise ConfigError(
            f"--compile is for denoisers, not {model}: leave it out. On a GPU its layers compile anyway"
        )
    if chosen is not None:
        g.check_can_accelerate(pipe, chosen)
    made_by = c.recipe(pipe, settings, model, label, chosen)
    c.make_out(out)

    plain: list[Any] = []
    made: list[Any] = []
    rows: list[dict[str, Any]] = []
    ways = [g.Way.of(pipe, None), g.Way.of(pipe, chosen, compile=compile)]
    if compile:
        say("compiling in the first image", to=progress_console)
    per_call = steps or g.default_steps(pipe, settings) or 0
    calls = -(-len(jobs) // batch) * (2 if compare else 1)
    try:
        title = "drawing tokens" if g.is_autoregressive(pipe) else "denoising"
        with c.progress(title, calls * per_call) as advance:
            for group in g.batches(range(len(jobs)), batch):
                members = [jobs[i] for i in group]
                if compare:
                    plain.append(g.timed(ways[0], members, settings, on_step=advance))
                show = Preview([previews[i] for i in group], per_call) if preview else None
                made.append(g.timed(ways[1], members, settings, on_step=advance, on_preview=show))
                files = [paths[i] for i in group]
                c.save(made[-1].images, members, files, made_by)
                if compare:
                    c.save_comparisons(members, plain[-1], made[-1], files, label)
                    rows += results.pair_rows(members, plain[-1:], made[-1:], files)
                else:
                    facts = {"seconds": made[-1].seconds / len(members), **results.decoding_row(made[-1])}
                    rows += [
                        {"prompt": job.prompt, "seed": job.seed, **facts, "file": str(file)}
                        for job, file in zip(members, files, strict=True)
                    ]
    except KeyboardInterrupt:
        text = f"interrupted: {len(rows)} of {len(jobs)} images are finished and kept in {out}"
        say(text, to=progress_console)
        raise typer.Exit(INTERRUPTED) from None
    result: dict[str, Any] = {"images": rows}
    if compare:
        result["summary"] = results.summarise(rows, label, chosen)
    results.show(result, as_json, f"{model}, {c.describe(pipe, per_call)}")


class Preview:
    """Writes images as far as they are, eight times on their way.

    Args:
        files: one per image.
        tokens: of an image.
    """

    def __init__(self, files: list[Path], tokens: int) -> None:
        self._files, self._tokens, self._eighths = files, tokens, 0

    def __call__(self, finished: int, images: Callable[[], list[Any]]) -> None:
        eighths = 8 * finished // max(1, self._tokens)
        if eighths == self._eighths:
            return
        self._eighths = eighths
        for file, image in zip(self._files, images(), strict=False):  # none before the first row
            part = file.with_name(f".{file.name}")  # whoever looks sees a whole file
            image.save(part, format="PNG")
            part.replace(file)
