"""`accel bench`: side-by-side comparisons on one model, in one run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Compare with what people use today, on this machine.", no_args_is_help=True)
_console = Console(stderr=True)


@app.callback()
def _group() -> None:
    """Keeps `peers` a command of its own: with a single command typer would drop its name."""


@app.command()
def peers(
    out: Annotated[
        Path, typer.Argument(help="Folder for images, records and report; continued if it exists.")
    ],
    model: Annotated[str, typer.Option(help="builtin, a diffusers folder or a hub id.")] = "builtin",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the plain pipeline.")] = 24,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, tasks in turn.")] = 36,
    only: Annotated[
        str, typer.Option(help="Regular expression: only the settings whose name it finds.")
    ] = "",
    size: Annotated[int | None, typer.Option(help="Height and width; default: the pipeline's.")] = None,
    seed: Annotated[int, typer.Option(help="Base seed.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, cpu; default: cuda if there is one.")] = None,
) -> None:
    """Plain, fewer steps, tomesd's scheme, diffusers' caches, cache-dit and accel, interleaved in one run.

    Writes report/report.md, report/index.html (Pareto plots), report/report.json (environment) and
    problems.json (settings that are missing or fail, with their errors). A stopped run continues.
    """
    from .bench.compare import compare
    from .bench.peers import fewer_steps, ours, theirs
    from .errors import ConfigError
    from .evaluation import suites
    from .generation import load_pipeline

    try:
        wanted = re.compile(only)
    except re.error as error:
        raise ConfigError(f"--only {only!r} is not a regular expression: {error}") from error
    chosen = [c for c in (*fewer_steps(steps), *theirs(steps), *ours(steps)) if wanted.search(c.name)]
    if not chosen:
        raise ConfigError(f"--only {only!r} matches none of the settings")
    pipe = load_pipeline(model, device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps} | ({} if size is None else {"height": size, "width": size})

    def progress(state: tuple[int, int, str]) -> None:
        done, total, name = state
        _console.print(f"{done}/{total} {name}", highlight=False)

    page = compare(
        out, pipe, suites.scenes(), chosen, call=call, model=model, limit=limit, seed=seed, progress=progress
    )
    typer.echo(page.read_text(encoding="utf-8"))
    _console.print(f"report: {page.with_name('index.html')}", highlight=False, soft_wrap=True)
