"""Run a comparison: try every setting once, then generate interleaved, score and report.

Generating, timing, scoring and reporting are `accel.evaluation`'s, so that a stopped comparison continues
where it was, and the report has its intervals, Pareto plots and environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from accel.core.weighted_attention import chosen
from accel.evaluation.configurations import PLAIN, Configuration
from accel.evaluation.folder import PROBLEMS, RunFolder
from accel.evaluation.judges import scenes_judge
from accel.evaluation.records import write_atomically
from accel.evaluation.report import plot, report
from accel.evaluation.report.table import Table
from accel.evaluation.run import check, run
from accel.evaluation.score import score
from accel.evaluation.scorers import Scorer, pixel_scorers
from accel.evaluation.suites import Prompt, Suite, take

from . import frontier
from .macs import Count, counted
from .peers import Peer

MACS = "macs.json"


def try_out(
    pipe: Any,
    configurations: Sequence[Configuration],
    prompt: str,
    call: dict[str, Any],
    progress: Callable[[Any], None] | None = None,
) -> tuple[list[Configuration], dict[str, str], dict[str, int]]:
    """Run every setting once, which also warms it up: those that work, why the others do not, and how many
    multiply-accumulates the denoiser takes for the image. The plain pipeline has to work: what it raises is
    raised."""
    macs: dict[str, int] = {}
    working: list[Configuration] = []
    problems: dict[str, str] = {}
    for number, item in enumerate(configurations, 1):
        if progress:
            progress((number, len(configurations), f"{item.name}, trying"))
        if isinstance(item, Peer) and item.missing:
            problems[item.name] = (
                f"skipped: {item.package} is not installed (pip install 'accel-image[bench]')"
            )
            continue
        steps = {} if item.steps is None else {"num_inference_steps": item.steps}
        try:
            with item.attach(pipe):
                count = _count(pipe, prompt, {**call, **steps})
        except Exception as error:  # whatever a setting raises belongs into the report
            if item.is_plain:
                raise
            problems[item.name] = f"{type(error).__name__}: {error}"
        else:
            working.append(item)
            macs[item.name] = count.macs
    return working, problems, macs


def _count(pipe: Any, prompt: str, call: dict[str, Any]) -> Count:
    while True:
        forms = chosen()
        with counted(pipe) as count:
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), **call)
        if chosen() == forms:  # else finding out which form of weighted attention is fastest was counted, too
            return count


def compare(
    path: str | Path,
    pipe: Any,
    suite: Suite,
    configurations: Sequence[Configuration],
    *,
    call: dict[str, Any],
    model: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[Any], None] | None = None,
    scorers: Sequence[Scorer] = (),
) -> Path:
    """Compare settings on one pipeline, in one process; returns the Markdown report.

    Args:
        path: folder for images, records and report; continued if it exists.
        call: arguments of every pipeline call; `num_inference_steps` among them.
        limit: number of prompts.
        scorers: beside the suite's own, PSNR and SSIM.

    Settings that are missing, fail when tried, or of other libraries fail later are written to problems.json and
    into the report with their errors; the denoiser's multiply-accumulates for the first prompt to macs.json and
    into the Markdown report. What a continued folder has of other settings stays in all of them.

    Raises:
        RecordError: the folder cannot be used, or was started with other settings; before any setting is tried.
    """
    names = [c.name for c in configurations if not c.is_plain]
    arguments: dict[str, Any] = {"model": model, "limit": limit, "base_seed": seed, "call": call}
    folder, _, every = check(path, suite, pipe, configurations, **arguments)  # the plain pipeline first
    macs, problems = _macs(folder), folder.problems
    finished = _finished(folder, take(suite.prompts, limit))
    # Trying costs an image; without one to make there is nothing to warm up.
    tried = [c for c in every if c.name in problems or c.name not in macs or c.name not in finished]
    single = {**call, "output_type": "pil"}
    working, failed, counts = try_out(pipe, tried, suite.prompts[0].text, single, progress)
    again = {c.name for c in tried}
    problems = {name: why for name, why in problems.items() if name not in again} | failed

    def broke(item: Configuration, prompts: Sequence[Prompt], error: Exception) -> bool:
        """Of another library: its problem, not the comparison's. Ours stop the run."""
        if isinstance(item, Peer):
            problems[item.name] = f"{type(error).__name__}: {error} (on {prompts[0].text!r})"
        return isinstance(item, Peer)

    run(
        path,
        suite,
        pipe,
        working,
        **arguments,
        warmup=0,  # tried out above
        tolerate=broke,
        progress=progress,
    )
    macs = {name: count for name, count in (macs | counts).items() if name not in problems}
    # Before scoring: stopped there, a start that continues need not try everything again.
    write_atomically(folder.path / MACS, json.dumps(macs, indent=2) + "\n")
    if suite.name == "scenes":
        judge = scenes_judge()
        score(path, [judge.scorer, *pixel_scorers(), *scorers], bounds=judge.bounds)
    else:
        score(path, [*pixel_scorers(), *scorers])
    page = _report(folder, names, problems, macs)
    _frontier(page, macs)
    return page


