"""Speculative decoding put into a pipeline, and taken out again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel.core.method import Method
from accel.errors import UnsupportedError

from .config import SpeculativeDecodingConfig
from .decoder import SpeculativeDecoder
from .stats import SpeculationStats

_MISSING = object()


@dataclass(frozen=True)
class Target:
    """A pipeline that draws its tokens through a `decoder`. It is only referred to weakly."""

    pipe: weakref.ref

    @property
    def subject(self) -> Any:
        """The pipeline itself, in which exactly one attribute changes."""
        return self.pipe()

    @property
    def loop(self) -> None:
        return None


class SpeculativeDecoding(Method):
    """A `SpeculativeDecoder` in the place of a pipeline's own decoder."""

    name = "speculative_decoding"
    Stats = SpeculationStats

    def __init__(self, target: Target, config: SpeculativeDecodingConfig, stats: SpeculationStats) -> None:
        self._target = target
        self.decoder = SpeculativeDecoder(config, stats)

    @classmethod
    def take_apart(cls, pipe: Any, find: Callable[[nn.Module], Any]) -> Target:
        decoder = getattr(pipe, "decoder", None)
        if not callable(decoder) or isinstance(decoder, nn.Module):  # some pipelines call a network that
            raise UnsupportedError(
                f"speculative decoding needs an autoregressive pipeline (AutoregressivePipeline, or any with a "
                f"`decoder`), got {type(pipe).__name__}"
            )
        return Target(weakref.ref(pipe))

    def attach(self, stack: ExitStack) -> None:
        pipe = self._target.subject
        before = vars(pipe).get("decoder", _MISSING)
        self.decoder.owner = self  # the pipeline keeps its decoder alive, and that this method
        pipe.decoder = self.decoder
        stack.callback(self._undo, before)

    def _undo(self, before: Any) -> None:
        pipe = self._target.subject
        if pipe is None:
            return
        if callable(release := getattr(pipe, "release", None)):
            release(self.decoder)  # rounds that it captured
        if before is _MISSING:
            del pipe.decoder  # it was the class's
        else:
            pipe.decoder = before
