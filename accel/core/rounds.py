"""Rounds of decoding that can be replayed, because all that they read and write stays where it is.

A round is a function without arguments or result: it runs a model's forward, draws or verifies tokens, and writes
the new state over the old. As it is, it is eager code and takes what its kernels take to launch. A CUDA graph takes
the launches away (Janus-Pro-1B's shape on an H100: 27 ms a token eager, 3.5 ms captured), and allows for nothing
that changes from round to round but the contents of tensors: no Python number, no tensor made elsewhere.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from accel.errors import AccelWarning

from .graphs import Cuda

Round = Callable[[], None]
Kept = TypeVar("Kept")


class Rounds:
    """What decoders keep with a model whose tensors stay where they are, and how its rounds run.

    Args:
        capture: round → what replays it, or None if it cannot; None: rounds run as they are.
    """

    def __init__(self, capture: Callable[[Round], Round | None] | None = None) -> None:
        self._capture = capture
        self._kept: dict[tuple, Any] = {}
        self._replays: dict[tuple, Round | None] = {}
        self._samplings: dict[Any, list[Any]] = {}

    @property
    def captures(self) -> bool:
        return self._capture is not None

    @property
    def nbytes(self) -> int:
        """Memory of graphs and of what is kept, as far as that says it."""
        return sum(getattr(one, "nbytes", 0) for one in (self._capture, *self._kept.values()))

    def keep(self, key: tuple, make: Callable[[], Kept]) -> Kept:
        """What was made for this key; the first element of keys is the decoder (see `forget`)."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def run(self, key: tuple, body: Round) -> None:
        """Run a round: the first time as it is, which warms up and compiles; the second captures; then replays.

        Args:
            key: of everything that the round does not read from tensors; the first element is the decoder.
        """
        if self._capture is None or key not in self._replays:
            self._replays[key] = None
            body()
            return
        replay = self._replays[key]
        if replay is None:
            replay = self._capture(body)
            if replay is None:
                self._capture, replay = None, body
            self._replays[key] = replay
        replay()

    def turn_to(self, decoder: Any, sampling: Any) -> None:
        """A batch is drawn so from here on. Of a decoder's samplings, the second elements of its keys, the last two
        stay: who tries out temperatures would fill the memory."""
        last = [one for one in self._samplings.get(decoder, []) if one != sampling]
        self._samplings[decoder] = [*last[-1:], sampling]
        gone = last[:-1]
        self._drop(lambda key: key[0] is decoder and key[1] in gone)

    def narrow(self, decoder: Any, width: int) -> None:
        """Drop what a decoder kept for windows of other widths, the third elements of its keys."""
        self._drop(lambda key: key[0] is decoder and key[2] != width)

    def forget(self, decoder: Any) -> None:
        """Drop what one decoder kept, and its captured rounds."""
        self._samplings.pop(decoder, None)
        self._drop(lambda key: key[0] is decoder)

    def _drop(self, gone: Callable[[tuple], bool]) -> None:
        for kept in (self._kept, self._replays):
            for key in [key for key in kept if gone(key)]:
                del kept[key]


def to_front(whole: Tensor, index_B: Tensor) -> Tensor:
    """Move rows to the front of their memory, over the others; what is there is at the same place every time.

    Returns:
        A view of them.
    """
    whole[: len(index_B)] = whole[index_B]
    return whole[: len(index_B)]


def rounds_of(model: Any) -> Rounds:
    """The model's, if its tensors stay; else new ones, for one batch, that run as they are."""
    return getattr(model, "rounds", None) or Rounds()


def reach(model: Any, width: int, at_most: int) -> int:
    """Tell the model that no image's next forward begins behind slot `at_most`.

    Returns:
        What its shapes depend on beside the batch and the width; part of a round's key.
    """
    if not hasattr(model, "at_most"):
        return 0
    model.at_most = at_most
    return model.seen(width)


class CudaGraphs:
    """Captures rounds in CUDA graphs that share one pool of memory, as they run one after the other.

    Args:
        recorder: records rounds on its device.
        failed: called once with the reason if a round cannot be captured.
    """

    def __init__(self, recorder: Cuda, failed: Callable[[str], None]) -> None:
        self._recorder, self._failed = recorder, failed
        #: Bytes that the graphs hold.
        self.nbytes = 0

    @classmethod
    def on(cls, device: torch.device, failed: Callable[[str], None]) -> CudaGraphs:
        return cls(Cuda(device), failed)

    def __call__(self, body: Round) -> Round | None:
        device = self._recorder.device
        torch.cuda.empty_cache()  # as entering a capture does: what is reserved after it is the capture's
        before = torch.cuda.memory_reserved(device)
        try:
            replay, _ = self._recorder.record(body)
        except Exception as error:  # drivers, libraries and models each have their own
            self._failed(why(error, torch.cuda.mem_get_info(device)[0]))
            return None
        self.nbytes += max(0, torch.cuda.memory_reserved(device) - before)
        return replay


def why(error: Exception, free: int) -> str:
    """In one line, why a round was not captured.

    Args:
        free: bytes of the device that are free.
    """
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        return (
            f"out of memory: it asked for {wanted[1] if wanted else 'more'}, {free / 2**20:.0f} MiB are free. "
            "A smaller batch leaves room"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def warn_not_captured(reason: str) -> None:
    warnings.warn(
        f"decoding goes on without CUDA graphs, several times more slowly, because a round could not be captured: "
        f"{reason}. graphs=False (or ACCEL_GRAPHS=0) asks for that without a warning",
        AccelWarning,
        stacklevel=2,
    )
