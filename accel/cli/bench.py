"""`accel bench`: side-by-side comparisons on one model, in one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accel.errors import ConfigError

from . import common as c
from .markdown import show_report
from .terminal import progress_console as _console
from .terminal import say, visible

app = typer.Typer(help="Compare with what people use today, on this machine.", no_args_is_help=True)


@app.command()
def peers(
    out: Annotated[
        Path, typer.Argument(help="Folder for images, records and report; continued if it exists.")
    ],
    model: Annotated[str, typer.Option(help="builtin, a diffusers folder or a hub id.")] = "builtin",
    steps: Annotated[
        str, typer.Option(help="Denoising steps of the plain pipeline; with --batch, several: 24,28,50.")
    ] = "24",
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, tasks in turn.")] = 36,
    only: Annotated[
        str, typer.Option(help="Regular expression: only the settings whose name it finds.")
    ] = "",
    size: Annotated[
        int | None, typer.Option(min=1, max=16_384, help="Height and width; default: the pipeline's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=c.MAX_SEED, help="Base seed.")] = 0,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images per call: distances per computed step, to plain and to a fine run; no clock."
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, max=100_000, help="With --batch: after this long, no setting is started.")
    ] = 60.0,
    fine: Annotated[
        int, typer.Option(min=0, max=9999, help="With --batch: steps of the fine run, made once; 0: none.")
    ] = 200,
    device: c.Device = None,
    dtype: c.Dtype = None,
) -> None:
    """Diffusion: plain, fewer steps, tomesd's scheme, diffusers' caches, cache-dit and accel, in one run.

    Writes report/report.md, report/index.html (Pareto plots), report/report.json (environment) and
    problems.json (settings that are missing or fail, with their errors). A stopped run continues; another --only adds
    settings, which get no speedup where the plain pictures were made in an earlier start.
    """
    from accel.evaluation import suites
    from accel.evaluation.bench.compare import compare
    from accel.evaluation.bench.peers import fewer_steps, ours, theirs
    from accel.generation import Settings, is_autoregressive

    wanted, counts = _pattern(only), c.wholes(steps, "--steps", "24,28,50")
    if batch is not None:
        return _distances(out, model, counts, limit, size, seed, batch, minutes, fine, wanted, device, dtype)
    if len(counts) > 1:
        raise ConfigError(f"--steps {steps}: one number, or add --batch")
    (total,) = counts
    chosen = [c for c in (*fewer_steps(total), *theirs(total), *ours(total)) if wanted.search(c.name)]
    if not chosen:
        raise ConfigError(f"--only {only!r} matches none of the settings")
    settings = Settings(total, None if size is None else (size, size))
    pipe = c.load(model, device, dtype)
    if is_autoregressive(pipe):
        raise ConfigError(f"{model} is an autoregressive model: its comparison is accel bench ar")
    settings.check(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = settings.arguments(pipe)

    def progress(state: tuple[int, int, str]) -> None:
        done, total, name = state
        say(f"{done}/{total} {name}", to=_console)

    page = compare(
        out, pipe, suites.scenes(), chosen, call=call, model=model, limit=limit, seed=seed, progress=progress
    )
    show_report(page.read_text(encoding="utf-8"))
    say(f"report: {page.with_name('index.html')}", to=_console)
    return None


def _distances(
    out: Path,
    model: str,
    counts: list[int],
    limit: int,
    size: int | None,
    seed: int,
    batch: int,
    minutes: float,
    fine: int,
    wanted: re.Pattern[str],
    device: str | None,
    dtype: str | None,
) -> None:
    """`peers --batch`."""
    from accel.evaluation import suites
    from accel.evaluation.bench.distance import Plan, measure, report
    from accel.generation import Settings, is_autoregressive

    pipe = c.load(model, device, dtype)
    if is_autoregressive(pipe):
        raise ConfigError(f"{model} is an autoregressive model: its comparison is accel bench ar")
    call = Settings(None, None if size is None else (size, size))
    call.check(pipe)
    prompts = suites.take(suites.scenes(seed=seed).prompts, limit)
    with _stages() as progress:
        plan = Plan(call, batch, 1000 * seed, fine, minutes, progress)
        rows = measure(out, pipe, prompts, counts, plan, wanted)
    made_with = f"{model}, {c.precision(pipe)} on {pipe.device}; {size or 'default'} px, {limit} prompts of seed {seed}."
    page = report(out, rows, made_with)
    show_report(page.read_text(encoding="utf-8"))


@app.command("few-step")
def few_step(
    out: Annotated[
        Path, typer.Argument(help="Folder for one folder per number of steps; continued if it exists.")
    ],
    model: Annotated[str, typer.Option(help="builtin, a diffusers folder or a hub id.")] = "builtin",
    steps: Annotated[str, typer.Option(help="Numbers of steps, comma-separated.")] = "4,6,8",
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, tasks in turn.")] = 48,
    only: Annotated[
        str, typer.Option(help="Regular expression: only the settings whose name it finds.")
    ] = "",
    size: Annotated[
        int | None, typer.Option(min=1, max=16_384, help="Height and width; default: the pipeline's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=c.MAX_SEED, help="Base seed.")] = 0,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Side-car of the model upcycled to few tokens: rows `upcycled-...`. Default: the built-in model's own, for it."
        ),
    ] = None,
    lpips: c.Lpips = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
) -> None:
    """Models of few steps: windows and forecasts in one schedule, against matching, ToMeSD's scheme, caches, fewer steps.

    One comparison for each number of steps, as `accel bench peers` makes it, and who is fastest at each distance from the
    plain pictures: OUT/4-steps/report/report.md and so on.
    """
    from accel.core import sidecar
    from accel.evaluation import suites
    from accel.evaluation.bench.compare import compare
    from accel.evaluation.bench.peers import few_step as settings_for
    from accel.evaluation.scorers import lpips_scorer
    from accel.generation import BUILTIN, BUILTIN_TEXTURED, Settings, is_autoregressive
    from accel.methods import learned
    from accel.pipelines.builtin import UPCYCLED

    scorers = [lpips_scorer(lpips)] if lpips else []  # before anything is made: the file may be missing
    wanted, counts = _pattern(only), c.wholes(steps, "--steps", "4,6,8")
    if adapter is None and model in (BUILTIN, BUILTIN_TEXTURED):
        adapter = UPCYCLED
    if adapter is not None:
        sidecar.read(adapter, learned.KIND)  # before anything is made, too
    chosen = {n: [c for c in settings_for(n, adapter) if wanted.search(c.name)] for n in counts}
    if not all(chosen.values()):
        raise ConfigError(f"--only {only!r} matches none of the settings")
    square = None if size is None else (size, size)
    pipe = c.load(model, device, dtype)
    if is_autoregressive(pipe):
        raise ConfigError(f"{model} is an autoregressive model: its comparison is accel bench ar")
    pipe.set_progress_bar_config(disable=True)
    for count in counts:
        settings = Settings(count, square)
        settings.check(pipe)
        call = settings.arguments(pipe)

        def progress(state: tuple[int, int, str]) -> None:
            say(f"{state[0]}/{state[1]} {state[2]}", to=_console)

        page = compare(
            out / f"{count}-steps",
            pipe,
            suites.scenes(),
            chosen[count],
            call=call,
            model=model,
            limit=limit,
            seed=seed,
            progress=progress,
            scorers=scorers,
        )
        say(f"# {count} steps")
        show_report(page.read_text(encoding="utf-8"))


@app.command("ar")
def autoregressive(
    out: Annotated[
        Path, typer.Argument(help="Folder for images, records and report; continued if it exists.")
    ],
    model: Annotated[str, typer.Option(help="builtin-ar, a folder, or a hub id.")] = "builtin-ar",
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, tasks in turn.")] = 60,
    samples: Annotated[int, typer.Option("--seeds", min=1, help="Images per prompt, each its own seed.")] = 1,
    batch_sizes: Annotated[str, typer.Option(help="Images per call, comma-separated.")] = "1,2,4,8,16,32",
    repeats: Annotated[int, typer.Option(min=1, help="Calls at each batch size above 1.")] = 3,
    window: Annotated[int, typer.Option(min=2, help="Window of all but the sweep over windows.")] = 16,
    only: Annotated[
        str, typer.Option(help="Regular expression: only the settings whose name it finds, and plain.")
    ] = "",
    guidance: c.Guidance = None,
    temperature: c.Temperature = None,
    top_k: c.TopK = None,
    top_p: c.TopP = None,
    seed: Annotated[int, typer.Option(min=0, max=c.MAX_SEED, help="Base seed.")] = 0,
    arch: Annotated[
        str,
        typer.Option(
            help="Instead of a model, random weights of published sizes, comma-separated: janus-1b, janus-7b, "
            "llamagen-xl, emu3."
        ),
    ] = "",
    windows: Annotated[str, typer.Option(help="With --arch: windows, comma-separated.")] = "8,16,32,64",
    ways: Annotated[str, typer.Option(help="With --arch: what to run, comma-separated.")] = (
        "captured,eager,compiled,transformers"
    ),
    minutes: Annotated[float, typer.Option(min=0, help="With --arch: begin nothing after these.")] = 60,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="With --arch: tiny sizes, to try the command.")
    ] = False,
    device: c.Device = None,
    dtype: c.Dtype = None,
) -> None:
    """Autoregressive: transformers' generate, plain decoding and ways of speculative decoding, in one run.

    Writes report/autoregressive.md, .json, .csv and plots. A stopped run continues. With --arch: milliseconds of a round at
    the sizes of published models, in report/shapes.md and .json.
    """
    if arch:
        _shapes(
            out,
            arch,
            c.wholes(batch_sizes, "--batch-sizes", "1,4,16"),
            windows,
            ways,
            minutes,
            tiny,
            device,
            dtype,
        )
        return
    from accel.evaluation import suites
    from accel.evaluation.bench.autoregressive import bench, settings
    from accel.generation import Settings, is_autoregressive

    wanted = _pattern(only)
    chosen = [item for item in settings(window=window) if item.is_plain or wanted.search(item.name)]
    sizes = c.wholes(batch_sizes, "--batch-sizes", "1,4,16")
    call = Settings(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    pipe = c.load(model, device, dtype)
    if not is_autoregressive(pipe):
        raise ConfigError(f"{model} is a diffusion model: its comparison is accel bench peers")
    call.check(pipe)
    with _bar() as update:
        page = bench(
            out,
            pipe,
            suites.scenes(),
            chosen,
            call=call.arguments(pipe),
            model=model,
            limit=limit,
            samples=samples,
            seed=seed,
            batch_sizes=sizes,
            repeats=repeats,
            progress=update,
        )
    show_report(page.read_text(encoding="utf-8"))
    say(f"report: {page}", to=_console)


@app.command()
def kernels(
    out: Annotated[
        Path, typer.Argument(help="Folder for kernels.json and kernels.md; continued if it exists.")
    ],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no row is begun.")] = 90,
    compile_only: Annotated[
        bool,
        typer.Option(
            "--compile-only", help="What the compiler makes of them for A100 and H100; needs no GPU."
        ),
    ] = False,
) -> None:
    """Triton kernels: each against its reference at FLUX.1's sizes, beside what its bytes or products must take."""
    from accel.evaluation.bench import kernels as bench

    if dtype not in bench.DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: expected one of {', '.join(bench.DTYPES)}")
    if compile_only:
        text = bench.compiled(out, dtype)
    else:
        text = bench.bench(out, dtype=dtype, budget=budget)
    show_report(text)


