"""`accel tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from accel.errors import ConfigError

from . import common as c
from .markdown import show_report
from .terminal import INTERRUPTED, progress_console, say

if TYPE_CHECKING:
    from accel.evaluation.tune.tune import Goal


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="builtin, a diffusers folder, a hub id, or your own: module:function, file.py:function."
        ),
    ] = "builtin",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line: at least 4, better 12 to 24. Default for builtin: its world's."
        ),
    ] = None,
    max_lpips: Annotated[
        float | None, typer.Option(help="As fast as goes at this LPIPS (10th percentile); needs --lpips.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="As fast as goes at this PSNR in dB (10th percentile).")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="As close as goes at this many times fewer computed steps.")
    ] = None,
    steps: c.Steps = None,
    size: c.Size = None,
    guidance: c.Guidance = None,
    out: Annotated[
        Path, typer.Option(help="The preset; a side-car (.json) and a folder (.tune) go beside it.")
    ] = Path("tuned.yaml"),
    minutes: Annotated[
        float, typer.Option(min=0, max=100_000, help="After this long, only what is needed is still tried.")
    ] = 15.0,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 4,
    also: Annotated[
        str, typer.Option(help="Other numbers of steps to write a preset for, unverified, such as 28,50.")
    ] = "",
    lpips: Annotated[str | None, typer.Option(help="torchvision's AlexNet file, for --max-lpips.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=c.MAX_SEED, help="Seed of the first prompt's noise.")] = 0,
    device: c.Device = None,
    dtype: c.Dtype = None,
    force: c.Force = False,
) -> None:
    """Choose which steps to compute, for a model of yours and a budget of quality or time.

    Runs some prompts plainly, works out good schedules from them without the model, runs the best few, takes the fastest
    that keeps the budget, and verifies it on prompts that were held back. Writes a preset for
    accel.accelerate(pipe, "tuned.yaml"). A stopped run continues; another budget uses what was measured.
    """
    from accel import generation as g
    from accel.evaluation import suites
    from accel.evaluation.models import load_pipeline
    from accel.evaluation.tune import result
    from accel.evaluation.tune.tune import Settings
    from accel.evaluation.tune.tune import tune as tuned_to

    goal = _goal(max_lpips, min_psnr, speedup, lpips)
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: a preset ends in .yaml")
    others = tuple(c.wholes(also, "--also", "28,50")) if also else ()
    files = [out, out.with_suffix(".json"), *(result.other_file(out, other) for other in others)]
    c.check_out(out.parent, files, force)
    if prompts is None and model not in (g.BUILTIN, g.BUILTIN_TURBO, g.BUILTIN_TEXTURED):
        raise ConfigError("--prompts FILE is missing: at least 4 prompts of the kind you use, one a line")
    texts = suites.scenes(seed=seed).prompts if prompts is None else suites.prompt_file(prompts).prompts
    texts = suites.take(texts, 24)
    scorer = None
    if lpips is not None:
        from accel.evaluation.scorers import lpips_scorer

        scorer = lpips_scorer(lpips)
    c.quiet_loaders()
    pipe = load_pipeline(model, device=device, dtype=dtype)
    if g.is_autoregressive(pipe):
        raise ConfigError(f"{model} is an autoregressive model: accel tune is for diffusion models")
    call = g.Settings(
        steps or g.default_steps(pipe), g.parse_size(size) if size is not None else None, guidance
    )
    call.check(pipe)
    if call.steps is None:
        raise ConfigError(f"{type(pipe).__name__} does not say how many steps it does: add --steps")
    settings = Settings(call, tuple(p.text for p in texts), seed, batch, minutes, scorer, others)
    folder = out.with_suffix(".tune")
    try:
        with c.stages() as progress:
            tuned = tuned_to(pipe, goal, settings, folder, progress)
    except KeyboardInterrupt:
        say(
            f"interrupted: what was measured is kept in {folder}; the same command goes on there",
            to=progress_console,
        )
        raise typer.Exit(INTERRUPTED) from None
    result.page(tuned, folder)
    made_by = f"accel tune {model}, {goal}: {type(pipe).__name__}, {tuned.call['scheduler']}"
    result.write(tuned, out, made_by)
    show_report((folder / "report.md").read_text(encoding="utf-8"))
    say(
        f'preset: {out} (accel.accelerate(pipe, "{out}")); frontier: {folder / "frontier.svg"}',
        to=progress_console,
    )


def _goal(max_lpips: float | None, min_psnr: float | None, speedup: float | None, lpips: str | None) -> Goal:
    from accel.evaluation.tune.tune import Goal

    given: dict[Literal["psnr", "lpips", "speedup"], float | None]
    given = {"lpips": max_lpips, "psnr": min_psnr, "speedup": speedup}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ConfigError("give one of --max-lpips, --min-psnr and --speedup: what the schedule has to keep")
    ((name, value),) = named.items()
    if not 0 < value < 1e6:
        option = {"lpips": "--max-lpips", "psnr": "--min-psnr"}.get(name, "--speedup")
        raise ConfigError(f"{option} {value:g} is no budget: a number above 0")
    if name == "lpips" and lpips is None:
        raise ConfigError(
            "--max-lpips needs --lpips FILE, torchvision's AlexNet weights (see docs/evaluation.md)"
        )
    return Goal(name, value)
