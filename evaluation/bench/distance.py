"""How far each setting's pictures are from the plain ones at what it computes: many prompts in one call, no clock games.

The comparison that the clock cannot make on a busy machine, or on a GPU, where a small model's step is bound by launches:
quality per computed step. To the plain pictures of N steps, which is what acceleration is to keep; and to a fine run
of the same sampler, which is what plain itself approximates. They are not the same: a solver may be nearer to the
latter than plain is, and far from plain.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel import generation
from accel.core import made_for
from accel.core.capability import denoisers_of, scheduler_of
from accel.errors import ConfigError
from accel.evaluation.bootstrap import mean_interval
from accel.evaluation.configurations import PLAIN, Configuration
from accel.evaluation.errors import EvaluationError
from accel.evaluation.pictures import load_pngs, save_pngs
from accel.evaluation.records import Appender, Shape, read_records, write_atomically
from accel.evaluation.report.table import Markdown, Table
from accel.evaluation.suites import Prompt
from accel.generation import Job

from .frontier import OURS, PEERS, STEPS
from .lineup import Setting, settings
from .peers import Peer

FINE = "fine"
_ROW: Shape = {"made": (dict,), "steps": (int,), "name": (str,)}


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        call: of the pipeline, without steps.
        batch: images per call.
        fine: steps of the fine run; 0: none.
        minutes: after this long, no setting is started.
        seed: of the first prompt's noise; each further one adds one.
    """

    call: generation.Settings
    batch: int
    seed: int = 0
    fine: int = 200
    minutes: float = float("inf")
    progress: Callable[[tuple[float, float, str]], None] = field(default=lambda state: None)


def measure(
    path: Path,
    pipe: Any,
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    plan: Plan,
    only: re.Pattern[str] = re.compile(""),
) -> list[dict[str, Any]]:
    """Run every setting at every number of steps; returns the rows, those of earlier starts among them.

    Args:
        path: folder; `distances.jsonl` in it is continued, with the plain and the fine pictures beside it.
        counts: numbers of steps of the plain pipeline.
        only: settings whose name it finds.

    Raises:
        ConfigError: `only` finds no setting.
        EvaluationError: the folder is of another model or other settings.
    """
    lines = {n: [s for s in settings(n) if only.search(s.item.name)] for n in counts}
    if not any(lines.values()):
        raise ConfigError(f"--only {only.pattern!r} matches none of the settings")
    (_, denoiser), *_ = denoisers_of(pipe)
    made = {
        **made_for.describe(denoiser, scheduler_of(pipe)),
        "dtype": str(getattr(denoiser, "dtype", "")).removeprefix("torch."),
        "device": torch.device(pipe.device).type,
        "call": str(plan.call),
        "seed": plan.seed,
        "fine": plan.fine,
        "prompts": [p.text for p in prompts],
    }
    file = path / "distances.jsonl"
    rows = list(read_records(file, _ROW)) if file.exists() else []
    if any(row["made"] != made for row in rows):
        raise EvaluationError(
            f"{file} was made with another call or other prompts, or another model: choose another folder"
        )
    jobs = [Job(prompt.text, plan.seed + i) for i, prompt in enumerate(prompts)]
    known = {(row["steps"], row["name"]) for row in rows}
    todo = [
        (n, line[i])
        for i in range(max(map(len, lines.values())))
        for n, line in lines.items()
        if i < len(line)
    ]
    todo = [(n, s) for n, s in todo if (n, s.item.name) not in known]

    def keep(total: int, row: Mapping[str, Any]) -> None:
        rows.append({"made": made, "steps": total, **row})
        with Appender(file) as out:
            out.write(rows[-1])

    until, plains = time.monotonic() + 60 * plan.minutes, {}
    kept = path / "plain" / hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    if not todo:
        return rows
    fine = load_pngs(kept / FINE, len(jobs)) if plan.fine else None
    if fine is None and plan.fine:
        plan.progress((0, len(todo), f"{plan.fine} steps, once"))
        fine, _, _ = _pictures(pipe, Configuration(FINE, steps=plan.fine), jobs, plan.fine, plan)
        save_pngs(kept / FINE, fine)
    for total in dict.fromkeys(n for n, _ in todo):
        before = next((row for row in rows if (row["steps"], row["name"]) == (total, PLAIN)), {})
        pictures = load_pngs(kept / str(total), len(jobs))
        if pictures is not None and "calls" in before:
            plains[total] = (pictures, before["calls"], before["seconds"])
            continue
        plan.progress((0, len(todo), f"{total} steps, plain"))
        plains[total] = pictures, calls, seconds = _pictures(pipe, Configuration(PLAIN), jobs, total, plan)
        save_pngs(kept / str(total), pictures)
        if not before:
            row = {"name": PLAIN, "group": STEPS, "why": "", "computed": float(total), "seconds": seconds}
            row |= {"psnr": None, "fine": _to_fine(pictures, fine), "score": _scores(pictures, prompts)}
            keep(total, row | {"calls": calls})
    for done, (total, setting) in enumerate(todo):
        if time.monotonic() > until:
            break
        plan.progress((done, len(todo), f"{total} steps, {setting.item.name}"))
        keep(total, _row(pipe, setting, jobs, prompts, total, plan, plains[total], fine))
    return rows


