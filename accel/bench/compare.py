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

from accel.evaluation.configurations import Configuration
from accel.evaluation.folder import RunFolder
from accel.evaluation.judges import scenes_judge
from accel.evaluation.records import write_atomically
from accel.evaluation.report import report
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers
from accel.evaluation.suites import Suite

from .peers import Peer

PROBLEMS = "problems.json"


def try_out(
    pipe: Any, configurations: Sequence[Configuration], prompt: str, call: dict[str, Any]
) -> tuple[list[Configuration], dict[str, str]]:
    """Run every setting once, which also warms it up: those that work, and why the others do not."""
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
            with item.attach(pipe):
                pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), **{**call, **steps})
        except Exception as error:  # whatever a peer raises belongs into the report
            problems[item.name] = f"{type(error).__name__}: {error}"
        else:
            working.append(item)
    return working, problems


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

    Settings that are missing or fail are written to problems.json and into the report with their errors.
    """
    names = [c.name for c in configurations if not c.is_plain]
    working, problems = try_out(pipe, configurations, suite.prompts[0].text, {**call, "output_type": "pil"})
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
    return _report(folder, names, problems)


def _report(folder: RunFolder, names: Sequence[str], problems: dict[str, str]) -> Path:
    write_atomically(folder.path / PROBLEMS, json.dumps(problems, indent=2) + "\n")
    page = report(folder.path).with_name("report.md")
    lines = [f"- `{name}`: {problems[name]}" for name in names if name in problems]
    if lines:
        text = page.read_text(encoding="utf-8").rstrip()
        write_atomically(page, "\n".join([text, "", "## Settings that did not run", "", *lines, ""]))
    return page