def _macs(folder: RunFolder) -> dict[str, int]:
    file = folder.path / MACS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _finished(folder: RunFolder, prompts: Sequence[Prompt]) -> set[str]:
    """Names of the configurations that have an image of every prompt."""
    made: dict[str, set[int]] = {}
    for record in folder.samples():
        made.setdefault(record["configuration"], set()).add(record["prompt_id"])
    return {name for name, ids in made.items() if ids >= {prompt.id for prompt in prompts}}


def _frontier(page: Path, macs: dict[str, int]) -> None:
    summary = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    items = frontier.entries(summary, macs)
    title, text = page.read_text(encoding="utf-8").rstrip().split("\n", 1)
    tables = frontier.markdown(items, frontier.left_out(summary, items))
    write_atomically(page, f"{title}\n\n{_made_with(summary)}\n{text}\n{tables}\n")
    if drawn := frontier.plots(items, frontier.plain_score(summary)):
        write_atomically(page.with_name("frontier.svg"), plot.file(drawn))


def _made_with(summary: dict[str, Any]) -> str:
    """What a reader needs to place the numbers, or to make them again."""
    starts = summary["sessions"]

    def every(name: str) -> str:
        return " and ".join(dict.fromkeys(str(start.get(name) or "unknown") for start in starts))

    versions = [
        f"{name} {' and '.join(dict.fromkeys(start['versions'].get(name) or 'missing' for start in starts))}"
        for name in ("torch", "diffusers", "cache-dit")
    ]
    call = ", ".join(f"{name} {value}" for name, value in summary["run"]["call"].items())
    return (
        f"Made with: model {summary['run']['model']}, dtype {every('dtype')}; {call}; {summary['prompts']} "
        f"prompts; threads {every('threads')}; {', '.join(versions)}."
    )


def _report(folder: RunFolder, names: Sequence[str], problems: dict[str, str], macs: dict[str, int]) -> Path:
    write_atomically(folder.path / PROBLEMS, json.dumps(problems, indent=2) + "\n")
    page = report(folder.path).with_name("report.md")
    sections = []
    if macs:
        rows = [[name, f"{n / 1e9:.1f}", f"{n / macs[PLAIN]:.3f}"] for name, n in macs.items()]
        title = "Multiply-accumulates of the denoiser, one image"
        sections += ["", Table(["configuration", "GMACs", "of plain"], rows, title).markdown()]
    # Those of this start in their order, then those of earlier ones.
    named = [name for name in dict.fromkeys([*names, *problems]) if name in problems]
    lines = [f"- `{name}`: {' '.join(problems[name].split())}" for name in named]
    if lines:
        sections += ["", "## Settings that did not run", "", *lines]
    text = page.read_text(encoding="utf-8").rstrip()
    write_atomically(page, "\n".join([text, *sections, ""]))
    return page