def _row(
    pipe: Any,
    setting: Setting,
    jobs: Sequence[Job],
    prompts: Sequence[Prompt],
    total: int,
    plan: Plan,
    plain_run: tuple[Tensor, int, float],
    fine: Tensor | None,
) -> dict[str, Any]:
    plain, plain_calls, _ = plain_run
    row: dict[str, Any] = {"name": setting.item.name, "group": setting.group, "why": ""}
    empty = {"computed": None, "seconds": None, "psnr": None, "fine": None, "score": None}
    if isinstance(setting.item, Peer) and setting.item.missing:
        return row | empty | {"why": f"{setting.item.package} is not installed"}
    try:
        pictures, calls, seconds = _pictures(pipe, setting.item, jobs, total, plan)
    except Exception as error:  # of another library: its problem, not the comparison's
        if setting.group == OURS:
            raise
        return row | empty | {"why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    computed = total * calls / plain_calls if plain_calls else None
    if setting.group == PEERS and calls == plain_calls and torch.equal(pictures, plain):
        return (
            row
            | empty
            | {"why": "changed nothing: it is not made for this pipeline, and computed every step"}
        )
    values = {"psnr": _decibels(pictures, plain), "fine": _to_fine(pictures, fine)}
    return row | values | {"computed": computed, "seconds": seconds, "score": _scores(pictures, prompts)}


def _to_fine(pictures: Tensor, fine: Tensor | None) -> list[float] | None:
    return None if fine is None else _decibels(pictures, fine)


def _decibels(pictures: Tensor, others: Tensor) -> list[float]:
    """PSNR of each pair, 100 dB where they are the same."""
    squares = (pictures.double() - others.double()).square().flatten(1).mean(1) / 255**2
    return [round(value, 4) for value in (-10 * squares.clamp(min=1e-10).log10()).tolist()]


def _scores(pictures: Tensor, prompts: Sequence[Prompt]) -> list[float] | None:
    """1 where the picture shows what the prompt says, by the built-in world's detector; None: not its prompts."""
    from accel.evaluation import scenes
    from accel.evaluation.geneval.scorer import score

    if not all(prompt.metadata for prompt in prompts):
        return None
    seen = scenes.detect(pictures)
    return [float(score(s, p.metadata).correct) for s, p in zip(seen, prompts, strict=True) if p.metadata]


def _pictures(
    pipe: Any, item: Configuration, jobs: Sequence[Job], total: int, plan: Plan
) -> tuple[Tensor, int, float]:
    """(P, 3, H, W) uint8; how often attentions were computed; seconds."""
    call = generation.Settings(item.steps or total, plan.call.size, plan.call.guidance)
    pictures: list[Tensor] = []
    calls: list[int] = []
    with item.attach(pipe), _attentions(pipe, calls):
        began = time.monotonic()
        for members in generation.batches(jobs, plan.batch):
            made = generation.run(pipe, members, call)
            pictures.append((made * 255).round().byte())
    return torch.cat(pictures), len(calls), time.monotonic() - began


@contextmanager
def _attentions(pipe: Any, calls: list[int]) -> Iterator[None]:
    """Counts what is computed by the attentions' projections of queries, behind whatever other libraries put in front."""
    (_, denoiser), *_ = denoisers_of(pipe)
    queries = [module for name, module in denoiser.named_modules() if name.endswith(".to_q")]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in queries]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each number of steps: everything, by what it computes; then ours against the best of the others that compute
    as much."""
    found = []
    for total in sorted({row["steps"] for row in rows}):
        here = [row for row in rows if row["steps"] == total]
        found += [_every(here, total), _against(here, total)]
    return [table for table in found if table.rows]


def _every(rows: Sequence[Mapping[str, Any]], total: int) -> Table:
    fine = any(row["fine"] for row in rows)
    header = ["setting", "whose", "computed", "PSNR to plain (dB)", "p10"]
    header += [*(["to a fine run", "p10 "] if fine else []), "score", "time / plain"]
    plain = next((row["seconds"] for row in rows if row["name"] == PLAIN), None)
    body = []
    for row in sorted(
        rows, key=lambda r: (r["computed"] is None, r["computed"] or 0, -np.mean(r["psnr"] or [0]))
    ):
        if row["why"]:
            continue
        to_plain = (
            ["", ""] if row["psnr"] is None else [_mean(row["psnr"]), f"{np.quantile(row['psnr'], 0.1):.1f}"]
        )
        to_fine = [f"{np.mean(row['fine']):.1f}", f"{np.quantile(row['fine'], 0.1):.1f}"] if fine else []
        score = "" if row["score"] is None else f"{np.mean(row['score']):.3f}"
        clock = "" if not plain else f"{row['seconds'] / plain:.2f}"
        body.append(
            [
                Markdown(f"`{row['name']}`"),
                row["group"],
                "–" if row["computed"] is None else f"{row['computed']:.1f}",
                *to_plain,
                *to_fine,
                score,
                clock,
            ]
        )
    return Table(header, body, f"{total} steps")


def _against(rows: Sequence[Mapping[str, Any]], total: int) -> Table:
    """Ours minus the best of each other group among those that compute at most half a step more, paired by prompt."""
    header = ["ours", "computed", "the best of", "is", "computed ", "mean (dB)", "p10 (dB)"]
    measured = [row for row in rows if None not in (row["psnr"], row["computed"])]
    body = []
    for own in sorted((row for row in measured if row["group"] == OURS), key=lambda r: r["computed"]):
        for group in (PEERS, STEPS):
            close = [r for r in measured if r["group"] == group and r["computed"] <= own["computed"] + 0.5]
            if not close or own["name"].endswith("-before"):
                continue
            best = max(close, key=lambda r: float(np.mean(r["psnr"])))
            gain = np.asarray(own["psnr"]) - np.asarray(best["psnr"])
            tail = np.quantile(own["psnr"], 0.1) - np.quantile(best["psnr"], 0.1)
            cells = [
                f"{own['computed']:.1f}",
                group,
                Markdown(f"`{best['name']}`"),
                f"{best['computed']:.1f}",
            ]
            body.append([Markdown(f"`{own['name']}`"), *cells, _mean(list(gain), sign=True), f"{tail:+.1f}"])
    return Table(header, body, f"{total} steps: ours against the best that computes no more")


def _mean(values: Sequence[float], *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    mean = mean_interval(values, range(len(values)))
    if mean.low is None or mean.high is None:
        return f"{mean.value:{plus}.1f}"
    return f"{mean.value:{plus}.1f} [{mean.low:{plus}.1f}, {mean.high:{plus}.1f}]"


def report(path: Path, rows: Sequence[Mapping[str, Any]], made_with: str) -> Path:
    """distances.md, and distances.json with the environment."""
    from accel.evaluation.environment import environment

    missing = dict.fromkeys((row["name"], row["why"]) for row in rows if row["why"])
    lines = [f"- `{name}`: {why}" for name, why in missing]
    parts = ["# Distance per computed step", made_with, *(table.markdown() for table in tables(rows))]
    parts += ["## Settings that did not run", "\n".join(lines)] if lines else []
    write_atomically(
        path / "distances.json", json.dumps({"environment": environment(), "rows": list(rows)}) + "\n"
    )
    write_atomically(path / "distances.md", "\n\n".join(parts) + "\n")
    return path / "distances.md"
