"""`accel evaluate`: generate, score and report, each stage resumable."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from accel.errors import AccelWarning
from accel.strict import dump_json

from .common import MAX_SEED, Lpips
from .markdown import show_report
from .terminal import progress_console as _console
from .terminal import say

app = typer.Typer(
    help="Quality against speed: generate with several configurations, score, report.", no_args_is_help=True
)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_F = TypeVar("_F", bound=Callable[..., None])

Out = Annotated[Path, typer.Argument(help="Run folder; made if absent, continued if it exists.")]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        help="Repeatable: a preset, a YAML file, steps=N, or PRESET,KEY=VALUE; NAME: in front names it. "
        "The plain pipeline is always run.",
    ),
]
Model = Annotated[str, typer.Option(help="builtin, a diffusers folder, a hub id, or file.py:function.")]
SuiteName = Annotated[str, typer.Option("--suite", help="scenes, geneval, or a text file of prompts.")]
MetadataFile = Annotated[Path | None, typer.Option("--metadata", help="GenEval's evaluation_metadata.jsonl.")]
PerTask = Annotated[int, typer.Option(min=1, help="Scenes suite: prompts per task, six tasks.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many prompts, tasks in turn.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Images per prompt (GenEval: 4).")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Base seed.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per pipeline call.")]
ScoreBatch = Annotated[int, typer.Option(min=1, help="Images scored at a time.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Steps of all configurations that do not set their own.")
]
Size = Annotated[str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT; default: the pipeline's.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, mps; default: cuda if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: the pipeline's.")]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed images per configuration at every start.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check existing images by hash, not only by length.")]
Clip = Annotated[str | None, typer.Option(help="CLIP folder or hub id: adds CLIP score; colours in GenEval.")]
Extractors = Annotated[
    list[str] | None,
    typer.Option(
        "--extractor",
        help="Repeatable, adds FID, KID, precision, recall: scenes, inception:PATH, clip:SOURCE (and CMMD), "
        "dinov2:SOURCE. Default for the scenes suite: scenes.",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(help="Folder of reference images for FID and the like; default for scenes: ground truth."),
]
DetectorSource = Annotated[
    str | None, typer.Option("--detector", help="GenEval: Mask2Former folder or hub id.")
]
SanityImages = Annotated[Path | None, typer.Option("--sanity", help="GenEval: folder of known pictures.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images", help="Repeatable NAME=FOLDER: score existing images; the first is the plain one."
    ),
]
Worst = Annotated[int, typer.Option(min=0, help="Image triples per configuration in the report.")]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout.")]


def _interruptible(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Ctrl-C says that nothing is lost, a warning is said once; errors are printed by `accel.cli.app.main`."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            with warnings.catch_warnings():
                # A stage reads its records several times, and would name a damaged one each time.
                warnings.simplefilter("once", AccelWarning)
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            say("stopped; everything finished is kept, the same command continues", to=_console)
            raise typer.Exit(130) from None

    return wrapped


def _with_options_of(*commands: Callable[..., None], without: tuple[str, ...]) -> Callable[[_F], _F]:
    """A command's parameters are those of others, so that an option is described and defaulted once.

    Where two have a parameter of one name, the first one's holds.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for command in commands:
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if name not in without:
                parameters.setdefault(name, parameter)

    def decorate(command: _F) -> _F:
        command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        command.__annotations__ = {name: p.annotation for name, p in parameters.items()}
        return command

    return decorate


def _call(command: Callable[..., None], options: dict[str, Any]) -> None:
    wanted = inspect.signature(command).parameters
    command(**{name: value for name, value in options.items() if name in wanted})


