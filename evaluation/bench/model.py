"""`accel bench model`: milliseconds of a step, of denoisers of the real shapes with random weights.

Every row has a copy of the denoiser that shares its weights, so that nothing of one row stays for the next, and is
timed between loops of the plain pipeline in the same process. What is done is kept: a stopped bench continues.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.evaluation.environment import environment
from accel.evaluation.errors import EvaluationError, RecordError
from accel.evaluation.records import write_atomically
from accel.evaluation.textfiles import first_line

from . import model_report
from .architectures import Model, build, calls
from .model_rows import COMPILED, GRAPHS, Kind, Row, kind, parse
from .peers import Peer

RESULTS = "model.json"
_PLAIN_STEPS = 4  # of the plain loops between which a row is timed

Result = dict[str, Any]


@dataclass
class Loop:
    """One call of the pipeline: milliseconds of every step, the first with what comes before it."""

    step_ms: list[float]
    seconds: float


def bench(
    path: Path,
    arch: str,
    sizes: Sequence[int],
    rows: str,
    *,
    steps: int = 24,
    rounds: int = 2,
    minutes: float | None = None,
    device: str,
    dtype: torch.dtype,
    tiny: bool = False,
    progress: Callable[[tuple[int, int, str]], None] = lambda state: None,
    done: Callable[[str], None] = lambda line: None,
) -> Path:
    """Time rows on one denoiser and write model.json, model.md and model.svg; returns the Markdown.

    Args:
        path: folder of the results; rows that are there already are not timed again.
        arch: a key of `architectures.ARCHITECTURES`, or "builtin".
        sizes: sides of square pictures in pixels.
        rows: see `model_rows.parse`.
        steps: of a picture.
        rounds: timed loops of each row.
        minutes: no row is started that would end later if it takes as long as the longest so far, of those that
            compile or of those that do not.
        tiny: a few narrow blocks, and nothing is compiled: tries the bench itself out.
        progress: told (rows done, rows, name of the row).
        done: told the line of each row when it is there.

    Raises:
        ConfigError: an unknown architecture, row or way.
        EvaluationError: a size that does not fit the model.
        RecordError: the folder was started with other settings.
    """
    chosen = parse(rows, steps, calls(arch))
    started = time.monotonic()
    settings = {"arch": arch, "steps": steps, "dtype": str(dtype).removeprefix("torch."), "tiny": tiny}
    results = _Results(
        path, {**settings, "device": environment()["device"] if device.startswith("cuda") else device}
    )
    wanted = [(size, row) for row in chosen for size in sizes if row.size in (None, size)]
    missing = [(size, row) for size, row in wanted if not results.has(size, row)]
    if missing:
        model = build(arch, torch.device(device), dtype, tiny=tiny)
        _check(model, sizes)
        longest: dict[bool, float] = {}
        for number, (size, row) in enumerate(missing):
            progress((number, len(missing), f"{size} px, {row.name}"))
            begun, compiles = time.monotonic(), row.compile is not False
            if minutes is not None and begun - started + longest.get(compiles, 0) > 60 * minutes:
                results.add(size, row, {"problem": f"not run: the {minutes:g} minutes are over"}, keep=False)
                continue
            with _uncompiled() if tiny else nullcontext():
                results.add(size, row, _tried(model, row, size, rounds))
            longest[compiles] = max(longest.get(compiles, 0), time.monotonic() - begun)
            model_report.write(path, results.data)
            done(model_report.line(results.data, size, row.name))
        progress((len(missing), len(missing), ""))
    return model_report.write(path, results.data)


class _Results:
    """What is measured, in a file that is whole after every row."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.file = path / RESULTS
        self.data: dict[str, Any] = {"settings": settings, "environments": [], "rows": []}
        if self.file.exists():
            self.data = json.loads(self.file.read_text(encoding="utf-8"))
            if self.data["settings"] != settings:
                raise RecordError(
                    f"{path} was started with {self.data['settings']}, not {settings}: choose another --out"
                )
        self.data["rows"] = [row for row in self.data["rows"] if "problem" not in row]  # try those again
        self.data["environments"].append(environment())

    def has(self, size: int, row: Row) -> bool:
        return any((found["size"], found["row"]) == (size, row.name) for found in self.data["rows"])

    def add(self, size: int, row: Row, result: Result, keep: bool = True) -> None:
        start = len(self.data["environments"]) - 1
        self.data["rows"].append({"size": size, "row": row.name, "start": start, **result})
        if keep:
            write_atomically(self.file, json.dumps(self.data, allow_nan=False) + "\n")


def _check(model: Model, sizes: Sequence[int]) -> None:
    multiple = 2 * model.pixels
    for size in sizes:
        if size < multiple or size % multiple:
            raise EvaluationError(f"size {size}: {model.title} takes multiples of {multiple} pixels")


