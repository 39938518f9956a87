"""What an acceleration did: tokens computed, plans rebuilt, time in the denoiser."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepStats:
    """One step of the last run. Tokens are image tokens summed over the denoiser's blocks, for one call; where
    one of two branches of guidance is skipped, a mean over both.

    Attributes:
        computed, total: tokens that were computed, and that a plain step would have computed.
        built, reused: plans that were built at this step, and that were taken over from an earlier one.
        calls: denoiser calls, compiled ones among them; None before they are counted.
        forecast: tokens that were not computed but forecast from earlier steps.
        cache_bytes: memory held from this step to the next: histories, keys and values.
        oldest_age: steps since the token that waited longest was computed. A scalar on the device until it
            is read with int(); what `as_dict` and `oldest_age` of `Stats` give is read.
        branch_skipped: the unconditional branch of guidance was forecast; `computed` counts half of the tokens.
    """

    computed: int
    total: int
    built: int = 0
    reused: int = 0
    calls: int | None = None
    forecast: int = 0
    cache_bytes: int = 0
    oldest_age: int | Tensor = 0
    branch_skipped: bool = False


@dataclass
class Stats:
    """Totals since `accelerate` (or `reset`), and the steps of the last run.

    `print(stats)` gives a summary, `as_dict()` the same for machines. Reading `seconds` waits for the GPU;
    nothing before that does. `notes` says what the settings ask for that the last run could not do; `attention` how
    keys weigh as many tokens as they stand for, where they do.
    """

    method: str
    runs: int = 0
    computed: int = 0
    total: int = 0
    plans_built: int = 0
    plans_reused: int = 0
    calls: int = 0
    branches_skipped: int = 0
    steps: list[StepStats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    attention: str | None = None
    _seconds: float = 0.0
    _timed: int = 0
    _events: list[tuple[Any, Any]] = field(default_factory=list)
    _started: Any = None

    @property
    def share(self) -> float:
        """Tokens computed / tokens of the plain pipeline, over all steps and blocks; 1 before a run."""
        return self.computed / self.total if self.total else 1.0

    @property
    def oldest_age(self) -> int:
        """Largest number of steps that a token of the last run went without being computed."""
        return max((int(s.oldest_age) for s in self.steps), default=0)

    @property
    def cache_bytes(self) -> int:
        """Largest amount of memory that the last run kept from one step to the next."""
        return max((s.cache_bytes for s in self.steps), default=0)

    @property
    def seconds(self) -> float | None:
        """Time inside the denoiser; None if no call could be timed. CUDA events on GPU, wall clock on CPU."""
        if self._events:
            self._events[-1][1].synchronize()
        self._collect()
        return self._seconds if self._timed else None

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__(self.method)  # type: ignore[misc]

    def as_dict(self) -> dict[str, Any]:
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {
            **public,
            "steps": [{**asdict(s), "oldest_age": int(s.oldest_age)} for s in self.steps],
            "share": self.share,
            "cache_bytes": self.cache_bytes,
            "oldest_age": self.oldest_age,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        seconds = self.seconds
        per_step = " ".join(f"{100 * s.computed / s.total:.0f}" for s in self.steps)
        time_line = "not measured (no call yet)"
        if seconds is not None:
            time_line = f"{seconds:.3f} s in {self._timed} calls"
        lines = [
            f"{self.method}: {self.runs} run{'s' if self.runs != 1 else ''}, "
            f"{100 * self.share:.1f} % of the image tokens computed",
            f"  denoiser        {time_line}",
            f"  plans           {self.plans_built} built, {self.plans_reused} reused",
            f"  last run, %     {per_step or '-'}",
        ]
        if any(s.forecast for s in self.steps):
            lines.append(
                f"  forecasts       oldest token {self.oldest_age} steps, caches {self.cache_bytes / 2**20:.1f} MiB"
            )
        if self.attention:
            lines.append(f"  attention       keys weigh as their tokens, by {self.attention}")
        if self.peak_bytes is not None:
            lines.append(f"  memory          at most {self.peak_bytes / 2**30:.2f} GiB")
        if self.branches_skipped:
            last = sum(s.branch_skipped for s in self.steps)
            lines.append(f"  guidance        one branch only at {last} of {len(self.steps)} steps")
        return "\n".join([*lines, *(f"  note            {note}" for note in self.notes)])

    def record(self, step: StepStats) -> None:
        self.steps.append(step)
        self.computed += step.computed
        self.total += step.total
        self.plans_built += step.built
        self.plans_reused += step.reused
        self.branches_skipped += step.branch_skipped

    def _collect(self) -> None:
        """Add up the timings that the device is done with."""
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1e3

    def call_starts(self, device: torch.device) -> None:
        self._started = _now(device)

    def call_ends(self, device: torch.device) -> None:
        started, self._started = self._started, None
        if started is None:
            return
        self.calls += 1
        self._timed += 1
        if device.type == "cuda":
            self._events.append((started, _now(device)))
            if len(self._events) >= 256:  # nobody reads: keep the list short, without waiting
                self._collect()
        else:
            self._seconds += time.perf_counter() - started


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