@app.command("run")
@_interruptible
def run_command(
    out: Out,
    config: Configs = None,
    model: Model = "builtin",
    suite: SuiteName = "scenes",
    metadata: MetadataFile = None,
    per_task: PerTask = 36,
    limit: Limit = None,
    samples: Samples = 1,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    device: Device = None,
    dtype: Dtype = None,
    warmup: Warmup = 1,
    verify: Verify = False,
) -> None:
    """Generate the images that are missing, with times. Under `accelerate launch` the work is shared."""
    import diffusers
    import transformers

    from accel.evaluation import configurations, models, suites
    from accel.evaluation.records import rank_and_world
    from accel.evaluation.run import Progress, run
    from accel.generation import Settings, parse_size

    resolved = configurations.resolve(config or [])
    prompts = suites.load(suite, metadata=metadata, per_task=per_task)
    settings = Settings(steps, parse_size(size) if size is not None else None, guidance)
    diffusers.utils.logging.disable_progress_bar()  # the loaders' bars would write over ours
    transformers.utils.logging.disable_progress_bar()
    pipe = models.load_pipeline(model, device=_device(device), dtype=dtype)
    call = _call_arguments(pipe, settings)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    made = 0
    with _progress("generating") as update:

        def show(progress: Progress) -> None:
            nonlocal made
            made = progress.done
            update(progress.done, progress.total)

        folder = run(
            out,
            prompts,
            pipe,
            resolved,
            model=model,
            samples_per_prompt=samples,
            limit=limit,
            base_seed=seed,
            batch_size=batch_size,
            call=call,
            warmup=warmup,
            verify=verify,
            progress=show,
        )
    if not rank_and_world()[0]:
        images = sum(1 for _ in folder.samples())
        text = f"{made} images made, {images} in {out / 'images'}"
        say(text, to=_console)


@app.command("score")
@_interruptible
def score_command(
    out: Out,
    images: Images = None,
    lpips: Lpips = None,
    clip: Clip = None,
    extractor: Extractors = None,
    reference: Reference = None,
    detector: DetectorSource = None,
    sanity: SanityImages = None,
    device: Device = None,
    batch_size: ScoreBatch = 16,
) -> None:
    """Score the images of a run folder, or existing image folders, that are not scored yet."""
    from accel.evaluation import importing, judges
    from accel.evaluation.errors import EvaluationError
    from accel.evaluation.folder import RunFolder
    from accel.evaluation.score import score

    if images:
        importing.import_images(out, _folders(images))
    described = RunFolder(out).settings["suite"]
    suite = described["name"]
    if clip and described.get("named_by_file"):
        raise EvaluationError(
            "--clip compares images with their prompts, and these images came without: give them GenEval's "
            "layout (<id>/metadata.jsonl, <id>/samples/*.png), or leave --clip out"
        )
    tools = _load_tools(suite, lpips, clip, extractor, reference, detector, sanity, _device(device))
    if suite == "geneval" and not (detector and clip):
        place = "" if images else f"; the images are in GenEval's own layout under {out / 'images'}"
        say(
            f"no GenEval score without --detector (Mask2Former) and --clip (ViT-L/14){place}",
            "yellow",
            to=_console,
        )
    if suite == "scenes" and tools.extractors and reference is None:
        reference = judges.write_ground_truth(RunFolder(out))
    with _progress("scoring") as update:
        score(
            out,
            tools.scorers,
            tools.extractors,
            reference=reference,
            bounds=tools.bounds,
            batch_size=batch_size,
            progress=update,
        )


