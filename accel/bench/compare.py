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

from accel.evaluation.configurations import PLAIN, Configuration, resolve
from accel.evaluation.folder import RunFolder
from accel.evaluation.judges import scenes_judge
from accel.evaluation.records import write_atomically
from accel.evaluation.report import report
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers
from accel.evaluation.suites import Suite

from . import frontier
from .macs import counted
from .peers import Peer

PROBLEMS, MACS = "problems.json", "macs.json"


def try_out(
    pipe: Any, configurations: Sequence[Configuration], prompt: str, call: dict[str, Any]
) -> tuple[list[Configuration], dict[str, str], dict[str, int]]:
    """Run every setting once, which also warms it up: those that work, why the others do not, and how many
    multiply-accumulates the denoiser takes for the image."""
    macs: dict[str, int] = {}
    working: list[Configuration] = []
    problems: dict[str, str] = {}
    for item in configurations:
        if isinstance(item, Peer) and item.missing:
            problems[item.name] = (
                f"skipped: {item.package} is not installed (pip install 'accel-image[bench]')"
            )
            continue
        steps = {} if item.steps is None else {"num_inference_steps": item.steps}
        try:
            with item.attach(pipe), counted(pipe) as count:
                pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), **{**call, **steps})
        except Exception as error:  # whatever a peer raises belongs into the report
            problems[item.name] = f"{type(error).__name__}: {error}"
        else:
            working.append(item)
            macs[item.name] = count.macs
    return working, problems, macs


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
) -> Path:
    """Compare settings on one pipeline, in one process; returns the Markdown report.

    Args:
        path: folder for images, records and report; continued if it exists.
        call: arguments of every pipeline call; `num_inference_steps` among them.
        limit: number of prompts.

    Settings that are missing or fail are written to problems.json and into the report with their errors; the
    denoiser's multiply-accumulates for the first prompt to macs.json and into the Markdown report.
    """
    names = [c.name for c in configurations if not c.is_plain]
    tried = resolve(configurations)  # the plain pipeline first, which is always run
    working, problems, macs = try_out(pipe, tried, suite.prompts[0].text, {**call, "output_type": "pil"})
    folder = run(
        path,
        suite,
        pipe,
        working,
        model=model,
        limit=limit,
        base_seed=seed,
        call=call,
        warmup=0,  # tried out above
        progress=progress,
    )
    if suite.name == "scenes":
        judge = scenes_judge()
        score(path, [judge.scorer, *pixel_scorers()], bounds=judge.bounds)
    else:
        score(path, pixel_scorers())
    page = _report(folder, names, problems, macs)
    _frontier(page, working, macs)
    return page


def _frontier(page: Path, configurations: Sequence[Configuration], macs: dict[str, int]) -> None:
    summary = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    items = frontier.entries(summary, configurations, macs)
    text = page.read_text(encoding="utf-8").rstrip()
    write_atomically(page, f"{text}\n{frontier.markdown(items)}\n")
    frontier.plot(items, page.with_name("frontier.png"))


def _report(folder: RunFolder, names: Sequence[str], problems: dict[str, str], macs: dict[str, int]) -> Path:
    write_atomically(folder.path / PROBLEMS, json.dumps(problems, indent=2) + "\n")
    write_atomically(folder.path / MACS, json.dumps(macs, indent=2) + "\n")
    page = report(folder.path).with_name("report.md")
    sections = []
    if macs:
        table = [f"| {name} | {n / 1e9:.1f} | {n / macs[PLAIN]:.3f} |" for name, n in macs.items()]
        head = ["| configuration | GMACs | of plain |", "| --- | --- | --- |"]
        sections += ["", "## Multiply-accumulates of the denoiser, one image", "", *head, *table]
    lines = [f"- `{name}`: {problems[name]}" for name in names if name in problems]
    if lines:
        sections += ["", "## Settings that did not run", "", *lines]
    text = page.read_text(encoding="utf-8").rstrip()
    write_atomically(page, "\n".join([text, *sections, ""]))
    return page
