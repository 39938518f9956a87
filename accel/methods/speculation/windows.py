"""How wide a window should be, from measured forwards, and whether windows pay at all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

#: Widths that "auto" chooses among. Narrower ones than 8 were never best where windows paid at all.
WIDTHS = (8, 16, 32, 64)

PASSES = 3

#: (what to time, device) → seconds.
Timer = Callable[[Callable[[], object], torch.device], float]


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Least seconds of an action on a device, after one run that compiles and allocates, and on a GPU one that captures.

    The least, because other work on the machine only ever adds to it. On a CPU not even that, where its own processor
    time is less: a busy machine lets a token through in one slice of time and a window in several.
    """

    def once() -> float:
        _wait(device)
        begin, busy = time.perf_counter(), time.process_time()
        action()
        _wait(device)
        took = time.perf_counter() - begin
        return min(took, time.process_time() - busy) if device.type == "cpu" else took

    once()
    return min(once() for _ in range(1 if device.type == "cpu" else 2))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Gain:
    """How many tokens a forward of a window yields: what was measured, at other widths a guess scaled by it.

    The guess is 1 + 3 (1 - exp(-(W - 1) / 8)): 2.7 at a width of 8, 4.0 at 64, nearly what coupled drafts are
    published to give (arXiv:2510.24211, 4.2 at 64); its shape is the built-in model's (3.4, 4.5 and 5.0 at 8, 16
    and 32). Rather too much than too little: a batch that is decoded plainly teaches nothing.
    """

    def __init__(self) -> None:
        self._scale, self._measured = 1.0, dict[int, float]()

    def __call__(self, width: int) -> float:
        return self._measured.get(width, 1 + self._scale * _guess(width))

    def learn(self, width: int, tokens_per_forward: float) -> None:
        """A batch has been decoded with this width. Batches differ, so that a new one counts for a third."""
        before = self._measured.get(width, tokens_per_forward)
        self._measured[width] = before + (tokens_per_forward - before) / 3
        self._scale = max(0.0, self._measured[width] - 1) / _guess(width)


def _guess(width: int) -> float:
    return 3.0 * (1 - math.exp(-(width - 1) / 8))


def time_widths(widths: Sequence[int], time_width: Callable[[int], float], gain: Gain) -> dict[int, float]:
    """Seconds per round at 1 and at rising widths, until one promises a fifth less than the best before it.

    The least of three passes over the widths: on a busy machine what comes and goes hits all of them alike. Those that
    promise a fifth less than the best in the first pass are left out of the others: on a CPU all of it takes as long as an image.
    """
    found = {1: time_width(1)}
    best = 0.0
    for width in widths:
        found[width] = time_width(width)
        rate = gain(width) / found[width]
        if rate < 0.8 * best:
            break
        best = max(best, rate)
    near = [width for width in found if width == 1 or gain(width) / found[width] >= 0.8 * best]
    for _ in range(PASSES - 1):
        for width in near:
            found[width] = min(found[width], time_width(width))
    return found


def choose(timed: dict[int, float], gain: Gain) -> tuple[int, float]:
    """(width, its expected speedup over plain decoding): the most tokens per second among windows."""
    width = max((w for w in timed if w > 1), key=lambda w: gain(w) / timed[w])
    return width, gain(width) * timed[1] / timed[width]
