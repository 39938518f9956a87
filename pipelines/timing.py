"""Time and memory of one pipeline call: device-synchronised, denoiser apart, peak of that call only.

Of an autoregressive pipeline, the denoiser is the causal transformer that every token goes through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from accel.core.around import Around, compiled


class Measurement:
    """`seconds` of the whole call, `denoiser_seconds` of it in `calls` of the denoiser (None: not measurable),
    `peak_bytes` of `peak_kind` memory ("device": allocated by torch; "host": resident set)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.denoiser_seconds: float | None = None
        self.calls: int | None = None
        self.peak_bytes: int | None = None
        self.peak_kind: str | None = None


@contextmanager
def measure(pipe: Any) -> Iterator[Measurement]:
    """Measure what runs inside the `with` block. Enter it after accelerating `pipe`.

    The denoiser's clock stands around its hooks and whatever an acceleration does about its calls, so that all of
    that counts as denoiser time.
    """
    device = _device(pipe)
    result = Measurement()
    denoiser = _denoiser(pipe)
    laps = None if denoiser is None else _Laps(denoiser, device)
    if laps is not None:
        laps.install()
    peak_is_ours = _reset_peak(device)
    try:
        _synchronise(device)
        start = time.perf_counter()
        yield result
        _synchronise(device)
        result.seconds = time.perf_counter() - start
    finally:
        if laps is not None:
            laps.remove()
    if laps is not None:
        result.denoiser_seconds, result.calls = laps.total(), laps.count
    if peak_is_ours:
        result.peak_bytes, result.peak_kind = _peak(device)


class _Laps(Around):
    """Sums forward passes. On CUDA with events, which cost no synchronisation inside the loop."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        super().__init__(module)
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._device = device

    def around(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._mark()
        output = self.call(*args, **kwargs)
        self._mark()
        return output

    @property
    def count(self) -> int:
        return len(self._marks) // 2

    def total(self) -> float | None:
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        if not pairs:
            return None
        if self._cuda:
            return sum(a.elapsed_time(b) for a, b in pairs) / 1000
        return sum(b - a for a, b in pairs)

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            _synchronise(self._device)
            self._marks.append(time.perf_counter())


def is_compiled(pipe: Any) -> bool:
    """Whether some part of the pipeline runs through torch.compile."""
    components = getattr(pipe, "components", None) or vars(pipe)
    return any(
        compiled(module)
        for component in components.values()
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
    )


def _denoiser(pipe: Any) -> torch.nn.Module | None:
    """What is timed; None if it is compiled: a hook would be compiled along and break its graph."""
    for name in ("transformer", "unet"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return None if compiled(module) else module
    module = getattr(pipe, "timed", None)  # an autoregressive pipeline's
    return None if not isinstance(module, torch.nn.Module) or compiled(module) else module


def _device(pipe: Any) -> torch.device:
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None) or "cpu"
    return torch.device(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: torch.device) -> bool:
    """False where the peak cannot be reset: it would be the process's, not this call's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, Linux >= 4.0
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> tuple[int | None, str | None]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device"
    status = Path("/proc/self/status")  # Linux only
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024, "host"
    return None, None