def _tried(model: Model, row: Row, size: int, rounds: int) -> Result:
    """What a row measures, or why it does not run: that one fails says nothing about the others."""
    try:
        return _measured(model, row, size, rounds)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        if row.compile is not False:
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measured(model: Model, row: Row, size: int, rounds: int) -> Result:
    pipe = _copy(model.pipe)
    with row.attached(pipe) as handle:
        begun = time.perf_counter()
        kinds = _kinds(model, pipe, row, size, handle)
        first_seconds = time.perf_counter() - begun
        if GRAPHS in row.ways or row.compile is True:
            _loop(model, pipe, size, row.steps)  # the second call of a kind is captured, later ones replay it
        plain: list[float] = []
        loops: list[Loop] = []
        peaks: list[int] = []
        for _ in range(rounds):
            plain += _loop(model, model.pipe, size, _PLAIN_STEPS).step_ms[1:]
            with _peak(peaks):
                loops.append(_loop(model, pipe, size, row.steps))
        plain += _loop(model, model.pipe, size, _PLAIN_STEPS).step_ms[1:]
        plans = _plans(model, pipe, row, size, handle)
        waiting = _loop(model, pipe, size, row.steps, waiting=True) if peaks else None
        return {
            "tokens": model.tokens(size),
            "kinds": kinds,
            "schedule": row.schedule() or kinds,
            "ms": _by_kind(kinds, loops),
            "plain_ms": _summary(plain),
            "host_ms": _by_kind(kinds, [waiting]) if waiting else {},
            "plan_build_ms": _summary(plans) if plans else None,
            "first_seconds": first_seconds,
            "loop_seconds": [loop.seconds for loop in loops],
            "peak_bytes": max(peaks, default=None),
            "compiled": getattr(handle, "compiled", None),
            "graphs": _graphs() if COMPILED in row.ways or row.compile is True else None,
            "notes": list(handle.stats.notes) if handle else [],
        }


def _copy(pipe: Any) -> Any:
    """A pipeline with a denoiser and a scheduler of its own; the weights are shared."""
    shared = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
    parts = dict(pipe.components)
    parts["transformer"] = copy.deepcopy(pipe.transformer, {id(tensor): tensor for tensor in shared})
    parts["scheduler"] = copy.deepcopy(pipe.scheduler)
    made = type(pipe)(**parts)
    for each in (pipe, made):
        each.set_progress_bar_config(disable=True)
    return made


def _kinds(model: Model, pipe: Any, row: Row, size: int, handle: Any) -> list[Kind]:
    """Run a loop, which warms up and compiles, and see what its steps compute."""
    if isinstance(row.configuration, Peer):
        with _uncompiled():  # a hook that counts would be compiled along, and stay
            kinds = _observed(model, pipe, row, size)
        if row.compile is not False:
            _loop(model, pipe, size, row.steps)
        return kinds
    _loop(model, pipe, size, row.steps)
    if handle is None:
        return ["dense"] * row.steps
    return [kind(step.computed, step.total) for step in handle.stats.steps]


def _observed(model: Model, pipe: Any, row: Row, size: int) -> list[Kind]:
    """What the steps of a peer compute, seen from inside its last block."""
    calls = 0
    after_steps = [0]

    def called(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = _inside(pipe.transformer).register_forward_pre_hook(called)
    try:
        _loop(model, pipe, size, row.steps, each=lambda: after_steps.append(calls))
    finally:
        hook.remove()
    return ["dense" if after > before else "skipped" for before, after in pairwise(after_steps)]


def _plans(model: Model, pipe: Any, row: Row, size: int, handle: Any) -> list[float]:
    """Milliseconds of every plan that merging builds in a loop, from an idle device until the plan is there."""
    method = handle and handle._method()
    if row.compile is not False or not hasattr(method, "build"):
        return []
    device, build = torch.device(pipe._execution_device), method.build
    times: list[float] = []

    def timed(*arguments: Any) -> Any:
        _synchronise(device)
        started = time.perf_counter()
        plan = build(*arguments)
        _synchronise(device)
        times.append(1e3 * (time.perf_counter() - started))
        return plan

    method.build = timed
    try:
        _loop(model, pipe, size, row.steps)
    finally:
        del method.build
    return times


def _inside(denoiser: nn.Module) -> nn.Module:
    """A part of the last block that runs only where the block is computed: peers answer for a block's `forward`, or
    for its attention's."""
    stacks = [part for part in denoiser.children() if isinstance(part, nn.ModuleList)]
    last = max(stacks, key=len)[-1]
    return next(m for name, m in last.named_modules() if "att" in name and isinstance(m, nn.Linear))


def _loop(
    model: Model,
    pipe: Any,
    size: int,
    steps: int,
    *,
    waiting: bool = False,
    each: Callable[[], None] = lambda: None,
) -> Loop:
    """One picture.

    Args:
        waiting: time the host alone: wait for the device after every step, and take the time from then until all
            of the next step is launched.
        each: called after every step.
    """
    device = torch.device(pipe._execution_device)
    now = _host_time if waiting or device.type != "cuda" else _event
    begins, ends = [], []

    def after(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(now())
        if waiting:
            _synchronise(device)
        begins.append(now() if waiting else ends[-1])
        each()
        return {}

    _synchronise(device)
    started = time.perf_counter()
    begins.append(now())
    pipe(
        **model.arguments,
        height=size,
        width=size,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(0),
        callback_on_step_end=after,
    )
    _synchronise(device)
    seconds = time.perf_counter() - started
    return Loop([1e3 * _seconds(a, b) for a, b in zip(begins, ends, strict=False)], seconds)


def _host_time() -> float:
    return time.perf_counter()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(found: list[int]) -> Iterator[None]:
    """Adds the most memory that torch had allocated on the GPU meanwhile; nothing on a CPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    found.append(torch.cuda.max_memory_allocated())


def _by_kind(kinds: Sequence[Kind], loops: Sequence[Loop]) -> dict[str, Any]:
    """Of all steps but the first of each loop, which has the pipeline's preparations in it."""
    times: dict[str, list[float]] = {}
    for loop in loops:
        for which, ms in list(zip(kinds, loop.step_ms, strict=True))[1:]:
            times.setdefault(which, []).append(ms)
    return {which: _summary(own) for which, own in times.items()}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def _graphs() -> int:
    """Graphs that torch.compile has made since it was last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Everything that is compiled runs as it is: what remains is what surrounds it."""
    with torch.compiler.set_stance("force_eager"):
        yield
