"""Whose call is it? Which loop the running code belongs to, told from the stack.

A module may be called by somebody else than the loop that is followed: another pipeline that shares it, in another
thread or nested in a callback, or a user's own code. Nothing in the call itself says so without waiting for the
device. The stack does: which pipeline's `__call__` is the nearest, and through which functions it got here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

#: Base classes, by name, of what runs denoising loops in diffusers.
_PIPELINES = frozenset({"DiffusionPipeline", "ModularPipeline"})


class Place(NamedTuple):
    """Where a loop runs.

    Attributes:
        thread: its identifier.
        frame: id of the frame of the nearest pipeline's `__call__`; 0: no pipeline's, a loop of the user's own.
    """

    thread: int
    frame: int


#: The functions by which a call comes; in a loop of the user's own with the places in them, so that two loops side by
#: side in one function are two.
Path = tuple[CodeType | tuple[CodeType, int], ...]


def here() -> tuple[Place, Path]:
    """The place of the running code, and the way from there to here.

    Costs a few microseconds. No frame's variables are looked at, but for those of a `__call__` seen for the first
    time: looking would keep the tensors among them alive.
    """
    frames: list[FrameType] = []
    for frame in _frames():
        if _is_loop(frame):
            return Place(threading.get_ident(), id(frame)), tuple(f.f_code for f in frames)
        frames.append(frame)
    return Place(threading.get_ident(), 0), tuple((f.f_code, f.f_lasti) for f in frames)


def pipeline() -> Any:
    """The nearest pipeline whose `__call__` runs; None if there is none."""
    return next((frame.f_locals["self"] for frame in _frames() if _is_loop(frame)), None)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


_KNOWN: dict[CodeType, bool] = {}


def _is_loop(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_name != "__call__" or code.co_varnames[:1] != ("self",):
        return False
    if code not in _KNOWN:
        _KNOWN[code] = _is_pipeline(type(frame.f_locals["self"]))
    return _KNOWN[code]


def _is_pipeline(cls: type) -> bool:
    return any(base.__name__ in _PIPELINES for base in cls.__mro__)