@contextmanager
def _stages() -> Iterator[Callable[[tuple[float, float, str]], None]]:
    """A bar on a terminal; lines in a log."""
    if not _console.is_terminal:
        yield lambda state: say(f"{state[0]:.0f}/{state[1]:.0f} {state[2]}", to=_console)
        return
    with c.stages() as update:
        yield update


def _shapes(
    out: Path,
    arch: str,
    batches: list[int],
    windows: str,
    ways: str,
    minutes: float,
    tiny: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    import torch

    from accel.evaluation.bench import autoregressive_shapes as shapes
    from accel.evaluation.bench.autoregressive_rows import bench_shapes
    from accel.pipelines.loading import place

    known = [shapes.CAPTURED, shapes.EAGER, shapes.COMPILED, shapes.TRANSFORMERS]
    where, precision = place(device, dtype)
    on_gpu = where.startswith("cuda")
    chosen = [way for way in _names(ways, "ways", known) if way != shapes.CAPTURED or on_gpu]
    page = bench_shapes(
        out,
        _names(arch, "arch", list(shapes.ARCHITECTURES)),
        torch.device(where),
        precision,
        batches=batches,
        windows=c.wholes(windows, "--windows", "8,16"),
        ways=chosen,
        minutes=minutes,
        dry=tiny,
        say=lambda text: say(text, to=_console),
    )
    show_report(page.read_text(encoding="utf-8"))
    say(f"report: {page}", to=_console)


@app.command("model")
def model_speed(
    arch: Annotated[str, typer.Option(help="flux1, flux2, qwen, zimage, sd3 or builtin.")] = "flux1",
    size: Annotated[str, typer.Option(help="Sides of square pictures in pixels, comma-separated.")] = "1024",
    rows: Annotated[
        str, typer.Option(help="Comma-separated, such as plain,plain+compiled,merging-0.5. Default: all.")
    ] = "",
    steps: Annotated[int, typer.Option(min=6, max=10_000, help="Denoising steps of a picture.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Timed loops of each row.")] = 2,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Start no row that would end later.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results, continued if it exists. Default: model-ARCH.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A few narrow blocks and nothing compiled: tries every row out.")
    ] = False,
    device: c.Device = None,
    dtype: c.Dtype = None,
) -> None:
    """Milliseconds of a step of denoisers of the real shapes, with random weights: speed, never quality.

    Plain, compiled, in CUDA graphs; merging, pruning and presets; cache-dit and diffusers' TaylorSeer at equal computed
    steps. Writes model.json, model.md and, of several sizes, model.svg. A stopped bench continues.
    """
    from accel import backends

    backends.require_sound_stack()
    from accel.evaluation.bench.model import bench
    from accel.evaluation.bench.model_rows import every
    from accel.pipelines.loading import place

    where, precision = place(device, dtype)
    with _bar() as update:
        page = bench(
            out or Path(f"model-{arch}"),
            arch,
            c.wholes(size, "--size", "512,1024"),
            rows or ",".join(every(where)),
            steps=steps,
            rounds=rounds,
            minutes=minutes,
            device=where,
            dtype=precision,
            tiny=tiny,
            progress=update,
            done=lambda line: say(line, to=_console),
        )
    show_report(page.read_text(encoding="utf-8"))
    say(f"report: {page}", to=_console)


def _names(text: str, option: str, known: list[str]) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--{option}: {unknown[0]!r} is none of {', '.join(known)}")
    return names


@contextmanager
def _bar() -> Iterator[Callable[[tuple[int, int, str]], None]]:
    """A bar for what `accel.evaluation.run` says: (done, total, configuration) of the batch size at hand."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda state: bars.update(
            task, completed=state[0], total=state[1], description=visible(state[2])
        )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"--only {text!r} is not a regular expression: {error}") from error