@app.command("report")
@_interruptible
def report_command(out: Out, worst: Worst = 6, as_json: Json = False) -> None:
    """Write report/index.html (self-contained), report.md, report.json and report.csv."""
    from accel.evaluation.records import rank_and_world
    from accel.evaluation.report import report

    if rank_and_world()[0]:
        return
    with _console.status("measuring distances and writing the report"):  # minutes with many images
        page = report(out, worst=worst)
    text = page.with_name("report.json").read_text(encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        show_report(page.with_name("report.md").read_text(encoding="utf-8"))
        say(f"report: {page}", to=_console)


@app.command("all")
@_interruptible
@_with_options_of(run_command, score_command, report_command, without=("verify", "images"))
def all_command(**options: Any) -> None:
    """Run, score and report in one go, in one process."""
    from accel.evaluation.errors import EvaluationError
    from accel.evaluation.records import rank_and_world

    if rank_and_world()[1] > 1:
        raise EvaluationError("`all` is for one process; launch `run`, then `score`, then `report`")
    # What cannot be loaded should be known before the images are made, not after.
    names = ("suite", "lpips", "clip", "extractor", "reference", "detector", "sanity")
    _load_tools(**{name: options[name] for name in names}, device=_device(options["device"]))
    _call(run_command, options)
    _call(score_command, {name: value for name, value in options.items() if name != "batch_size"})
    _call(report_command, options)


@app.command("official")
@_interruptible
def official_command(
    results: Annotated[Path, typer.Argument(help="Results file (jsonl) of the official GenEval tool.")],
) -> None:
    """Scores with intervals from the official GenEval tool's results file, as JSON.

    Where the file holds the detector's boxes they are judged by our rules too: `same_rules` counts how
    often the verdict is the same, and names the files where it is not.
    """
    from accel.evaluation.geneval import aggregate
    from accel.evaluation.importing import official_results, same_rules

    scores = aggregate(official_results(results)).to_dict()
    typer.echo(dump_json({**scores, "same_rules": same_rules(results)}))


class _Tools(NamedTuple):
    """What `score` judges with."""

    scorers: list[Any]
    extractors: list[Any]
    bounds: Any


def _load_tools(
    suite: str,
    lpips: str | None,
    clip: str | None,
    extractor: list[str] | None,
    reference: Path | None,
    detector: str | None,
    sanity: Path | None,
    device: str,
) -> _Tools:
    from accel.evaluation import extractors, judges, scorers
    from accel.evaluation.errors import EvaluationError
    from accel.evaluation.score import reference_images

    extractor = extractor or (["scenes"] if suite == "scenes" else [])
    if reference is not None:
        reference_images(reference)
        if not extractor:
            raise EvaluationError("--reference needs --extractor, which measures the distance to its images")
    loaded = [extractors.load(spec, device=device) for spec in extractor]
    wanted: list[scorers.Scorer] = []
    bounds = None
    if suite == "scenes":
        judge = judges.scenes_judge()
        wanted, bounds = [judge.scorer], judge.bounds
    elif suite == "geneval" and detector and clip:
        wanted = [judges.geneval_judge(detector, clip, sanity_images=sanity, device=device).scorer]
    wanted += scorers.pixel_scorers()
    if lpips:
        wanted.append(scorers.lpips_scorer(lpips, device=device))
    if clip:
        # Loaded once where both ask for the same model, and never taken for another.
        same = [
            e
            for spec, e in zip(extractor, loaded, strict=True)
            if spec == f"clip:{clip}" and isinstance(e, extractors.ClipExtractor)
        ]
        wanted.append(scorers.ClipScorer(same[0] if same else extractors.ClipExtractor(clip, device=device)))
    return _Tools(wanted, loaded, bounds)


def _folders(images: list[str]) -> dict[str, str]:
    """`--images NAME=FOLDER`, repeated."""
    from accel.evaluation.errors import EvaluationError

    folders: dict[str, str] = {}
    for text in images:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise EvaluationError(f"--images takes NAME=FOLDER, not {text!r}")
        if name in folders:
            raise EvaluationError(f"--images: {name!r} is given twice; every folder needs a name of its own")
        folders[name] = folder
    return folders


def _call_arguments(pipe: Any, settings: Any) -> dict[str, Any]:
    """What every call of the pipeline gets besides prompts and seeds; refused if it cannot take it."""
    from accel.evaluation.errors import EvaluationError

    settings.check(pipe)
    call = settings.arguments(pipe)
    parameters = inspect.signature(pipe.__call__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in call:
            if name not in parameters:
                raise EvaluationError(
                    f"{type(pipe).__name__} takes no {name!r}; leave the option out that sets it"
                )
    return call


def _device(name: str | None) -> str:
    import torch

    from accel.evaluation.errors import EvaluationError
    from accel.evaluation.records import rank_and_world
    from accel.pipelines.loading import check_device

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(
            f"--device {name}: no CUDA here (`accel info` says why); leave it out for the CPU"
        )
    check_device(name)
    if name == "cuda" and rank_and_world()[1] > 1:
        return f"cuda:{rank_and_world()[2] % torch.cuda.device_count()}"
    return name


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], Any]]:
    """A bar on stderr with the remaining time, of the first process only."""
    from accel.evaluation.records import rank_and_world

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=_console, disable=rank_and_world()[0] > 0) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
